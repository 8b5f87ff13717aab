package kit

import "testing"

// Run is Main for packages that do more before they exit.
func Run(m *testing.M) int { return run(m) }

// Outside runs fn with this process in the cgroup where it was started: what
// programs a socket meets is decided by the cgroup in which it is made, so those
// that fn makes never meet any of ours. Not for tests that run in parallel.
func Outside(t testing.TB, fn func()) {
	t.Helper()
	needWorld(t)
	if err := enter(world.home); err != nil {
		t.Fatal("leave the private cgroup:", err)
	}
	defer func() {
		if err := enter(world.cgroup); err != nil {
			t.Fatal("enter the private cgroup again:", err)
		}
	}()
	fn()
}
