package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestReasonsNameTheFileAndTheRemedy(t *testing.T) {
	for name, test := range map[string]struct {
		setUp func(n *node, i *Installer)
		words []string
	}{
		"no configuration directory": {func(n *node, _ *Installer) { n.removeAll(n.conf) }, []string{"/etc/cni/net.d does not exist", "waiting"}},
		"no binary directory":        {func(n *node, _ *Installer) { n.removeAll(n.bin) }, []string{"/opt/cni/bin does not exist"}},
		"no configuration":           {func(*node, *Installer) {}, []string{"no CNI configuration in", "waiting"}},
		"nothing valid": {func(n *node, _ *Installer) {
			n.write("10-calico.conflist", strings.Replace(calico, `"type": "calico"`, `"type": }`, 1))
			n.age("10-calico.conflist")
		}, []string{"10-calico.conflist", "line 6"}},
		"half-written": {func(n *node, _ *Installer) {
			n.write("10-calico.conflist", calico[:len(calico)/2])
			n.write("20-cilium.conflist", cilium)
		}, []string{"10-calico.conflist", "just been written"}},
		"a link to nowhere": {func(n *node, _ *Installer) {
			n.symlink("/nowhere/calico.conflist", "10-calico.conflist")
			n.write("20-cilium.conflist", cilium)
		}, []string{"10-calico.conflist", "symbolic link to /nowhere/calico.conflist", "mount that directory"}},
		"plugins in a folder": {func(n *node, _ *Installer) {
			n.write("10-folder.conflist", `{"name":"folder","cniVersion":"1.1.0"}`)
			if err := os.Mkdir(n.conf+"/folder", 0o755); err != nil {
				n.t.Fatal(err)
			}
			n.write("20-cilium.conflist", cilium)
		}, []string{"10-folder.conflist", "the folder folder"}},
		"somebody's list beside a conf": {func(n *node, _ *Installer) {
			n.write("10-net.conf", bridge)
			n.write("10-net.conflist", calico)
		}, []string{"10-net.conf,", "10-net.conflist", "remove one of them"}},
		"only Sluice in a conf": {func(n *node, _ *Installer) {
			n.write("10-sluice.conf", `{"name":"n","type":"sluice-cni"}`)
		}, []string{"10-sluice.conf", "nothing but Sluice"}},
		"only Sluice in a list": {func(n *node, _ *Installer) {
			n.write("10-sluice.conflist", `{"name":"n","plugins":[{"type":"sluice-cni"}]}`)
		}, []string{"10-sluice.conflist", "nothing but Sluice"}},
		"a pipe": {func(n *node, _ *Installer) {
			if err := syscall.Mkfifo(n.conf+"/10-pipe.conflist", 0o644); err != nil {
				n.t.Fatal(err)
			}
			old := time.Now().Add(-time.Hour)
			if err := os.Chtimes(n.conf+"/10-pipe.conflist", old, old); err != nil {
				n.t.Fatal(err)
			}
		}, []string{"10-pipe.conflist", "empty"}},
		"no plugin in the image": {func(n *node, _ *Installer) { n.removeAll(n.plugin) }, []string{"not in this image"}},
		"not to be written": {func(_ *node, i *Installer) { i.opts.BinDir = "/proc/sys" }, // nobody can make a file there
			[]string{"write /proc/sys/sluice-cni"}},
		"a directory in the binary's place": {func(n *node, _ *Installer) {
			if err := os.MkdirAll(n.bin+"/sluice-cni/x", 0o755); err != nil {
				n.t.Fatal(err)
			}
		}, []string{"write", "/opt/cni/bin/sluice-cni"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			i := n.installer()
			test.setUp(n, i)
			before := n.snapshot()
			i.look(time.Now())
			n.wantNotReady(i.Status(), test.words...)
			after := n.snapshot()
			delete(after, "opt/cni/bin/sluice-cni") // comes first
			delete(before, "opt/cni/bin/sluice-cni")
			if fmt.Sprint(before) != fmt.Sprint(after) {
				t.Errorf("files changed:\n%v\n%v", before, after)
			}
		})
	}
}

func (n *node) removeAll(path string) {
	n.t.Helper()
	if err := os.RemoveAll(path); err != nil {
		n.t.Fatal(err)
	}
}

func TestAdviceGoesWithTheError(t *testing.T) {
	for errno, word := range map[syscall.Errno]string{
		syscall.EROFS: "writable", syscall.EACCES: "SELinux", syscall.EPERM: "root", syscall.ENOSPC: "space",
	} {
		err := advise(&os.PathError{Op: "open", Path: "/x", Err: errno})
		if !errors.Is(err, errno) || !strings.Contains(err.Error(), word) {
			t.Errorf("%v: %v", errno, err)
		}
	}
}

