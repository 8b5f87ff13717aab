package install

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

// hosts are what installers of other plugins leave.
var hosts = []struct {
	name  string
	setUp func(n *node)
	file  string // that holds the entry afterwards
}{
	{"list", func(n *node) { n.write("10-calico.conflist", calico) }, "10-calico.conflist"},
	{"conf", func(n *node) { n.write("10-bridge.conf", bridge) }, "10-bridge.conflist"},
	{"json", func(n *node) { n.write("10-bridge.json", bridge); n.write("20-calico.conflist", calico) }, "10-bridge.conflist"},
	{"several", func(n *node) {
		n.write("10-calico.conflist", calico)
		n.write("05-cilium.conflist", cilium)
		n.write("00-readme", "{}")
		n.write("calico-kubeconfig", "x")
	}, "05-cilium.conflist"},
	{"a mode of its own", func(n *node) {
		n.write("10-calico.conflist", calico)
		n.chmod("10-calico.conflist", 0o600)
	}, "10-calico.conflist"},
	{"conf with a mode of its own", func(n *node) {
		n.write("10-bridge.conf", bridge)
		n.chmod("10-bridge.conf", 0o640)
	}, "10-bridge.conflist"},
	{"link to elsewhere", func(n *node) {
		n.write(n.root+"/calico.conflist", calico)
		n.symlink(n.root+"/calico.conflist", "10-calico.conflist")
	}, "10-calico.conflist"},
	{"link within the directory", func(n *node) {
		n.write("10-calico.conflist", calico)
		n.symlink("10-calico.conflist", "00-default.conflist")
	}, "00-default.conflist"},
	{"link to a conf", func(n *node) {
		n.write(n.root+"/bridge.conf", bridge)
		n.symlink("../../../bridge.conf", "10-bridge.conf")
	}, "10-bridge.conflist"},
	{"a broken file first", func(n *node) {
		n.write("01-broken.conflist", `{"name": `)
		n.age("01-broken.conflist")
		n.write("02-list-in-a.conf", calico)
		n.age("02-list-in-a.conf")
		n.write("10-calico.conflist", calico)
	}, "10-calico.conflist"},
}

func (n *node) chmod(name string, mode os.FileMode) {
	n.t.Helper()
	if err := os.Chmod(filepath.Join(n.conf, name), mode); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) symlink(target, name string) {
	n.t.Helper()
	if err := os.Symlink(target, filepath.Join(n.conf, name)); err != nil {
		n.t.Fatal(err)
	}
}

// age makes a file look finished.
func (n *node) age(name string) {
	n.t.Helper()
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(filepath.Join(n.conf, name), old, old); err != nil {
		n.t.Fatal(err)
	}
}

func TestInstallAndUninstallOnEveryHost(t *testing.T) {
	for _, host := range hosts {
		t.Run(host.name, func(t *testing.T) {
			n := newNode(t)
			host.setUp(n)
			before := n.snapshot()

			i := n.installer()
			n.wantReady(i, host.file)
			installed := n.snapshot()
			if got := installed["opt/cni/bin/sluice-cni"]; got != "-rwxr-xr-x the plugin, version 2\n" {
				t.Errorf("the binary is %q", got)
			}
			for name := range installed {
				if strings.Contains(name, tempPrefix) {
					t.Errorf("left over: %s", name)
				}
			}
			file, err := os.Lstat(filepath.Join(n.conf, host.file))
			if err != nil || !file.Mode().IsRegular() {
				t.Errorf("%s: %v, %v", host.file, file.Mode(), err)
			}

			n.wantReady(i, host.file)
			n.wantReady(n.installer(), host.file) // a new process
			n.wantSnapshot(installed, "a second and a third look change something")

			for range 2 {
				if err := i.Uninstall(); err != nil {
					t.Fatal(err)
				}
				n.wantSnapshot(before, "uninstalling does not give back what was there")
				n.wantNotReady(i.Status(), "withdrawn")
			}
			i.look(time.Now())
			n.wantSnapshot(before, "it was put back after Uninstall")
		})
	}
}

