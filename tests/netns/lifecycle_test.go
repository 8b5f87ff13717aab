package netns

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

func TestUpAgainReplacesEveryProgramAndNoConnectSeesIt(t *testing.T) {
	d, opts := ownDatapath(t)
	p := kit.NewPod(t)
	p.Enroll(d, kit.ByTC)
	out, _ := proxyListeners(p)
	before := stateOf(t, opts.Dir)

	c := startConnects(t, p, out["0.0.0.0"])
	kit.Eventually(t, "connects run", func() bool { return c.done.Load() > 50 })
	for range 20 {
		again, err := datapath.Up(opts)
		if err != nil {
			t.Error("up again:", err)
			break
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	}
	kit.Eventually(t, "a thousand connects ran", func() bool { return c.done.Load() > 1000 })
	c.stop()
	t.Logf("%d connects", c.done.Load())
	if c.failed.Load() != 0 || c.escaped.Load() != 0 {
		t.Errorf("%d of %d connects failed and %d escaped", c.failed.Load(), c.done.Load(), c.escaped.Load())
	}

	after := stateOf(t, opts.Dir)
	if diff := cmp.Diff(before.Links, after.Links); diff != "" {
		t.Error("the links changed:", diff)
	}
	if diff := cmp.Diff(before.Maps, after.Maps); diff != "" {
		t.Error("the maps changed:", diff)
	}
	for pin, program := range after.Programs {
		if strings.HasPrefix(pin, "links/node/") && program == before.Programs[pin] {
			t.Errorf("%s has the same program as before", pin)
		}
	}
}

func TestEnrolAndUnenrolTwice(t *testing.T) {
	d, opts := ownDatapath(t)
	p := kit.NewPod(t)
	empty := stateOf(t, opts.Dir)
	if first := p.Enroll(d); first.Already {
		t.Error("the first time it was enrolled already")
	}
	once := stateOf(t, opts.Dir)
	if second := p.Enroll(d); !second.Already {
		t.Error("the second time it was not enrolled")
	}
	twice := stateOf(t, opts.Dir)
	once.Programs, twice.Programs = nil, nil
	if diff := cmp.Diff(once, twice); diff != "" {
		t.Error("enrolling twice changed:", diff)
	}
	for i, want := range []bool{true, false} {
		found, err := d.Unenroll(p.Cookie(), p.NetNS)
		if err != nil || found != want {
			t.Errorf("un-enrolment %d: found %v, %v; want %v", i+1, found, err, want)
		}
	}
	if diff := cmp.Diff(empty, stateOf(t, opts.Dir)); diff != "" {
		t.Error("un-enrolling leaves:", diff)
	}
}

func TestADeadNamespaceIsUnenrolledByItsCookie(t *testing.T) {
	d, opts := ownDatapath(t)
	empty := stateOf(t, opts.Dir)
	var cookie uint64
	t.Run("life", func(t *testing.T) { // its end closes the namespaces
		p := kit.NewPod(t)
		cookie = p.Cookie()
		if _, err := d.Enroll(p.NetNS, datapath.Pod{Rules: rules.Default()}); err != nil {
			t.Fatal(err)
		}
	})
	if pods, err := d.Pods(); err != nil || len(pods) != 1 {
		t.Fatalf("pods: %v, %v", pods, err)
	}
	if found, err := d.Unenroll(cookie, nil); err != nil || !found {
		t.Errorf("un-enrol: %v, %v", found, err)
	}
	if diff := cmp.Diff(empty, stateOf(t, opts.Dir)); diff != "" {
		t.Error("it leaves:", diff)
	}
}

// Un-enrolled by its cookie alone, a living namespace is free again too.
func TestALivingNamespaceIsUnenrolledByItsCookie(t *testing.T) {
	d, _ := ownDatapath(t)
	p := kit.NewPod(t)
	server := p.Far.Listen(kit.Root, "0.0.0.0:80")
	p.Hold(kit.App) // somebody lives there
	p.Enroll(d, kit.ByTC)
	if found, err := d.Unenroll(p.Cookie(), nil); err != nil || !found {
		t.Fatalf("un-enrol: %v, %v", found, err)
	}
	s, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80))
	if err != nil {
		t.Fatal("after un-enrolment:", err)
	}
	kit.Exchange(t, s, server.MustAccept(), 100)
}

