package kernel

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDirectoriesAreJudgedByWhatTheKernelSays(t *testing.T) {
	plain := t.TempDir()
	for _, tt := range []struct {
		name, want string
		err        error
	}{
		{"a plain directory as cgroup2", plain + " is not a cgroup2 directory: give one", IsCgroup2(plain)},
		{"nothing as cgroup2", "cgroup directory /nowhere: no such file", IsCgroup2("/nowhere")},
		{"a plain directory as bpffs", plain + " is not on a bpffs: mount one (mount -t bpf bpf " + plain + ")", IsBPFFS(plain)},
		{"a directory with something in it as bpffs", "/proc/self is not on a bpffs: give a directory on one with --bpffs", IsBPFFS("/proc/self")},
		{"nothing as bpffs", "bpffs directory /nowhere: no such file", IsBPFFS("/nowhere")},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, tt.err, tt.want)
		}
	}
	if IsCgroupRoot(plain) || IsCgroupRoot("/nowhere") {
		t.Error("a plain directory is the root of cgroup2")
	}
}

func TestOnlyTheTrueRootOfCgroup2IsIt(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("SLUICE_REQUIRE_ROOT") == "1" {
			t.Fatal("needs root, and SLUICE_REQUIRE_ROOT=1 says that it must run")
		}
		t.Skip("needs root")
	}
	root, err := CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	if !IsCgroupRoot(root) {
		t.Errorf("%s is found and is not it", root)
	}
	below := filepath.Join(root, "sluice-kernel-test-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(below)
	if IsCgroupRoot(below) {
		t.Error("a cgroup below is it too")
	}
	if err := IsCgroup2(below); err != nil {
		t.Error(err)
	}
}

func TestMountedBPFFSIsOne(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("SLUICE_REQUIRE_ROOT") == "1" {
			t.Fatal("needs root, and SLUICE_REQUIRE_ROOT=1 says that it must run")
		}
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := MountBPFFS(dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := IsBPFFS(dir); err != nil {
		t.Error(err)
	}
	if err := MountBPFFS(filepath.Join(dir, "nowhere")); err == nil {
		t.Error("mounting on nothing succeeds")
	}
}
