package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// In a cgroup namespace of its own, as a container has one, the daemon finds the
// true root beside it, and attaches there.
func TestADaemonInACgroupNamespaceFindsTheTrueRoot(t *testing.T) {
	n := newNode(t)
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
	n.startAs(func(cmd *exec.Cmd) {
		// The child is in the sub-cgroup before it makes its namespace.
		cmd.Args = append([]string{"unshare", "--cgroup", "--mount"}, cmd.Args...)
		cmd.Path, err = exec.LookPath("unshare")
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	}, "--cgroup", "").awaitReady()
	if err != nil {
		t.Fatal(err)
	}
	n.look(func(d *datapath.Datapath) {
		attached := d.Attached()
		if len(attached) < 10 {
			t.Errorf("attached are %v", attached)
		}
		for name, id := range attached {
			if id != 1 {
				t.Errorf("%s is attached to cgroup %d, and the root is 1", name, id)
			}
		}
	})
}