func TestAFailedEnrolmentLeavesNothing(t *testing.T) {
	everything := func(pod *datapath.Pod) {
		pod.Rules.ExcludeOutboundPorts = []uint16{1, 2, 3}
		pod.Rules.ExcludeOutboundCIDRs = prefixes("10.0.0.0/8", "fd00::/8")
		pod.Inbound = datapath.InboundTC
	}
	d, opts := ownDatapath(t)
	for _, table := range []string{"pods", "pod_names", "handshake_use", "rule_sets", "own_addrs", "proxy_ids"} {
		t.Run("full "+table, func(t *testing.T) {
			fillMap(t, filepath.Join(opts.Dir, datapath.Layout, "maps", table))
			enrolFails(t, d, opts, kit.NewPod(t), datapath.ErrTableFull, everything)
		})
	}
	t.Run("lo is down", func(t *testing.T) {
		p := kit.NewPod(t)
		p.Netlink(func(h *netlink.Handle) error {
			lo, err := h.LinkByName("lo")
			if err != nil {
				return err
			}
			return h.LinkSetDown(lo)
		})
		enrolFails(t, d, opts, p, datapath.ErrNotReady, everything)
	})
}

// enrolFails expects an enrolment to fail, and nothing to be left of it.
func enrolFails(t *testing.T, d *datapath.Datapath, opts datapath.Options, p *kit.Pod, want error, change func(*datapath.Pod)) {
	t.Helper()
	before, addresses := stateOf(t, opts.Dir), addressesOf(t, p)
	pod := datapath.Pod{Rules: rules.Default()}
	change(&pod)
	if _, err := d.Enroll(p.NetNS, pod); !errors.Is(err, want) {
		t.Errorf("enroll: %v, want %v", err, want)
	}
	if diff := cmp.Diff(before, stateOf(t, opts.Dir)); diff != "" {
		t.Error("it leaves:", diff)
	}
	if diff := cmp.Diff(addresses, addressesOf(t, p)); diff != "" {
		t.Error("it changes the pod's addresses:", diff)
	}
	if n := tcxPrograms(t, p, "eth0"); n != 0 {
		t.Errorf("it leaves %d TCX programs", n)
	}
	if _, err := os.Stat(filepath.Join(opts.Dir, datapath.Layout, "links", "pods", fmt.Sprint(p.Cookie()))); !errors.Is(err, os.ErrNotExist) {
		t.Error("it leaves a directory of links")
	}
}

func addressesOf(t *testing.T, p *kit.Pod) []string {
	t.Helper()
	network, err := p.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range network.Addresses {
		out = append(out, a.String())
	}
	slices.Sort(out)
	return out
}

// fillMark is in the keys of fillMap, and in no real one: cookies and rule sets
// that have it here do not come in a test.
const fillMark = 0xfe

// fillMap leaves no room in a pinned map until the test ends.
func fillMap(t *testing.T, pin string) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	var added [][]byte
	t.Cleanup(func() {
		for _, key := range added {
			_ = m.Delete(key) // an enrolment that failed may have tidied up
		}
		m.Close()
	})
	value := make([]byte, m.ValueSize())
	for i := uint32(1); ; i++ {
		key := make([]byte, m.KeySize())
		copy(key, []byte{byte(i), byte(i >> 8), byte(i >> 16), fillMark})
		err := m.Put(key, value)
		if errors.Is(err, unix.E2BIG) {
			return
		}
		if err != nil {
			t.Fatal("fill:", err)
		}
		added = append(added, key)
	}
}

func TestTwoHundredEnrolmentsLeaveNothing(t *testing.T) {
	d, opts := ownDatapath(t)
	p := kit.NewPod(t)
	pod := datapath.Pod{Rules: rules.Default(), Inbound: datapath.InboundTC}
	pod.Rules.ExcludeOutboundCIDRs = prefixes("10.0.0.0/8", "fd00::/8")
	cycle := func() {
		if _, err := d.Enroll(p.NetNS, pod); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
			t.Fatal(err)
		}
	}
	cycle() // opens what stays open, if anything does
	before, files := stateOf(t, opts.Dir), openFiles(t)
	for range 200 {
		cycle()
	}
	if diff := cmp.Diff(before, stateOf(t, opts.Dir)); diff != "" {
		t.Error("they leave:", diff)
	}
	kit.Eventually(t, "no more files are open than before", func() bool { return len(openFiles(t)) <= len(files) })
	if n := tcxPrograms(t, p, "eth0"); n != 0 {
		t.Errorf("they leave %d TCX programs", n)
	}
}

