package failpoint

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

// TestMain is also the program that is killed: with the variable FAILPOINT_TEST_CHILD set, it
// takes three steps and ends.
func TestMain(m *testing.M) {
	if os.Getenv("FAILPOINT_TEST_CHILD") == "" {
		os.Exit(m.Run())
	}
	for _, name := range []string{"first", "second", "third"} {
		Step(name)
	}
}

// takeSteps runs the program and says by which signal it ended, and which steps
// it noted.
func takeSteps(t *testing.T, killAt int, from string) (died bool, steps string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "steps")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "FAILPOINT_TEST_CHILD=1", KillAtEnv+"="+strconv.Itoa(killAt), KillFromEnv+"="+from, StepsFileEnv+"="+file)
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status := exit.Sys().(syscall.WaitStatus)
		died = status.Signaled() && status.Signal() == syscall.SIGKILL
	}
	if err != nil && !died {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return died, string(text)
}

func TestAProgramDiesAtTheStepThatIsAskedForAndOnlyInATestBuild(t *testing.T) {
	for _, tt := range []struct {
		killAt int
		from   string
		died   bool
		steps  string
	}{
		{1, "", true, "first\n"},
		{3, "", true, "first\nsecond\nthird\n"},
		{4, "", false, "first\nsecond\nthird\n"},
		{1, "second", true, "first\nsecond\n"},
		{2, "second", true, "first\nsecond\nthird\n"},
		{3, "second", false, "first\nsecond\nthird\n"},
		{1, "another", false, "first\nsecond\nthird\n"},
	} {
		want, steps := tt.died, tt.steps
		if !Enabled {
			want, steps = false, ""
		}
		died, noted := takeSteps(t, tt.killAt, tt.from)
		if died != want || noted != steps {
			t.Errorf("killed at %d from %q: died %v with steps %q, want %v with %q", tt.killAt, tt.from, died, noted, want, steps)
		}
	}
}
