//go:build sluice_failpoints

package upgrade

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

func TestDownRemovesWhatAnotherVersionLeft(t *testing.T) {
	s := newLayouts(t, "down")
	s.next.mustCtl(s.up()...)
	s.inForce(s.next, s.this)
	s.each(func(w way) error { return w.once(1) })
	s.this.mustCtl("down", "--bpffs", s.dir)
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there: %v", s.dir, err)
	}
	s.provesDirect()
}

// A map that programs write cannot be converted while they run: a version that
// gives one another shape is refused before it changes anything.
func TestAnotherShapeOfASharedMapIsRefusedAndNothingChanges(t *testing.T) {
	opts := datapath.Options{Dir: filepath.Join(kit.BPFFS(t), "shared-shape"), Cgroup: kit.Cgroup(t)}
	w := newWorld(t)
	w.provesDirect()
	w.Enroll(kit.OwnDatapath(t, opts))
	pin := filepath.Join(opts.Dir, datapath.Layout, "maps", "handshakes")
	aside := pin + "-aside"
	if err := os.Rename(pin, aside); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 48, ValueSize: 64, MaxEntries: 65536, Flags: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Pin(pin); err != nil {
		t.Fatal(err)
	}
	before := kit.Pins(t, opts.Dir)
	if _, err := datapath.Up(opts); !errors.Is(err, datapath.ErrLayout) || !strings.Contains(err.Error(), "handshakes") {
		t.Errorf("up: %v", err)
	}
	if diff := cmp.Diff(before, kit.Pins(t, opts.Dir)); diff != "" {
		t.Error("what is pinned has changed:", diff)
	}
	w.each(func(way way) error { return way.once(1) })
	if err := errors.Join(os.Remove(pin), os.Rename(aside, pin)); err != nil {
		t.Fatal(err)
	}
	d, err := datapath.Up(opts)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
}

func TestPinsOfAnotherSchemeAreRefused(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "scheme")
	opts := datapath.Options{Dir: dir, Cgroup: kit.Cgroup(t)}
	if err := os.MkdirAll(filepath.Join(dir, "v2", "links"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	_, err := datapath.Up(opts)
	if !errors.Is(err, datapath.ErrLayout) || !strings.Contains(err.Error(), filepath.Join(dir, "v2")) {
		t.Errorf("up: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, datapath.Layout)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("up has made something: %v", err)
	}
	if _, err := datapath.Open(opts); !errors.Is(err, datapath.ErrNotUp) || !errors.Is(err, datapath.ErrLayout) {
		t.Errorf("open: %v", err)
	}
}

// Who has the datapath open while another version takes over may not write: its
// maps are in force no more.
func TestWhoHoldsTheMapsBeforeMayNotEnroll(t *testing.T) {
	s := newLayouts(t, "holds")
	d, err := datapath.Open(datapath.Options{Dir: s.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	other := datapath.AttachmentID{Network: "net", Container: "c2", Interface: "eth0"}
	if err := d.Attach(datapath.Attachment{AttachmentID: other, Cookie: s.Cookie()}); err != nil {
		t.Fatal("before:", err)
	}
	s.next.mustCtl(s.up()...)
	if err := d.Attach(datapath.Attachment{AttachmentID: other, Cookie: s.Cookie()}); !errors.Is(err, datapath.ErrNotUp) {
		t.Errorf("attach: %v", err)
	}
	if _, err := d.Enroll(s.NetNS, datapath.Pod{Rules: rules.Default()}); !errors.Is(err, datapath.ErrNotUp) {
		t.Errorf("enroll: %v", err)
	}
}
