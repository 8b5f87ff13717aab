//go:build sluice_failpoints

package upgrade

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

var churnCycles = flag.Int("churn.cycles", 2000, "how many namespaces are enrolled and un-enrolled, one after the other")

// held is what this process and its datapath hold.
type held struct {
	Contents map[string]int // pins and entries
	Programs int            // of the datapath: those that use one of its maps
	Files    int
	heap     uint64
}

func heldNow(t *testing.T, dir string) held {
	t.Helper()
	runtime.GC()
	runtime.GC() // what the first one finalised
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return held{kit.Pins(t, dir), programsOf(t, dir), len(files), m.HeapAlloc}
}

// programsOf counts the programs in the kernel that use one of a datapath's maps.
func programsOf(t *testing.T, dir string) int {
	t.Helper()
	ours := map[ebpf.MapID]bool{}
	pins, err := filepath.Glob(filepath.Join(dir, datapath.Layout, "maps", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			continue // the mark of the layout
		}
		if info, err := m.Info(); err == nil {
			id, _ := info.ID()
			ours[id] = true
		}
		m.Close()
	}
	n := 0
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		prog, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue
		}
		if info, err := prog.Info(); err == nil {
			used, _ := info.MapIDs()
			for _, m := range used {
				if ours[m] {
					n++
					break
				}
			}
		}
		prog.Close()
	}
	return n
}

func TestEnrollingAndUnenrollingWithoutEndLeavesNothing(t *testing.T) {
	kernel := kit.KernelMemory(t)
	early, late := lowest(kernel), lowest(kernel)
	dir := filepath.Join(kit.BPFFS(t), "churn")
	d := kit.OwnDatapath(t, datapath.Options{Dir: dir, Cgroup: kit.Cgroup(t)})
	pod := datapath.Pod{Namespace: "shop", Name: "cart", UID: "u", Rules: rules.Default(), Inbound: datapath.InboundTC}
	pod.Rules.ExcludeOutboundPorts = []uint16{81}
	cycle := func(n int) {
		t.Helper()
		ns, err := netns.New()
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		if err := addInterface(ns); err != nil {
			t.Fatal(err)
		}
		id := datapath.AttachmentID{Network: "net", Container: "c", Interface: "eth0"}
		if err := d.Attach(datapath.Attachment{AttachmentID: id, Cookie: ns.Cookie()}); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Enroll(ns, pod); err != nil {
			t.Fatal(err)
		}
		if n%2 == 1 { // its namespace ends first, as it may before a DEL
			ns.Close()
			ns = nil
		}
		released, found, err := d.Release(id, ns)
		if err != nil || !found || !released.Unenrolled {
			t.Fatalf("cycle %d: released %+v, %v, %v", n, released, found, err)
		}
	}
	idle := programsOf(t, dir)
	for n := range 20 { // opens what stays open
		cycle(n)
	}
	kit.Eventually(t, "the kernel frees the first pods' programs", func() bool { return programsOf(t, dir) == idle })
	before := heldNow(t, dir)
	if before.Programs < 14 || len(before.Contents) < 30 {
		t.Fatalf("too little is held to begin with: %+v", before)
	}
	began := time.Now()
	for n := range *churnCycles {
		cycle(n)
		switch {
		case n < *churnCycles/4:
			early.look()
		case n >= *churnCycles*3/4:
			late.look()
		}
	}
	t.Logf("%d cycles within %v", *churnCycles, time.Since(began))
	var after held
	deadline := time.Now().Add(time.Minute) // the kernel frees programs and namespaces in its own time
	for {
		after = heldNow(t, dir)
		late.look()
		same := cmp.Equal(before, after, cmp.AllowUnexported(held{}), ignoreHeap)
		if same && late.least-early.least <= kernelSlack(*churnCycles) || time.Now().After(deadline) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if diff := cmp.Diff(before, after, cmp.AllowUnexported(held{}), ignoreHeap); diff != "" {
		t.Error("they leave:", diff)
	}
	t.Logf("the kernel's memory has grown by %d bytes, from %d", late.least-early.least, early.least)
	if grown := late.least - early.least; grown > kernelSlack(*churnCycles) {
		t.Errorf("the kernel's memory has grown by %d bytes in %d cycles", grown, *churnCycles)
	}
	// A byte of heap for each cycle would be 2 kB: what the runtime keeps for
	// itself goes up and down by more. 64 bytes for each are a leak.
	grown := int64(after.heap) - int64(before.heap)
	t.Logf("the heap has grown by %d bytes", grown)
	if grown > 256<<10+64*int64(*churnCycles) {
		t.Errorf("the heap has grown by %d bytes in %d cycles", grown, *churnCycles)
	}
}

// low is the least that was read: what workers of the kernel have yet to free comes
// and goes.
type low struct {
	read  func() int64
	least int64
}

func lowest(read func() int64) *low { return &low{read, math.MaxInt64} }

func (l *low) look() { l.least = min(l.least, l.read()) }

// settle looks until nothing less has come for a while.
func (l *low) settle() {
	for quiet := 0; quiet < 20; quiet++ {
		before := l.least
		if l.look(); l.least < before {
			quiet = 0
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// kernelSlack is by how much the kernel's memory may be more after some cycles: it
// goes up and down by half a megabyte. A program has a page at least, and so has a
// link, which holds one; entries of maps are counted.
func kernelSlack(cycles int) int64 { return 512<<10 + 256*int64(cycles) }

// The check of the kernel's memory sees one program that stays of each cycle.
func TestAProgramThatStayedOfEachCycleWouldBeSeen(t *testing.T) {
	kernel := kit.KernelMemory(t)
	early, late := lowest(kernel), lowest(kernel)
	early.settle()
	for n := range *churnCycles {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		if err != nil {
			t.Fatal(err)
		}
		pin := filepath.Join(kit.BPFFS(t), fmt.Sprint("leaked-", n))
		if err := errors.Join(prog.Pin(pin), prog.Close()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(pin) })
	}
	late.look()
	if grown := late.least - early.least; grown <= kernelSlack(*churnCycles) {
		t.Errorf("%d programs are %d bytes, and up to %d are allowed", *churnCycles, grown, kernelSlack(*churnCycles))
	}
}

// addInterface gives a namespace an interface for the programs of TC.
func addInterface(ns *netns.NetNS) error {
	h, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	return h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"})
}

// ignoreHeap leaves the heap out of a comparison, which is never the same twice.
var ignoreHeap = cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".heap" }, cmp.Ignore())
