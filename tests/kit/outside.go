package kit

import "testing"

// Run is Main for packages that do more before they exit.
func Run(m *testing.M) int {
	holdAndExit()
	return run(m)
}
