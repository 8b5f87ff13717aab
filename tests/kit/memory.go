package kit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
)

// KernelMemory has what the kernel allocates for this process, its BPF objects and
// namespaces too, accounted apart from everybody else's until the tests end, and
// returns who reads how many bytes that are. The kernel accounts most of it, not
// all: no code that it compiles of programs, and nothing that counts per CPU.
func KernelMemory(t testing.TB) (read func() int64) {
	t.Helper()
	needWorld(t)
	file, parse := filepath.Join(world.cgroup, "memory.stat"), statKernel
	if _, err := os.Stat(file); err != nil {
		dir, err := ownMemoryCgroup()
		if err != nil {
			t.Fatal("the kernel's memory cannot be told from that of others: mount cgroup v1 with the memory controller, or enable it in the root of cgroup2:", err)
		}
		file, parse = filepath.Join(dir, "memory.kmem.usage_in_bytes"), strings.TrimSpace
	}
	return func() int64 {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.ParseInt(parse(string(text)), 10, 64)
		if err != nil {
			t.Fatalf("read %s: %v", file, err)
		}
		return n
	}
}

// statKernel is the line "kernel" of memory.stat.
func statKernel(text string) string {
	for line := range lines(text) {
		if value, ok := cut(line, "kernel "); ok {
			return value
		}
	}
	return "nothing is said of the kernel"
}

// ownMemoryCgroup moves this process to a cgroup of version 1 below the one that it
// is in, once.
func ownMemoryCgroup() (string, error) {
	world.Lock()
	defer world.Unlock()
	if world.memory != "" {
		return world.memory, nil
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" || !strings.Contains(","+m.VFSOptions+",", ",memory,"), false
	})
	if err != nil {
		return "", fmt.Errorf("look for the memory controller: %w", err)
	}
	path, err := cgroupPath(":memory:")
	if err != nil {
		return "", err
	}
	if len(mounts) == 0 {
		return "", errors.New("no memory controller is mounted")
	}
	home := filepath.Join(mounts[0].Mountpoint, path)
	dir := filepath.Join(home, filepath.Base(world.cgroup))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	world.memory = dir
	return dir, enter(dir)
}
