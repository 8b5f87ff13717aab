package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
)

// leaf is the cgroup, below the cluster's own, that its processes are in: pods are
// beside it, for with cgroup2 only leaves hold processes.
const leaf = "node"

// cgroups are the cluster's own directories, one in each hierarchy.
type cgroups []string

// hierarchies are the roots of all mounted cgroup hierarchies, cgroup2 last.
func hierarchies() ([]string, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" && m.FSType != "cgroup2" || m.Root != "/", false
	})
	if err != nil {
		return nil, err
	}
	var out []string
	for _, m := range mounts {
		if !slices.Contains(out, m.Mountpoint) {
			out = append(out, m.Mountpoint)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted here: a kubelet needs them")
	}
	return out, nil
}

// makeCgroups makes the cluster's own; on an error it returns those it made.
func makeCgroups(name string) (cgroups, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var out cgroups
	for _, root := range roots {
		own := filepath.Join(root, name)
		for _, dir := range []string{own, filepath.Join(own, leaf)} {
			if err := os.Mkdir(dir, 0o755); err != nil {
				return out, fmt.Errorf("make the cluster's cgroup: %w", err)
			}
			if dir == own {
				out = append(out, own)
				delegate(root)
				delegate(own)
			}
			if err := inheritCPUs(dir); err != nil {
				return out, err
			}
		}
	}
	return out, nil
}

// delegate lets children of a cgroup2 directory have every controller there is;
// what is refused the kubelet names if it needs it.
func delegate(dir string) {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, controller := range strings.Fields(string(text)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644)
	}
}

// inheritCPUs fills in what a new directory of the cpuset hierarchy lacks.
func inheritCPUs(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		of := filepath.Join(dir, name)
		if text, err := os.ReadFile(of); err != nil || strings.TrimSpace(string(text)) != "" {
			continue // another hierarchy
		}
		if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err == nil {
			continue // cgroup2 inherits by itself
		}
		text, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(of, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func enterCgroups(name string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		if err := os.WriteFile(filepath.Join(root, name, leaf, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("enter the cluster's cgroup: %w", err)
		}
	}
	return nil
}

// remove removes the directories and all below; nobody is in them any more.
func (c cgroups) remove() error {
	var errs error
	for _, own := range c {
		var dirs []string
		err := filepath.WalkDir(own, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		slices.Reverse(dirs) // deepest first
		for _, dir := range dirs {
			err = errors.Join(err, removeCgroup(dir))
		}
		errs = errors.Join(errs, err)
	}
	return errs
}

// removeCgroup waits a little: a process leaves its cgroup just after its death.
func removeCgroup(dir string) error {
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(until) {
			inside, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			return fmt.Errorf("%w (processes in it: %q)", err, inside)
		}
	}
}
