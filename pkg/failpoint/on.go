//go:build sluice_failpoints

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Enabled says whether steps do anything in this build.
const Enabled = true

// The steps of a process are counted in one place: they are its own.
var steps struct {
	sync.Mutex
	reached int
}

// Step marks a moment between two changes of state. name says what has just been
// done, such as "enroll: pod written", or what comes next.
func Step(name string) {
	steps.Lock()
	defer steps.Unlock()
	if from := os.Getenv(KillFromEnv); from == "" || steps.reached > 0 || from == name {
		steps.reached++
	}
	if path := os.Getenv(StepsFileEnv); path != "" {
		if err := note(path, name); err != nil {
			panic("failpoint: " + err.Error()) // a test must not take silence for "no steps"
		}
	}
	text := os.Getenv(KillAtEnv)
	if text == "" {
		return
	}
	at, err := strconv.Atoi(text)
	if err != nil {
		panic(fmt.Sprintf("failpoint: %s=%q is not a number", KillAtEnv, text))
	}
	if steps.reached == at {
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // until it arrives
	}
}

func note(path, name string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(name + "\n"); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