func TestModeAndOwnerArePreserved(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	path := filepath.Join(n.conf, "10-calico.conflist")
	n.chmod("10-calico.conflist", 0o604)
	uid := os.Geteuid()
	if uid == 0 { // otherwise it can only be our own
		uid = 12345
		if err := os.Chown(path, uid, 54321); err != nil {
			t.Fatal(err)
		}
	}
	defer syscall.Umask(syscall.Umask(0o077))
	n.wantReady(n.installer(), "10-calico.conflist")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Sys().(*syscall.Stat_t); info.Mode() != 0o604 || int(got.Uid) != uid {
		t.Errorf("mode %v, owner %d, want 0604 and %d", info.Mode(), got.Uid, uid)
	}
}

func TestAnUpgradeReplacesBinaryAndEntry(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	n.wantReady(n.installer(), "10-calico.conflist")
	n.write(n.plugin, "the plugin, version 3\n")
	i := n.installer()
	i.opts.Entry.Socket = "/run/sluice/v2.sock"
	n.wantReady(i, "10-calico.conflist")
	if got := n.snapshot()["opt/cni/bin/sluice-cni"]; !strings.Contains(got, "version 3") {
		t.Errorf("the binary is %q", got)
	}
	if text := n.read("10-calico.conflist"); strings.Count(text, "/run/sluice/v2.sock") != 1 || strings.Contains(text, "sluiced.sock") {
		t.Errorf("the entry is not the new one:\n%s", text)
	}
	if got := i.Status().Overwritten; got != 0 {
		t.Errorf("an upgrade counts as %d losses", got)
	}
}

func TestWhatIsNotOursStays(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	n.write(n.bin+"/sluice-cni", "somebody else's")
	before := n.snapshot()
	i := n.installer()
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	n.wantSnapshot(before, "Uninstall removed what is not Sluice's")

	// This test's binary is built from Sluice, of another version so to say.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	n.write(n.bin+"/sluice-cni", string(data))
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	if _, there := n.snapshot()["opt/cni/bin/sluice-cni"]; there {
		t.Error("another version's binary stays")
	}
}

func TestTheBinaryStaysWhileAnEntryDoes(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	i := n.installer()
	n.wantReady(i, "10-calico.conflist")
	i.opts.ConfDir = n.plugin // no directory: the entries cannot be removed
	if err := i.Uninstall(); err == nil {
		t.Fatal("Uninstall finds nothing wrong")
	}
	if _, there := n.snapshot()["opt/cni/bin/sluice-cni"]; !there {
		t.Error("the binary is gone, and the entry is not")
	}
}

// Calico was there, Cilium comes: Calico's file is given back.
func TestAnotherFileComesFirst(t *testing.T) {
	for _, old := range []struct{ name, text string }{{"10-calico.conflist", calico}, {"10-bridge.conf", bridge}} {
		n := newNode(t)
		n.write(old.name, old.text)
		i := n.installer()
		i.look(time.Now())
		n.write("05-cilium.conflist", cilium)
		n.wantReady(i, "05-cilium.conflist")
		if got := n.read(old.name); got != old.text {
			t.Errorf("%s is not as it was:\n%s", old.name, got)
		}
		if got := n.names(); got != "05-cilium.conflist "+old.name {
			t.Errorf("the directory holds %s", got)
		}
	}
}

// Given back under its old name, the stale file would come first again, and so
// on for ever.
func TestAFileThatWouldComeFirstIsNotGivenBack(t *testing.T) {
	n := newNode(t)
	n.write("10-bridge.conf", bridge)
	i := n.installer()
	n.wantReady(i, "10-bridge.conflist")
	n.write("10-bridge.conf.conf", bridge) // before 10-bridge.conflist, after 10-bridge.conf
	for range 3 {
		n.wantReady(i, "10-bridge.conf.conflist")
	}
	if conflist.Contains([]byte(n.read("10-bridge.conflist"))) {
		t.Error("the stale file keeps the entry")
	}
}