// A file that stays broken is skipped, as CRI-O does; containerd starts no pod
// then whatever Sluice does.
func TestAHalfWrittenFileIsWaitedForAWhile(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico[:40])
	n.write("20-cilium.conflist", cilium)
	i := n.installer()
	now := time.Now()
	again := i.look(now)
	n.wantNotReady(i.Status(), "10-calico.conflist")
	if again <= 0 || again > i.time.settle {
		t.Errorf("the next look is after %v", again)
	}
	i.look(now.Add(i.time.settle + time.Second))
	if s := i.Status(); !s.Ready || filepath.Base(s.File) != "20-cilium.conflist" {
		t.Errorf("%+v", s)
	}
	n.write("10-calico.conflist", calico)
	n.wantReady(i, "10-calico.conflist")
	if n.read("20-cilium.conflist") != cilium {
		t.Error("the other file keeps the entry")
	}
}

// The other installer writes while Sluice edits what it read before.
func TestNoUpdateIsLost(t *testing.T) {
	for _, file := range []struct{ name, text, result, step string }{
		{"10-calico.conflist", calico, "10-calico.conflist", "fill the file for 10-calico.conflist"},
		{"10-bridge.conf", bridge, "10-bridge.conflist", "fill the file for 10-bridge.conflist"},
		{"10-bridge.conf", bridge, "10-bridge.conflist", "rename 10-bridge.conflist"},
	} {
		n := newNode(t)
		n.write(file.name, file.text)
		i := n.installer()
		newer := strings.Replace(strings.Replace(file.text, `"type": "calico"`, `"type": "newer"`, 1), `"type": "bridge"`, `"type": "newer"`, 1)
		written := false
		i.disk.step = func(what string) {
			if written || what != file.step {
				return
			}
			written = true
			n.write(file.name, newer)
			n.age(file.name) // a time that differs for sure
		}
		i.look(time.Now())
		if i.Status().Ready {
			t.Errorf("%s: ready, having missed a change", file.name)
		}
		n.wantReady(i, file.result)
		if !written || !strings.Contains(n.read(file.result), `"type": "newer"`) {
			t.Errorf("%s: the newer contents are lost:\n%s", file.name, n.read(file.result))
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// The host removes the directory that is mounted here, and makes another.
func TestAMountOfARemovedDirectory(t *testing.T) {
	n := newNode(t)
	dir, err := os.Open(n.conf)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	i := n.installer()
	i.opts.ConfDir = fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	i.look(time.Now())
	n.wantNotReady(i.Status(), "waiting")
	n.removeAll(n.conf)
	i.look(time.Now())
	n.wantNotReady(i.Status(), "removed on the host", "restart this pod")
}

var errKilled = errors.New("killed")

// crash calls f and has it end at the nth change of the disk, as kill -9 would:
// nothing of Sluice's cleans up by defer. It says whether f got that far.
func crash(i *Installer, nth int, f func()) (killed bool) {
	i.disk.step = func(string) {
		if nth--; nth == 0 {
			panic(errKilled)
		}
	}
	defer func() {
		if r := recover(); r != nil {
			if r != errKilled { //nolint:errorlint // the very value
				panic(r)
			}
			killed = true
		}
	}()
	f()
	return false
}

func (n *node) installerWithoutSync() *Installer {
	i := n.installer()
	i.disk.noSync = true
	return i
}

func TestKilledAtAnyStep(t *testing.T) {
	for _, host := range hosts {
		t.Run(host.name, func(t *testing.T) {
			steps := map[string]int{}
			for _, verb := range []string{"install", "upgrade", "uninstall"} {
				for nth := 1; ; nth++ {
					n := newNode(t)
					host.setUp(n)
					before := n.snapshot()
					i := n.installerWithoutSync()
					if verb != "install" {
						n.wantReady(i, host.file)
						i = n.installerWithoutSync()
					}
					act := func() { i.look(time.Now()) }
					switch verb {
					case "upgrade":
						n.write(n.plugin, "the plugin, version 3\n")
						i.opts.Entry.Socket = "/run/v3.sock"
					case "uninstall":
						act = func() { _ = i.Uninstall() }
					}
					if !crash(i, nth, act) {
						steps[verb] = nth - 1
						break
					}
					// Whoever starts next ends with the same host.
					next := n.installerWithoutSync()
					next.opts.Entry = i.opts.Entry
					n.wantReady(next, host.file)
					n.wantNoLeftovers(verb, nth)
					if err := n.installerWithoutSync().Uninstall(); err != nil {
						t.Fatal(err)
					}
					n.wantSnapshot(before, fmt.Sprintf("killed at step %d of %s", nth, verb))

					// Or uninstalls at once.
					n = newNode(t)
					host.setUp(n)
					i = n.installerWithoutSync()
					if verb != "install" {
						n.wantReady(i, host.file)
					}
					if act = func() { i.look(time.Now()) }; verb == "uninstall" {
						act = func() { _ = i.Uninstall() }
					}
					crash(i, nth, act)
					if err := n.installerWithoutSync().Uninstall(); err != nil {
						t.Fatal(err)
					}
					n.wantNoLeftovers(verb, nth)
				}
			}
			for verb, n := range steps {
				if n < 3 {
					t.Errorf("%s has %d steps: are they still told?", verb, n)
				}
			}
		})
	}
}

func (n *node) wantNoLeftovers(verb string, step int) {
	n.t.Helper()
	for name := range n.snapshot() {
		if strings.Contains(name, tempPrefix) {
			n.t.Errorf("%s, killed at step %d, leaves %s", verb, step, name)
		}
	}
}
