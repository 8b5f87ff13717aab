package agent

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/ctl"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// ctl runs sluicectl on this node, and wants it to end so and to say so.
func (n *node) ctl(well bool, says string, args ...string) {
	n.t.Helper()
	var out bytes.Buffer
	exit := ctl.Run(ctl.Env{Out: &out, Err: &out}, append([]string{"--bpffs", n.bpffs, "--run-dir", n.dir}, args...))
	if well != (exit == 0) || !strings.Contains(out.String(), says) {
		n.t.Errorf("sluicectl %v ends with %d and says %q, not %q", args, exit, out.String(), says)
	}
}

func TestSluicectlLeavesADaemonsNodeAlone(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	_, to := direct(t, p)
	d := n.start().awaitReady()
	n.mustAdd(p, "cart", "u1", injected())
	proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
	goesTo(t, p, proxy, to)
	netns := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.Fd())
	owner := "this node belongs to the daemon sluiced (process " + strconv.Itoa(d.cmd.Process.Pid) + " on "
	for _, args := range [][]string{
		{"up", "--cgroup", kit.Cgroup(t)}, {"enroll", "--netns", netns}, {"unenroll", "--netns", netns},
		{"watch"}, {"refresh", "--all"}, {"down"},
	} {
		n.ctl(false, owner, args...)
	}
	goesTo(t, p, proxy, to)
	n.ctl(true, "shop/cart", "pods") // to look is free
	n.ctl(true, "captured-out", "stats")
	n.ctl(true, "outbound", "rules")
	if status, text := d.readyz(); status != http.StatusOK {
		t.Error("the daemon is not ready: ", text)
	}
	d.kill()
	n.ctl(true, "is not enrolled any more", "unenroll", "--netns", netns) // nobody owns it
}

func TestDownNowTakesTheDaemonDownToo(t *testing.T) {
	n, h := newNode(t), newHost(t)
	p := kit.NewPod(t)
	server, to := direct(t, p)
	d := n.start(h.flags()...).awaitReady()
	n.mustAdd(p, "cart", "u1", injected())
	p.Hold(kit.App)
	goesTo(t, p, p.Listen(kit.Proxy, "0.0.0.0:15001"), to)
	n.ctl(true, "does nothing more until it is restarted", "down", "--now")
	goesTo(t, p, server, to)
	h.isClean()
	n.isDown()
	kit.Eventually(t, "readiness says why", func() bool {
		status, text := d.readyz()
		return status == http.StatusServiceUnavailable && strings.Contains(text, `taken down by "sluicectl down --now": restart this pod`)
	})
	n.ctl(true, "Sluice was not up", "down") // it is nobody's any more
	d.end()
	h.isClean()
	n.start(h.flags()...).awaitReady().kill()
	if h.entry() == nil {
		t.Error("a restarted daemon has not put the entry back")
	}
	n.ctl(true, "Sluice is down", "down") // the owner is dead
	h.isClean()
}

func TestDownRemovesThePluginOfADaemonThatHasEnded(t *testing.T) {
	for name, end := range map[string]func(*daemon){"by SIGTERM": (*daemon).end, "by SIGKILL": (*daemon).kill} {
		t.Run(name, func(t *testing.T) {
			n, h := newNode(t), newHost(t)
			p := kit.NewPod(t)
			server, to := direct(t, p)
			d := n.start(h.flags()...).awaitReady()
			n.mustAdd(p, "cart", "u1", injected())
			p.Hold(kit.App)
			goesTo(t, p, p.Listen(kit.Proxy, "0.0.0.0:15001"), to)
			end(d)
			if h.entry() == nil {
				t.Fatal("the entry has gone with the daemon")
			}
			n.ctl(true, "Sluice was not up", "down", "--bpffs", n.bpffs+"-other")
			if h.entry() == nil {
				t.Error("the entry of another Sluice is gone")
			}
			n.ctl(true, "No CNI plugin of sluiced, which does not run, is left in "+h.confDir+" and "+h.binDir+".\nSluice is down", "down", "--bpffs", n.bpffs+"/") // the same directory
			goesTo(t, p, server, to)
			h.isClean()
			n.isDown()
			n.isGone()
			n.ctl(true, "Sluice was not up", "down")
		})
	}
}

func TestDownRemovesNothingWhereTheEntryMustStay(t *testing.T) {
	n, h := newNode(t), newHost(t)
	n.start(h.flags()...).awaitReady().end()
	entry := h.text()
	if err := unix.Mount(h.confDir, h.confDir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(h.confDir, unix.MNT_DETACH) })
	if err := unix.Mount("", h.confDir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	n.ctl(false, "read-only", "down")
	n.look(func(*datapath.Datapath) {}) // it is up
	if _, err := os.Stat(h.plugged); err != nil || h.text() != entry {
		t.Error("the plugin is gone and its entry is not:", err)
	}
}

func TestDownNamesWhatADaemonMayHaveLeftElsewhere(t *testing.T) {
	n, h := newNode(t), newHost(t)
	n.start(h.flags()...).awaitReady().end()
	for _, tt := range []struct {
		cni  *agentapi.CNI
		says string
	}{
		{nil, "does not tell where it installs the plugin. If its entry is left in the CNI configuration (/etc/cni/net.d, usually), take that out and then remove the plugin"},
		{&agentapi.CNI{ConfDir: "/nowhere/net.d", BinDir: "/nowhere/bin"}, "is not visible here. If its entry is left in the CNI configuration (/nowhere/net.d), take that out and then remove the plugin sluice-cni (/nowhere/bin)"},
	} {
		text, err := agentapi.State{BPFFS: n.bpffs, CNI: tt.cni}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(agentapi.StatePath(n.dir), text, 0o600); err != nil {
			t.Fatal(err)
		}
		n.ctl(true, tt.says, "down")
		if h.entry() == nil {
			t.Error("the entry is gone")
		}
	}
}

func TestDownNowSaysWhatToDoAboutADaemonThatDoesNotAnswer(t *testing.T) {
	n := newNode(t)
	d := n.start().awaitReady()
	if err := os.Remove(n.socket()); err != nil {
		t.Fatal(err)
	}
	n.ctl(false, "the node daemon does not answer at "+n.socket()+": no such file or directory; end it first", "down", "--now")
	d.end()
	n.ctl(true, "Sluice is down", "down", "--now")
}
