// Package kernel finds what Sluice stands on: the true root of cgroup2 and a
// real bpffs. It judges by what the kernel says of a directory, never by its
// path.
package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// ErrNoCgroup2 is returned where the root of cgroup2 cannot be seen.
var ErrNoCgroup2 = errors.New("the root of cgroup2 is not visible here")

// ErrNoBPFFS is returned where pins cannot be made.
var ErrNoBPFFS = errors.New("is not on a bpffs")

// CgroupRoot returns the directory of the true root of cgroup2. Inside a
// container a cgroup2 mount shows the container's own cgroup as "/": a program
// attached there sees nobody, and says nothing. Only the true root has inode
// number 1 and no cgroup.type file.
func CgroupRoot() (string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return "", fmt.Errorf("read the mount table: %w", err)
	}
	var seen []string
	for _, m := range mounts {
		if IsCgroupRoot(m.Mountpoint) {
			return m.Mountpoint, nil
		}
		seen = append(seen, m.Mountpoint)
	}
	if len(seen) == 0 {
		return "", fmt.Errorf("%w: no cgroup2 is mounted. On the machine itself, mount it (mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified) or give a directory of it with --cgroup; in a pod, mount the host's as a hostPath", ErrNoCgroup2)
	}
	return "", fmt.Errorf("%w: %s shows only the cgroup of this container or cgroup namespace, and programs attached there would see no other process. Run on the machine itself, or mount the host's /sys/fs/cgroup (in a pod: as a hostPath) and give it with --cgroup", ErrNoCgroup2, strings.Join(seen, " and "))
}

// IsCgroupRoot says whether dir is the true root of cgroup2.
func IsCgroupRoot(dir string) bool {
	var st unix.Stat_t
	if IsCgroup2(dir) != nil || unix.Stat(dir, &st) != nil || st.Ino != 1 {
		return false
	}
	_, err := os.Stat(filepath.Join(dir, "cgroup.type"))
	return errors.Is(err, os.ErrNotExist)
}

// IsInside says whether this process is in dir or below it. False may mean that
// it cannot be told (in a cgroup namespace of its own, for one).
func IsInside(dir string) bool {
	if IsCgroupRoot(dir) {
		return true // everybody is
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	root, rootErr := CgroupRoot()
	var want unix.Stat_t
	if err != nil || rootErr != nil || unix.Stat(dir, &want) != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		for ok && path != "/" && path != "." {
			var st unix.Stat_t
			if unix.Stat(filepath.Join(root, path), &st) == nil && st.Ino == want.Ino {
				return true
			}
			path = filepath.Dir(path)
		}
	}
	return false
}

// IsCgroup2 returns nil if dir is a directory of a cgroup2 file system, else a
// sentence.
func IsCgroup2(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("cgroup directory %s: %w; give an existing directory below a cgroup2 mount (\"mount -t cgroup2\" lists them)", dir, err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is not a cgroup2 directory: give one below a cgroup2 mount (\"mount -t cgroup2\" lists them)", dir)
	}
	return nil
}

// IsBPFFS returns nil if dir is on a bpffs, else a sentence.
func IsBPFFS(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("bpffs directory %s: %w", dir, err)
	}
	if uint32(fs.Type) == unix.BPF_FS_MAGIC {
		return nil
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 { // a mount would hide them
		return fmt.Errorf("%s %w: give a directory on one with --bpffs (\"mount -t bpf\" lists them); in a pod, mount the host's /sys/fs/bpf as a hostPath", dir, ErrNoBPFFS)
	}
	return fmt.Errorf("%s %w: mount one (mount -t bpf bpf %s) or give another directory with --bpffs; in a pod, mount the host's /sys/fs/bpf as a hostPath", dir, ErrNoBPFFS, dir)
}

// BPFFSMounts are the directories where a bpffs is mounted, as far as they are
// visible here.
func BPFFSMounts() (out []string) {
	mounts, _ := mountinfo.GetMounts(mountinfo.FSTypeFilter("bpf"))
	for _, m := range mounts {
		out = append(out, m.Mountpoint)
	}
	return out
}

// MountBPFFS mounts a bpffs on dir, which must exist.
func MountBPFFS(dir string) error {
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs on %s: %w", dir, err)
	}
	return nil
}
