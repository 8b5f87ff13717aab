package agentapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
)

// DefaultRunDir is where the daemon has its lock, its socket and its state file.
const DefaultRunDir = "/var/run/sluice"

// LockPath is the daemon's lock in its directory.
func LockPath(runDir string) string { return filepath.Join(runDir, "lock") }

// SocketPath is the daemon's socket in its directory.
func SocketPath(runDir string) string { return filepath.Join(runDir, "agent.sock") }

// StatePath is the daemon's state file in its directory.
func StatePath(runDir string) string { return filepath.Join(runDir, "state.json") }

const (
	// ownerPoll is how often a daemon that waits asks whether the other has ended.
	ownerPoll = 200 * time.Millisecond
	// ownerText is how long a lock's text may be.
	ownerText = 4 << 10
)

// Owner is the daemon that owns a node.
type Owner struct {
	PID   int    `json:"pid"` // in its own PID namespace
	Host  string `json:"host"`
	BPFFS string `json:"bpffs,omitempty"` // its datapath; empty: it has none
}

// String names it, for people.
func (o Owner) String() string {
	if o.PID == 0 {
		return "a daemon that has not said who it is"
	}
	return fmt.Sprintf("process %d on %s", o.PID, o.Host)
}

// Lock makes its holder the node's one daemon.
type Lock struct{ file *os.File }

// Own makes this process the node's one daemon, for as long as the lock is open:
// the kernel lets go of it however the process ends. While another daemon has it,
// Own waits and tells who that is, at each look. bpffs is the datapath's
// directory. The error is ctx's if that ends first.
func Own(ctx context.Context, runDir, bpffs string, waiting func(Owner)) (*Lock, error) {
	path := LockPath(runDir)
	for tries := 0; ; tries++ {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open the daemon's lock: %w", err)
		}
		locked, err := tryLock(f, unix.LOCK_EX)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if locked && isAt(f, path) {
			l := &Lock{f}
			if err := l.Sign(bpffs); err != nil {
				return nil, errors.Join(err, l.Close())
			}
			return l, nil
		}
		if !locked && tries > 0 { // the first time it may be somebody who only looks
			waiting(readOwner(f))
		}
		f.Close()
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(ownerPoll):
		}
	}
}

// OwnerOf says which daemon owns the node, if one does.
func OwnerOf(runDir string) (Owner, bool, error) {
	f, err := os.Open(LockPath(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return Owner{}, false, nil
	}
	if err != nil {
		return Owner{}, false, fmt.Errorf("look for the node's daemon: %w", err)
	}
	defer f.Close()
	free, err := tryLock(f, unix.LOCK_SH)
	if err != nil || free {
		return Owner{}, false, err
	}
	return readOwner(f), true, nil
}

func tryLock(f *os.File, how int) (bool, error) {
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}

// isAt says whether a file is still the one of that name: an uninstall removes it.
func isAt(f *os.File, path string) bool {
	held, err := f.Stat()
	named, namedErr := os.Stat(path)
	return err == nil && namedErr == nil && os.SameFile(held, named)
}

// Sign writes down who holds the lock, and with which datapath; "" where it has
// none any more.
func (l *Lock) Sign(bpffs string) error {
	host, err := os.Hostname()
	if err != nil {
		host = "an unknown host"
	}
	text, err := json.Marshal(Owner{os.Getpid(), host, bpffs})
	if err != nil {
		return fmt.Errorf("encode the daemon's lock: %w", err)
	}
	_, writeErr := l.file.WriteAt(text, 0)
	if err := errors.Join(writeErr, l.file.Truncate(int64(len(text)))); err != nil {
		return fmt.Errorf("write the daemon's lock: %w", err)
	}
	failpoint.Step("daemon: lock signed")
	return nil
}

// Remove removes the lock's file. A daemon that waits for it makes a new one.
func (l *Lock) Remove() error {
	if err := os.Remove(l.file.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the daemon's lock: %w", err)
	}
	failpoint.Step("daemon: lock removed")
	return nil
}

// Close lets go of the node.
func (l *Lock) Close() error { return l.file.Close() }

// readOwner takes what is no owner's text for one that has not said who it is.
func readOwner(f *os.File) (o Owner) {
	text, err := io.ReadAll(io.NewSectionReader(f, 0, ownerText))
	if err != nil || json.Unmarshal(text, &o) != nil {
		return Owner{}
	}
	return o
}