func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestDownRemovesEveryProgramLinkAndMap(t *testing.T) {
	d, opts := ownDatapath(t)
	p := kit.NewPod(t)
	p.Hold(kit.App) // down finds a namespace without links by who lives in it
	if _, err := d.Enroll(p.NetNS, datapath.Pod{Rules: rules.Default(), Inbound: datapath.InboundTC}); err != nil {
		t.Fatal(err)
	}
	s := stateOf(t, opts.Dir)
	for id := range maps.Values(s.Programs) { // maps of a program that no pin shows: .rodata
		for name, m := range programMaps(t, ebpf.ProgramID(id)) {
			s.Maps[name] = uint32(m)
		}
	}
	if len(s.Links) < 11 || len(s.Maps) <= len(s.Entries) {
		t.Fatalf("too little is there before: %v", s)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if pods, err := datapath.Down(opts.Dir); err != nil || pods != 1 {
		t.Errorf("down: %d pods, %v", pods, err)
	}
	if _, err := os.Stat(opts.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there: %v", opts.Dir, err)
	}
	if pods, err := datapath.Down(opts.Dir); err != nil || pods != 0 {
		t.Errorf("down again: %d pods, %v", pods, err)
	}
	// Programs hold maps and maps hold programs: the kernel frees one after the
	// other, each after a grace period. That takes ten seconds, and on a machine
	// that is busy with other tests it has taken more than thirty.
	deadline := time.Now().Add(3 * time.Minute)
	for _, kind := range []struct {
		name string
		ids  map[string]uint32
		open func(uint32) error
	}{
		{"link", s.Links, func(id uint32) error { l, err := link.NewFromID(link.ID(id)); return closing(l, err) }},
		{"program", s.Programs, func(id uint32) error {
			next, err := ebpf.ProgramGetNextID(ebpf.ProgramID(id) - 1)
			return isThere(uint32(next) == id, err)
		}},
		{"map", s.Maps, func(id uint32) error {
			// Opening a program array that is being freed makes the kernel leak it.
			next, err := ebpf.MapGetNextID(ebpf.MapID(id) - 1)
			return isThere(uint32(next) == id, err)
		}},
	} {
		for name, id := range kind.ids {
			for !errors.Is(kind.open(id), os.ErrNotExist) {
				if time.Now().After(deadline) {
					t.Fatalf("%s %s is still there", kind.name, name)
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
	}
}

func TestDownGivesEveryPodsNamespaceBackAsItWas(t *testing.T) {
	d, opts := ownDatapath(t)
	before := map[*kit.Pod][]string{}
	for range 3 {
		p := kit.NewPod(t)
		p.Hold(kit.App) // down finds a namespace by who lives in it
		before[p] = addressesOf(t, p)
		if _, err := d.Enroll(p.NetNS, datapath.Pod{Rules: rules.Default()}); err != nil {
			t.Fatal(err)
		}
		if cmp.Equal(before[p], addressesOf(t, p)) {
			t.Fatal("enrolment has not added ::6")
		}
	}
	if pods, err := datapath.Down(opts.Dir); err != nil || pods != len(before) {
		t.Errorf("down: %d pods, %v", pods, err)
	}
	for p, addresses := range before {
		if diff := cmp.Diff(addresses, addressesOf(t, p)); diff != "" {
			t.Error("down leaves:", diff)
		}
	}
}

func TestUpWithAnotherNumberOfPodsKeepsTheTables(t *testing.T) {
	opts := datapath.Options{Dir: filepath.Join(kit.BPFFS(t), "sized"), Cgroup: kit.Cgroup(t), MaxPods: 64}
	kit.OwnDatapath(t, opts)
	before := stateOf(t, opts.Dir)
	for _, pods := range []uint32{0, 32, 128} {
		opts.MaxPods = pods
		d, err := datapath.Up(opts)
		if err != nil {
			t.Fatalf("up for %d pods: %v", pods, err)
		}
		d.Close()
		if diff := cmp.Diff(before.Maps, stateOf(t, opts.Dir).Maps); diff != "" {
			t.Errorf("up for %d pods has other tables: %s", pods, diff)
		}
	}
}

func isThere(found bool, err error) error {
	if err == nil && !found {
		return os.ErrNotExist
	}
	return err
}

func closing(c interface{ Close() error }, err error) error {
	if err != nil {
		return err
	}
	return c.Close()
}

// programMaps are the IDs of a program's maps, by the names of both.
func programMaps(t *testing.T, id ebpf.ProgramID) map[string]ebpf.MapID {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]ebpf.MapID{}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			t.Fatal(err)
		}
		if mapInfo, err := m.Info(); err == nil {
			out[info.Name+"'s "+mapInfo.Name] = id
		}
		m.Close()
	}
	return out
}

func TestEveryMapReadsLikeATable(t *testing.T) {
	_, opts := ownDatapath(t)
	names := slices.Sorted(maps.Keys(stateOf(t, opts.Dir).Maps))
	if len(names) < 12 {
		t.Fatalf("only %v", names)
	}
	for _, name := range names {
		m, err := ebpf.LoadPinnedMap(filepath.Join(opts.Dir, datapath.Layout, name), nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := m.Info()
		m.Close()
		if err != nil {
			t.Fatal(err)
		}
		if m.Type() == ebpf.SockHash {
			continue // the kernel takes no BTF for these
		}
		if info.Name != filepath.Base(name) || len(info.Name) > 15 {
			t.Errorf("the map pinned as %s is called %q", name, info.Name)
		}
		if _, ok := info.BTFID(); !ok {
			t.Errorf("%s has no BTF", name)
		}
	}
}