func TestLinksToTheChosenFileAndStrayFiles(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	n.symlink("10-calico.conflist", "20-alias.conflist")
	before := n.snapshot()
	n.write("50-sluice.conflist", `{"name":"n","plugins":[{"type":"sluice-cni"}]}`) // by hand
	i := n.installer()
	n.wantReady(i, "10-calico.conflist")
	n.wantReady(i, "10-calico.conflist")
	if got := n.snapshot()["etc/cni/net.d/20-alias.conflist"]; got != "link to 10-calico.conflist" {
		t.Errorf("the link is now %s", got)
	}
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	n.wantSnapshot(before, "after Uninstall")
}

// Multus writes 00-multus.conf anew, from a copy of the primary's file, while
// what was made of it is still there.
func TestMultusWritesItsFileAnew(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	i := n.installer()
	n.wantReady(i, "10-calico.conflist")
	withOurs := n.read("10-calico.conflist")
	delegating := strings.Replace(multus, `"name"`, `"delegates":[`+withOurs+`],"name"`, 1)
	for range 2 {
		n.write("00-multus.conf", delegating)
		n.wantReady(i, "00-multus.conflist")
		if n.read("10-calico.conflist") != calico || n.names() != "00-multus.conflist 10-calico.conflist" {
			t.Errorf("left: %v", n.snapshot())
		}
		if got := strings.Count(n.read("00-multus.conflist"), conflist.Type); got != 1 {
			t.Errorf("the entry stands there %d times", got)
		}
	}
	// Written anew while Sluice is being removed: the newer file counts.
	n.write("00-multus.conf", multus)
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	if n.read("00-multus.conf") != multus || n.names() != "00-multus.conf 10-calico.conflist" {
		t.Errorf("left: %v", n.snapshot())
	}
}

// Cilium puts other files aside and brings them back when it goes: with our
// entry in it, such a file would name a missing plugin.
func TestUninstallReachesCiliumsBackups(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	i := n.installer()
	n.wantReady(i, "10-calico.conflist")
	if err := os.Rename(n.conf+"/10-calico.conflist", n.conf+"/10-calico.conflist.cilium_bak"); err != nil {
		t.Fatal(err)
	}
	n.write("05-cilium.conflist", cilium)
	n.wantReady(i, "05-cilium.conflist")
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"etc/cni/net.d/05-cilium.conflist":            "-rw-r--r-- " + cilium,
		"etc/cni/net.d/10-calico.conflist.cilium_bak": "-rw-r--r-- " + calico,
	}
	if diff := cmp.Diff(want, n.snapshot()); diff != "" {
		t.Error(diff)
	}
}

func TestWhatWasAddedSinceStaysAtUninstall(t *testing.T) {
	n := newNode(t)
	n.write("10-bridge.conf", bridge)
	i := n.installer()
	n.wantReady(i, "10-bridge.conflist")
	n.write("10-bridge.conflist", strings.Replace(n.read("10-bridge.conflist"), "    {\n      \"type\": \"sluice", "    {\"type\": \"tuning\"},\n    {\n      \"type\": \"sluice", 1))
	n.wantReady(i, "10-bridge.conflist")
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	list, err := conflist.Parse([]byte(n.read("10-bridge.conflist")))
	if diff := cmp.Diff([]string{"bridge", "tuning"}, list.Types); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
}

func TestALinkWhoseFileChangedIsNotRestored(t *testing.T) {
	n := newNode(t)
	n.write(n.root+"/calico.conflist", calico)
	n.symlink(n.root+"/calico.conflist", "10-calico.conflist")
	i := n.installer()
	n.wantReady(i, "10-calico.conflist")
	n.write(n.root+"/calico.conflist", cilium)
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	if got := n.snapshot()["etc/cni/net.d/10-calico.conflist"]; got != "-rw-r--r-- "+calico {
		t.Errorf("left: %s", got)
	}
}

func TestNewRefusesRelativePaths(t *testing.T) {
	for _, o := range []Options{
		{ConfDir: "net.d", BinDir: "/b", Plugin: "/p"}, {ConfDir: "/c", Plugin: "/p"}, {ConfDir: "/c", BinDir: "/b", Plugin: "p"},
		{ConfDir: "/c", BinDir: "/b", Plugin: "/p", Entry: conflist.Entry{Extra: map[string]any{"f": func() {}}}},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("New takes %+v", o)
		}
	}
}
