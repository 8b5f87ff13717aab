package install

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

// maxConf is the size beyond which a file is not taken for a configuration.
const maxConf = 16 << 20

// confFile is a network configuration as it was when it was read.
type confFile struct {
	name string // in the directory
	path string
	link string // where it points to, if it is a symbolic link
	info os.FileInfo
	data []byte
	list conflist.List
}

// isConf tells the names that runtimes read.
func isConf(name string) bool { return isList(name) || isSingle(name) }

func isList(name string) bool { return filepath.Ext(name) == ".conflist" }

func isSingle(name string) bool {
	return filepath.Ext(name) == ".conf" || filepath.Ext(name) == ".json"
}

// pick returns the configuration that the runtime uses: the first valid one by
// name. containerd stops at a broken file and CRI-O skips it, so either no pod
// starts or the next file is used; for both it is right to go on to the next,
// unless the broken one may be in the making. A file that cannot be read may
// well be readable to the runtime, so there is no going on from that.
func pick(dir string, now time.Time, settle time.Duration) (*confFile, error) {
	entries, err := os.ReadDir(dir) // sorted as runtimes sort
	if err != nil {
		return nil, fmt.Errorf("look for CNI configurations: %w", advise(err))
	}
	var broken []string
	for _, entry := range entries {
		if entry.IsDir() || !isConf(entry.Name()) {
			continue
		}
		file, err := readConf(dir, entry.Name())
		if errors.Is(err, os.ErrNotExist) {
			continue // it vanished since; an event will follow
		}
		if err != nil {
			return nil, err
		}
		invalid := file.parse()
		if invalid == nil {
			return file, nil
		}
		if errors.Is(invalid, conflist.ErrNoInlinedPlugins) && file.list.Name != "" && isDir(filepath.Join(dir, file.list.Name)) {
			return nil, fmt.Errorf("%s has its plugins in the folder %s, and Sluice's cannot be the last of them: put them into the file", file.path, file.list.Name)
		}
		if age := now.Sub(file.info.ModTime()); age >= 0 && age < settle {
			return nil, &waitError{fmt.Sprintf("%s has just been written and cannot be used: %v", file.path, invalid), settle - age}
		}
		broken = append(broken, fmt.Sprintf("%s: %v", entry.Name(), invalid))
	}
	if len(broken) > 0 {
		return nil, fmt.Errorf("no CNI configuration in %s is valid: %s", dir, strings.Join(broken, "; "))
	}
	return nil, fmt.Errorf("no CNI configuration in %s: waiting for the node's CNI plugin to write one", dir)
}

// readConf reads a file. What is no regular file, or too large, is read as
// empty, which is invalid.
func readConf(dir, name string) (*confFile, error) {
	c := &confFile{name: name, path: filepath.Join(dir, name)}
	var err error
	if c.link, err = linkOf(c.path); err != nil {
		return nil, err
	}
	if c.info, err = os.Stat(c.path); err == nil && c.info.Mode().IsRegular() && c.info.Size() <= maxConf {
		c.data, c.info, err = readFile(c.path)
	}
	switch {
	case err != nil && c.link != "":
		return nil, fmt.Errorf("%s is a symbolic link to %s, which cannot be read here (%v): mount that directory at the same path, or put the file itself into %s", c.path, c.link, errors.Unwrap(err), dir) //nolint:errorlint // not to be taken for a file that vanished
	case err != nil:
		return nil, fmt.Errorf("read CNI configuration: %w", advise(err))
	}
	return c, nil
}

// readFile returns contents and what they belong to.
func readFile(path string) ([]byte, os.FileInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat() // before reading: a write in between shows as a later time
	if err != nil {
		return nil, nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	return data, info, err
}

// linkOf returns where a symbolic link points to, "" for anything else.
func linkOf(path string) (string, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	if info.Mode()&os.ModeSymlink == 0 {
		return "", nil
	}
	return os.Readlink(path)
}

// parse reads the contents as the runtime does, which goes by the name.
func (c *confFile) parse() (err error) {
	if isList(c.name) {
		c.list, err = conflist.Parse(c.data)
	} else {
		c.list, err = conflist.ParseConf(c.data)
	}
	return err
}

// unchanged is asked before the file is replaced: what another installer has
// written since must not be lost.
func (c *confFile) unchanged() error {
	link, err := linkOf(c.path)
	if err != nil {
		return err
	}
	info, err := os.Stat(c.path)
	if err != nil {
		return err
	}
	if link != c.link || !sameFile(info, c.info) {
		return &waitError{"it changed while it was edited", 0}
	}
	return nil
}

// sameFile tells whether a file is one that was seen before, unmodified.
func sameFile(a, b os.FileInfo) bool {
	return a != nil && b != nil && os.SameFile(a, b) &&
		a.Size() == b.Size() && a.ModTime().Equal(b.ModTime()) && a.Mode() == b.Mode()
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
