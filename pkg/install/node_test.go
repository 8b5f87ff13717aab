package install

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	calico = `{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico"
    },
    {
      "type": "portmap"
    }
  ]
}
`
	cilium = "\n{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \"type\": \"cilium-cni\"\n    }\n  ]\n}\n"
	bridge = "{\n\t\"cniVersion\": \"0.3.1\",\n\t\"name\": \"mynet\",\n\t\"type\": \"bridge\"\n}\n"
	multus = `{"cniVersion":"0.3.1","name":"multus-cni-network","type":"multus-shim"}`
)

// node is a host's two directories.
type node struct {
	t         *testing.T
	root      string
	conf, bin string
	plugin    string
	changes   chan Status
}

func newNode(t *testing.T) *node {
	t.Helper()
	root := t.TempDir()
	n := &node{t: t, root: root, conf: root + "/etc/cni/net.d", bin: root + "/opt/cni/bin", plugin: root + "/image/sluice-cni"}
	for _, dir := range []string{n.conf, n.bin, filepath.Dir(n.plugin)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.write(n.plugin, "the plugin, version 2\n")
	n.changes = make(chan Status, 1000)
	return n
}

// installer looks only when something happens: resync is out of reach.
func (n *node) installer() *Installer {
	n.t.Helper()
	i, err := New(Options{
		ConfDir: n.conf, BinDir: n.bin, Plugin: n.plugin,
		Entry:    conflist.Entry{Socket: "/run/sluice/sluiced.sock", StateFile: "/run/sluice/state.json"},
		OnChange: func(s Status) { n.changes <- s },
	})
	if err != nil {
		n.t.Fatal(err)
	}
	t := defaultTiming()
	t.resync = time.Hour
	i.setTiming(t)
	return i
}

// write writes in place, as a careless installer does.
func (n *node) write(path, data string) {
	n.t.Helper()
	if !filepath.IsAbs(path) {
		path = filepath.Join(n.conf, path)
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(name string) string {
	n.t.Helper()
	data, err := os.ReadFile(filepath.Join(n.conf, name))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(data)
}

// snapshot is everything on the host: names, modes, contents, links.
func (n *node) snapshot() map[string]string {
	n.t.Helper()
	all := map[string]string{}
	for _, dir := range []string{n.conf, n.bin} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			name, _ := filepath.Rel(n.root, path)
			info, err := d.Info()
			if err != nil {
				return err
			}
			if target, err := os.Readlink(path); err == nil {
				all[name] = "link to " + target
				return nil
			}
			if !info.Mode().IsRegular() {
				all[name] = info.Mode().String()
				return nil
			}
			data, err := os.ReadFile(path)
			all[name] = info.Mode().String() + " " + string(data)
			return err
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			n.t.Fatal(err)
		}
	}
	return all
}

func (n *node) wantSnapshot(want map[string]string, when string) {
	n.t.Helper()
	if diff := cmp.Diff(want, n.snapshot()); diff != "" {
		n.t.Errorf("%s (-want +got):\n%s", when, diff)
	}
}

// names of the configuration directory.
func (n *node) names() string {
	n.t.Helper()
	entries, err := os.ReadDir(n.conf)
	if err != nil {
		n.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// wantReady looks once and fails unless file has the entry then, last.
func (n *node) wantReady(i *Installer, file string) {
	n.t.Helper()
	i.look(time.Now())
	if s := i.Status(); !s.Ready || s.File != filepath.Join(n.conf, file) {
		n.t.Fatalf("status %+v, want ready with %s", s, file)
	}
	n.wantEntry(file)
}

func (n *node) wantEntry(file string) {
	n.t.Helper()
	list, err := conflist.Parse([]byte(n.read(file)))
	if err != nil || list.Ours == nil || list.Types[len(list.Types)-1] != conflist.Type {
		n.t.Errorf("%s has no entry at the end: %+v, %v", file, list, err)
	}
}

// wantNotReady fails unless the reason has all the words.
func (n *node) wantNotReady(s Status, words ...string) {
	n.t.Helper()
	if s.Ready {
		n.t.Fatalf("ready, want a reason with %q", words)
	}
	for _, word := range words {
		if !strings.Contains(s.Reason, word) {
			n.t.Errorf("the reason lacks %q: %s", word, s.Reason)
		}
	}
}

// run starts Run, and returns a function that ends it.
func (n *node) run(i *Installer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	return func() {
		n.t.Helper()
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("Run: %v", err)
		}
	}
}

// await waits until ok, with a look at each change of the status at least.
func (n *node) await(what string, ok func() bool) {
	n.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			n.t.Fatalf("in vain: %s\n%v", what, n.snapshot())
		}
		select {
		case <-n.changes:
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (n *node) awaitReady(i *Installer, file string) {
	n.t.Helper()
	n.await("ready with "+file, func() bool {
		s := i.Status()
		data, err := os.ReadFile(filepath.Join(n.conf, file))
		return err == nil && s.Ready && filepath.Base(s.File) == file && conflist.Contains(data)
	})
}
