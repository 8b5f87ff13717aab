package script

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// contained runs "sluicectl up" in a cgroup namespace of its own, below a
// sub-cgroup, as a container has it. With fresh, its mount namespace has no other
// cgroup2 than one mounted from inside.
func contained(t *testing.T, dir string, fresh bool, args ...string) (string, error) {
	t.Helper()
	root, err := kernel.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(kit.Cgroup(t), "contained")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kit.Eventually(t, sub+" is empty", func() bool { return os.Remove(sub) == nil }) })
	cgroup, err := os.Open(sub)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	script := `exec sluicectl up --bpffs "$0" "$@"`
	if fresh {
		script = `umount -l ` + root + ` && mount -t cgroup2 none ` + root + ` && ` + script
	}
	// The child is in the sub-cgroup before it makes its namespaces.
	cmd := exec.Command("unshare", append([]string{"--cgroup", "--mount", "sh", "-c", script, dir}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	t.Cleanup(func() {
		if _, err := datapath.Down(dir); err != nil {
			t.Error("down:", err)
		}
	})
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestUpInACgroupNamespaceRefusesAMountThatShowsOnlyItself(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "inside")
	out, err := contained(t, dir, true)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("it ends with %v, want exit status 1", err)
	}
	if !strings.Contains(out, "shows only the cgroup of this container or cgroup namespace") || !strings.Contains(out, "--cgroup") || strings.Count(out, "\n") != 1 {
		t.Errorf("it says %q", out)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it leaves %s", dir)
	}
}

// The mount of the machine is there as well: the true root is found by its
// inode, not by what mountinfo calls "/".
func TestUpInACgroupNamespaceFindsTheTrueRoot(t *testing.T) {
	root, err := kernel.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(kit.BPFFS(t), "inside")
	out, err := contained(t, dir, false)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d, err := datapath.Open(datapath.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	attached := d.Attached()
	if len(attached) < 10 {
		t.Errorf("attached are %v", attached)
	}
	for name, cgroup := range attached {
		if cgroup != 1 {
			t.Errorf("%s is attached to cgroup %d; the root %s is 1", name, cgroup, root)
		}
	}
	// It sees somebody who is not below the sub-cgroup.
	p := kit.NewPod(t)
	p.Enroll(d)
	if _, err := p.Dial(kit.App, unix.AF_INET, kitAddr(80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("without a proxy the dial ends with %v, want ECONNREFUSED", err)
	}
	if n := p.Stat(d, "captured-out"); n != 1 {
		t.Errorf("captured-out is %d, want 1", n)
	}
}

// Told to attach to the container's own cgroup, it does as it is told only if
// it can prove that it sees itself there.
func TestUpOnItsOwnCgroupSeesItself(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "inside")
	sub := filepath.Join(kit.Cgroup(t), "contained")
	if out, err := contained(t, dir, false, "--cgroup", sub); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
