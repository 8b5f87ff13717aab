package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
)

// ownerPoll is how often a daemon that waits asks whether the other has ended.
const ownerPoll = 200 * time.Millisecond

// own makes this process the node's one daemon, for as long as the file is open:
// the kernel lets go of the lock however the process ends. While another daemon
// has it, own waits and says who that is.
func own(ctx context.Context, path string, waiting func(holder string)) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the daemon's lock: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, sign(f)
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		waiting(holderOf(f))
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		case <-time.After(ownerPoll):
		}
	}
}

// sign writes down who holds the lock, for people.
func sign(f *os.File) error {
	host, err := os.Hostname()
	if err != nil {
		host = "an unknown host"
	}
	text := fmt.Sprintf("process %d on %s\n", os.Getpid(), host)
	_, writeErr := f.WriteAt([]byte(text), 0)
	if err := errors.Join(writeErr, f.Truncate(int64(len(text)))); err != nil {
		return errors.Join(fmt.Errorf("write the daemon's lock: %w", err), f.Close())
	}
	failpoint.Step("daemon: lock signed")
	return nil
}

func holderOf(f *os.File) string {
	text, err := io.ReadAll(io.NewSectionReader(f, 0, 256))
	holder := strings.TrimSpace(string(text))
	if err != nil || holder == "" {
		return "a daemon that has not said who it is"
	}
	return holder
}
