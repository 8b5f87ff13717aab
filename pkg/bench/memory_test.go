package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// Sockets are the kernel's memory; they are charged to who makes them.
func TestTheMeterSeesWhatTheKernelTakesForUs(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("SLUICE_REQUIRE_ROOT") == "1" {
			t.Fatal("needs root, and SLUICE_REQUIRE_ROOT=1 says that it must run")
		}
		t.Skip("needs root")
	}
	const sockets = 2000
	root, err := kernel.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{cgroups: filepath.Join(root, fmt.Sprintf("sluice-bench-test-%d", os.Getpid()))}
	if err := os.Mkdir(n.cgroups, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeCgroup(n.cgroups); err != nil {
			t.Error(err)
		}
	})
	s := &stage{ctx: context.Background(), node: n, result: &Result{LeftOut: map[string]string{}}}
	t.Cleanup(func() { s.Close() })
	was, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.newMeter()
	if err != nil {
		t.Fatal(err)
	}
	if why := s.result.LeftOut[string(charged)]; why != "" {
		t.Skip("no memory cgroup to read here: " + why)
	}
	before, err := m.read()
	if err != nil {
		t.Fatal(err)
	}
	for range sockets {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
	}
	after, err := m.read()
	if err != nil {
		t.Fatal(err)
	}
	got := after.since(before, sockets)[charged]
	if len(got) != 1 || got[0] < 1<<10 || got[0] > 10<<10 {
		t.Errorf("a TCP socket is charged with %.0f bytes, want 1,024 to 10,240", got)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	is, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || string(is) != string(was) {
		t.Errorf("afterwards this process is in\n%s%v\nwas in\n%s", is, err, was)
	}
	if _, err := os.Stat(m.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", m.dir, err)
	}
}
