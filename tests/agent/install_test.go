package agent

import (
	"bytes"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/conflist"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// chain is a node's network before Sluice.
const chain = `{
  "cniVersion": "1.0.0",
  "name": "net",
  "plugins": [
    { "type": "cilium-cni" }
  ]
}
`

// host are the directories of a container runtime.
type host struct {
	t                 *testing.T
	confDir, binDir   string
	conflist, plugged string
}

func newHost(t *testing.T) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, confDir: filepath.Join(dir, "net.d"), binDir: filepath.Join(dir, "bin")}
	h.conflist, h.plugged = filepath.Join(h.confDir, "10-net.conflist"), filepath.Join(h.binDir, "sluice-cni")
	for _, d := range []string{h.confDir, h.binDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.write(chain)
	return h
}

// flags make the daemon install there.
func (h *host) flags(more ...string) []string {
	return append([]string{"--cni-conf-dir", h.confDir, "--cni-bin-dir", h.binDir, "--cni-log-file", filepath.Join(h.binDir, "log")}, more...)
}

// write is another installer's.
func (h *host) write(text string) {
	h.t.Helper()
	temp := filepath.Join(h.confDir, "other.tmp")
	if err := os.WriteFile(temp, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(temp, h.conflist); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) text() string {
	h.t.Helper()
	text, err := os.ReadFile(h.conflist)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(text)
}

// entry is Sluice's in the chain; nil: there is none.
func (h *host) entry() *conflist.Entry {
	h.t.Helper()
	list, err := conflist.Parse([]byte(h.text()))
	if err != nil {
		h.t.Fatal(err)
	}
	return list.Ours
}

// isClean says whether the directories are as they were before.
func (h *host) isClean() {
	h.t.Helper()
	if diff := cmp.Diff(chain, h.text()); diff != "" {
		h.t.Error("the CNI configuration is not as it was: ", diff)
	}
	for _, dir := range []string{h.confDir, h.binDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != filepath.Base(h.conflist) && e.Name() != "log" {
				h.t.Errorf("%s is left in %s", e.Name(), dir)
			}
		}
	}
}

