package install

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
)

// Temporary files are hidden, end in nothing that a runtime reads, and can be
// told from everybody else's, so that a start removes those of a killed one.
// (google/renameio names them by their target only.)
const (
	tempPrefix = ".sluice-"
	tempSuffix = ".tmp"
)

// disk makes the changes. All are atomic, and durable when the call returns.
type disk struct {
	// step, if any, is called before each change. Tests stop there, or change what
	// it will find; nothing here cleans up by defer, for a kill would not.
	step func(what string)
	// noSync is for tests that make thousands of changes.
	noSync bool
}

func (d disk) before(what string) {
	failpoint.Step("install: next, " + what)
	if d.step != nil {
		d.step(what)
	}
}

// attributes of a file that a new one takes over.
type attributes struct {
	mode     os.FileMode
	uid, gid int // -1: whoever we are
}

func attributesOf(info os.FileInfo) attributes {
	a := attributes{mode: info.Mode().Perm(), uid: -1, gid: -1}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		a.uid, a.gid = int(stat.Uid), int(stat.Gid)
	}
	return a
}

// replace writes path anew: a temporary file in the same directory (containerd
// 1.6 does not notice a rename from another one), synced, renamed over path.
// ready, if any, is asked just before the rename whether it may go on.
func (d disk) replace(path string, a attributes, fill func(io.Writer) error, ready func() error) error {
	d.before("create a file for " + filepath.Base(path))
	temp, err := d.fill(path, a, fill)
	if err == nil && ready != nil {
		err = ready()
	}
	if err == nil {
		d.before("rename " + filepath.Base(path))
		err = os.Rename(temp, path)
	}
	if err != nil {
		if temp != "" {
			_ = os.Remove(temp)
		}
		return fmt.Errorf("write %s: %w", path, advise(err))
	}
	return d.syncDir(filepath.Dir(path))
}

// fill makes a temporary file for path, and returns its name even with an error.
func (d disk) fill(path string, a attributes, fill func(io.Writer) error) (string, error) {
	f, err := os.OpenFile(tempName(filepath.Dir(path)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer f.Close()
	d.before("fill the file for " + filepath.Base(path))
	if err := fill(f); err != nil {
		return f.Name(), err
	}
	if a.uid >= 0 && (a.uid != os.Geteuid() || a.gid != os.Getegid()) {
		// Without CAP_CHOWN the file becomes ours. The runtime, which is root,
		// reads it all the same.
		if err := f.Chown(a.uid, a.gid); err != nil && !errors.Is(err, os.ErrPermission) {
			return f.Name(), err
		}
	}
	if err := f.Chmod(a.mode); err != nil { // after Chown, and not subject to the umask
		return f.Name(), err
	}
	if err := d.sync(f); err != nil {
		return f.Name(), err
	}
	return f.Name(), f.Close()
}

// link makes path a symbolic link in place of what is there.
func (d disk) link(target, path string) error {
	d.before("create a link for " + filepath.Base(path))
	temp := tempName(filepath.Dir(path))
	err := os.Symlink(target, temp)
	if err == nil {
		d.before("rename link " + filepath.Base(path))
		if err = os.Rename(temp, path); err != nil {
			_ = os.Remove(temp)
		}
	}
	if err != nil {
		return fmt.Errorf("make %s a link to %s: %w", path, target, advise(err))
	}
	return d.syncDir(filepath.Dir(path))
}

// remove removes a file that may be gone.
func (d disk) remove(path string) error {
	d.before("remove " + filepath.Base(path))
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w", advise(err)) // os names operation and path
	}
	return d.syncDir(filepath.Dir(path))
}

// removeLeftovers removes temporary files of a run that was killed. It is best
// effort: they are in nobody's way.
func (d disk) removeLeftovers(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) && strings.HasSuffix(e.Name(), tempSuffix) && !e.IsDir() {
			d.before("remove leftover")
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

func tempName(dir string) string {
	return filepath.Join(dir, fmt.Sprintf("%s%016x%s", tempPrefix, rand.Uint64(), tempSuffix))
}

// syncDir makes a rename or removal survive a power cut. Some file systems
// cannot, and say EINVAL.
func (d disk) syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer f.Close()
	if err := d.sync(f); err != nil && !errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

func (d disk) sync(f *os.File) error {
	if d.noSync {
		return nil
	}
	return f.Sync()
}

// checkDir says what is wrong with a directory before anything is tried in it.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s does not exist: waiting for the node's CNI plugin to be installed", dir)
	case err != nil:
		return fmt.Errorf("look for the CNI directory: %w", advise(err))
	case !info.IsDir():
		return fmt.Errorf("%s is no directory", dir)
	}
	// A mount of a directory that the host has since removed: whatever the host
	// makes in its place cannot be seen here.
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Nlink == 0 {
		return fmt.Errorf("%s was removed on the host and perhaps made anew, which a mount does not follow: restart this pod", dir)
	}
	return nil
}

// advise adds what to do to errors of the host's set-up.
func advise(err error) error {
	switch {
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: mount the directory writable", err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: run as root, and look for a denial of SELinux or AppArmor", err)
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("%w: free some space on the node", err)
	}
	return err
}
