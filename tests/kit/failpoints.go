package kit

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
)

var (
	stepCall = regexp.MustCompile(`failpoint\.Step\("([^"]+)"`)

	// killedAt are the steps at which this process's tests have killed a program.
	killedAt sync.Map
)

// KilledAt notes that a program was killed at a step.
func KilledAt(step string) { killedAt.Store(step, true) }

// NeverKilledAt are the steps in packages below pkg at which no program was killed,
// by their names as far as these are written down in the code.
func NeverKilledAt(packages ...string) (steps []string, err error) {
	for _, name := range packages {
		found := 0
		files, err := filepath.Glob(filepath.Join("../../pkg", name, "*.go"))
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			for _, call := range stepCall.FindAllStringSubmatch(string(text), -1) {
				found++
				if !wasKilledAt(call[1]) {
					steps = append(steps, call[1])
				}
			}
		}
		if found == 0 {
			return nil, fmt.Errorf("no step is found in pkg/%s: are they still told like this?", name)
		}
	}
	return steps, nil
}

func wasKilledAt(begins string) (killed bool) {
	killedAt.Range(func(at, _ any) bool {
		step, _ := at.(string)
		killed = strings.HasPrefix(step, begins)
		return !killed
	})
	return killed
}