func TestThePluginIsInstalledOnceTheSocketIsServed(t *testing.T) {
	n, h := newNode(t), newHost(t)
	d := n.start(h.flags(selfFlags...)...)
	kit.Eventually(t, "the entry is there", func() bool { return h.entry() != nil })
	conn, err := net.Dial("unix", n.socket())
	if err != nil {
		t.Fatal("the plugin is called before its socket is served: ", err)
	}
	conn.Close()
	d.awaitReady()
	entry := h.entry()
	want := map[string]any{"bpffs": n.bpffs, "ownPod": map[string]any{"namespace": setNamespace, "prefix": setName + "-"}}
	if diff := cmp.Diff(want, entry.Extra); diff != "" || entry.Socket != n.socket() || entry.StateFile != agentapi.StatePath(n.dir) {
		t.Errorf("the entry is %+v: %s", entry, diff)
	}
	shipped, err := os.ReadFile(filepath.Join(bin, "sluice-cni"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(h.plugged); err != nil || !bytes.Equal(got, shipped) {
		t.Error("the plugin is not the shipped one:", err)
	}
	if metrics := d.get("/metrics"); !strings.Contains(metrics, "\nsluice_cni_installed 1\n") {
		t.Error("metrics do not say that it is installed")
	}
	kit.Eventually(t, "an Event says so", func() bool { return n.api.told("PluginInstalled", h.conflist) })

	if err := os.Remove(h.plugged); err != nil {
		t.Fatal(err)
	}
	h.write(chain)
	kit.Eventually(t, "both are put back", func() bool {
		_, err := os.Stat(h.plugged)
		return err == nil && h.entry() != nil
	})
	d.kill()
	if h.entry() == nil {
		t.Error("the entry has gone with the daemon")
	}
}

func TestWhoOverwritesTheEntryAgainAndAgainIsNamed(t *testing.T) {
	n, h := newNode(t), newHost(t)
	d := n.start(h.flags(selfFlags...)...).awaitReady()
	for range 3 {
		kit.Eventually(t, "the entry is there", func() bool { return h.entry() != nil })
		h.write(chain)
	}
	const remedy = "cni.exclusive=false"
	kit.Eventually(t, "readiness names the other's setting", func() bool {
		status, text := d.readyz()
		return status == http.StatusServiceUnavailable && strings.Contains(text, "cni: "+h.conflist) && strings.Contains(text, remedy)
	})
	kit.Eventually(t, "an Event does too", func() bool { return n.api.told("PluginNotInstalled", remedy) })
	if metrics := d.get("/metrics"); !strings.Contains(metrics, "\nsluice_cni_installed 0\n") || !strings.Contains(metrics, "\nsluice_cni_overwritten_total 3\n") {
		t.Error("metrics do not say how often it was overwritten")
	}
	kit.Eventually(t, "it is put back after a while", func() bool { return h.entry() != nil })
	if status, _ := d.readyz(); status != http.StatusServiceUnavailable {
		t.Error("ready at once, as if that would last")
	}
}

func TestWhereSluiceCannotWorkItsEntryIsTakenOut(t *testing.T) {
	for name, c := range map[string]struct {
		flags  func(n *node) []string
		reason string
	}{
		"a cgroup whose processes are others": {
			func(n *node) []string { return []string{"--cgroup", otherCgroup(n.t)} },
			"is not the true root of cgroup2, and this process is not seen to be below it: nothing can show that programs there see any pod. Mount the host's cgroup2 (in a pod: as a hostPath) and give its root with --cgroup",
		},
		"no cgroup2": {
			func(n *node) []string { return []string{"--cgroup", n.dir} }, "is not a cgroup2 directory: give one below a cgroup2 mount",
		},
		"no bpffs": {
			func(n *node) []string { return []string{"--bpffs", filepath.Join(n.dir, "pins")} },
			"is not on a bpffs: mount one on an empty directory (mount -t bpf bpf DIR; in a pod, mount the host's /sys/fs/bpf as a hostPath)",
		},
	} {
		t.Run(name, func(t *testing.T) {
			n, h := newNode(t), newHost(t)
			first := n.start(h.flags(selfFlags...)...).awaitReady()
			first.end()
			if h.entry() == nil {
				t.Fatal("the entry is gone, and nobody has said why")
			}
			n.down() // a reboot
			d := n.start(h.flags(append(c.flags(n), selfFlags...)...)...)
			kit.Eventually(t, "readiness says why", func() bool {
				status, text := d.readyz()
				return status == http.StatusServiceUnavailable && strings.Contains(text, c.reason)
			})
			kit.Eventually(t, "the entry is taken out", func() bool { return h.entry() == nil })
			kit.Eventually(t, "an Event says why", func() bool { return n.api.told("DatapathDown", c.reason) })
			if diff := cmp.Diff(chain, h.text()); diff != "" {
				t.Error("the CNI configuration is not as it was: ", diff)
			}
		})
	}
}

// Where an older release's programs still redirect, pods go on needing the plugin.
func TestAnEarlierDatapathThatWorksKeepsTheEntry(t *testing.T) {
	n, h := newNode(t), newHost(t)
	p := kit.NewPod(t)
	_, to := direct(t, p)
	n.start(h.flags()...).awaitReady().end()
	d := n.start(h.flags("--cgroup", "")...) // the root, where the programs are not
	kit.Eventually(t, "it is not ready", func() bool {
		status, text := d.readyz()
		return status == http.StatusServiceUnavailable && strings.Contains(text, "is attached to cgroup")
	})
	n.mustAdd(p, "cart", "u1", injected())
	goesTo(t, p, p.Listen(kit.Proxy, "0.0.0.0:15001"), to)
	d.end()
	if h.entry() == nil {
		t.Error("the entry is gone, and the next pod of the mesh starts outside")
	}
}

// otherCgroup is one that the tests' processes are not in.
func otherCgroup(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(kit.Cgroup(t), "others")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kit.Eventually(t, dir+" is empty", func() bool { return os.Remove(dir) == nil }) })
	return dir
}

// end ends it as the kubelet does, and wants it to end well.
func (d *daemon) end() {
	d.t.Helper()
	if d.ended {
		return
	}
	d.ended = true
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil {
		d.t.Fatal(err)
	}
	if err := d.cmd.Wait(); err != nil {
		d.t.Error("the daemon ends with", err)
	}
}
