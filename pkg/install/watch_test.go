package install

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

// Each test of Run relies on events alone: resync is an hour.

func TestRunWaitsForTheNodesPlugin(t *testing.T) {
	n := newNode(t)
	n.removeAll(n.root + "/etc")
	n.removeAll(n.root + "/opt")
	i := n.installer()
	defer n.run(i)()
	waitingFor := func(what string) {
		n.t.Helper()
		n.await("a reason with "+what, func() bool { return strings.Contains(i.Status().Reason, what) })
	}
	waitingFor("/opt/cni/bin does not exist")
	if err := os.MkdirAll(n.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	waitingFor("/etc/cni/net.d does not exist")
	if err := os.MkdirAll(n.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	waitingFor("no CNI configuration")
	n.write("10-calico.conflist", calico)
	n.awaitReady(i, "10-calico.conflist")
}

func TestRunPutsBackWhatOthersTake(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	i := n.installer()
	i.time.tolerated = 100
	i.setTiming(i.time)
	defer n.run(i)()
	n.awaitReady(i, "10-calico.conflist")

	hasBinary := func() bool {
		return n.snapshot()["opt/cni/bin/sluice-cni"] == "-rwxr-xr-x the plugin, version 2\n"
	}
	hasEntry := func() bool {
		data, err := os.ReadFile(n.conf + "/10-calico.conflist")
		return err == nil && conflist.Contains(data)
	}
	for what, act := range map[string]func(){
		"overwritten in place": func() { n.write("10-calico.conflist", calico) },
		"replaced by a rename": func() {
			n.write("calico.new", calico)
			n.rename(n.conf+"/calico.new", n.conf+"/10-calico.conflist")
		},
		"gone and come again": func() {
			n.removeAll(n.conf + "/10-calico.conflist")
			n.write("10-calico.conflist", calico)
		},
		"written in two parts": func() {
			n.write("10-calico.conflist", calico[:50])
			n.write("10-calico.conflist", calico)
		},
		"binary removed":     func() { n.removeAll(n.bin + "/sluice-cni") },
		"binary overwritten": func() { n.write(n.bin+"/sluice-cni", "the plugin, version X\n") },
		"binary's mode": func() {
			if err := os.Chmod(n.bin+"/sluice-cni", 0o644); err != nil {
				t.Fatal(err)
			}
		},
		"directory made anew": func() {
			n.rename(n.conf, n.root+"/old")
			if err := os.Mkdir(n.conf, 0o755); err != nil {
				t.Fatal(err)
			}
			n.write("10-calico.conflist", calico)
			n.removeAll(n.root + "/old")
		},
	} {
		for range 2 { // the second time, what was put back is watched too
			act()
			n.await(what, func() bool { return hasBinary() && hasEntry() && i.Status().Ready })
		}
	}
}

func (n *node) rename(from, to string) {
	n.t.Helper()
	if err := os.Rename(from, to); err != nil {
		n.t.Fatal(err)
	}
}

func TestRunSaysSoWhenTheConfigurationGoes(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	i := n.installer()
	defer n.run(i)()
	n.awaitReady(i, "10-calico.conflist")
	n.removeAll(n.conf + "/10-calico.conflist")
	n.await("not ready", func() bool { return strings.Contains(i.Status().Reason, "no CNI configuration") })
}

func TestWithdrawWhileRunning(t *testing.T) {
	n := newNode(t)
	n.write("10-bridge.conf", bridge)
	i := n.installer()
	stop := n.run(i)
	n.awaitReady(i, "10-bridge.conflist")
	if err := i.Uninstall(); err != nil {
		t.Fatal(err)
	}
	n.write("11-more.conflist", calico) // an event: Run looks, and leaves it alone
	stop()
	if n.read("10-bridge.conf") != bridge || n.read("11-more.conflist") != calico || exists(n.bin+"/sluice-cni") {
		t.Errorf("left: %v", n.snapshot())
	}
	defer n.run(i)() // and Run installs again
	n.awaitReady(i, "10-bridge.conflist")
}

// The default of fs.inotify.max_user_instances is 128 for all of a node.
func TestRunPollsWhereNothingCanBeWatched(t *testing.T) {
	n := newNode(t)
	var out bytes.Buffer
	i := n.installer()
	log := logrus.New()
	log.SetOutput(&out)
	i.log = log
	i.time.poll = time.Millisecond
	i.newWatcher = func() (*fsnotify.Watcher, error) { return nil, errors.New("too many open files") }
	stop := n.run(i)
	n.await("a first look", func() bool { return strings.Contains(i.Status().Reason, "waiting") })
	n.write("10-calico.conflist", calico)
	n.awaitReady(i, "10-calico.conflist")
	stop()
	if got := strings.Count(out.String(), "max_user_instances"); got != 1 {
		t.Errorf("the remedy is logged %d times:\n%s", got, out.String())
	}
}

func TestFollowLeavesNoOldWatches(t *testing.T) {
	n := newNode(t)
	n.removeAll(n.root + "/etc")
	w := &watch{log: logrus.New(), time: defaultTiming(), open: fsnotify.NewWatcher}
	defer w.close()
	w.follow(n.conf, n.bin)
	if got := strings.Join(w.watcher.WatchList(), " "); !strings.Contains(got, n.root) || strings.Contains(got, "/etc") {
		t.Errorf("watched: %s", got)
	}
	if err := os.MkdirAll(n.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	w.follow(n.conf, n.bin)
	if got := w.watcher.WatchList(); len(got) != 2 || w.blind {
		t.Errorf("watched: %v", got)
	}
}
