package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// exclude makes interfaces excluded.
func exclude(names ...string) func(*datapath.Pod) {
	return func(pod *datapath.Pod) { pod.Rules.ExcludeInterfaces = names }
}

// Addresses of the far host behind no interface in particular.
var (
	beyond4 = netip.MustParseAddr("10.97.0.1")
	beyond6 = netip.MustParseAddr("fd97::1")
)

// newTwoWires is a town with eth1 beside eth0, and a far host with addresses that
// the default route, through eth0, leads to.
func newTwoWires(t *testing.T) *town {
	t.Helper()
	w := newTown(t)
	wireSecond(w.Pod)
	w.Far.AddAddr("lo", netip.PrefixFrom(beyond4, 32))
	w.Far.AddAddr("lo", netip.PrefixFrom(beyond6, 128))
	return w
}

// check dials and says where it wants to arrive.
type check struct {
	who    kit.ID
	family int
	to     netip.AddrPort
	want   place
}

func (w *town) check(t *testing.T, when string, checks ...check) {
	t.Helper()
	for _, c := range checks {
		client, err := w.Dial(c.who, c.family, c.to)
		if err != nil {
			t.Errorf("%s, %v to %v: %v", when, c.who, c.to, err)
			continue
		}
		if got := w.acceptedAt(t, client); got != c.want {
			t.Errorf("%s, %v to %v goes to %s, want %s", when, c.who, c.to, got, c.want)
		}
		client.Close()
	}
}

// everyWay is a dial in each family, and v4-mapped.
func everyWay(who kit.ID, v4, v6 netip.Addr, want place) []check {
	return []check{
		{who, unix.AF_INET, ap(v4, 80), want}, {who, unix.AF_INET6, ap(v6, 80), want}, {who, unix.AF_INET6, ap(v4, 80), want},
	}
}

func (w *town) comesIn(t *testing.T, when string, v4, v6 netip.Addr, want place) {
	t.Helper()
	for _, to := range []netip.AddrPort{ap(v4, 80), ap(v6, 80)} {
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		client, err := w.Far.Dial(kit.Root, family, to)
		if err != nil {
			t.Errorf("%s, from outside to %v: %v", when, to, err)
			continue
		}
		if got := w.acceptedAt(t, client); got != want {
			t.Errorf("%s, from outside to %v goes to %s, want %s", when, to, got, want)
		}
		client.Close()
	}
}

func TestNothingIsCapturedThroughAnExcludedInterface(t *testing.T) {
	d := kit.Datapath(t)
	one := wires[1]
	for _, way := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
		t.Run(string(way), func(t *testing.T) {
			w := newTwoWires(t)
			w.check(t, "without Sluice", everyWay(kit.App, kit.Far4, kit.Far6, toServer)...)
			w.check(t, "without Sluice", everyWay(kit.App, one.far4, one.far6, toServer)...)
			w.comesIn(t, "without Sluice", kit.Pod4, kit.Pod6, toServer)
			w.comesIn(t, "without Sluice", one.pod4, one.pod6, toServer)

			w.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = way })
			w.check(t, "not excluded", everyWay(kit.App, one.far4, one.far6, toOutbound)...)
			w.comesIn(t, "not excluded", one.pod4, one.pod6, toInbound)

			w.Enroll(d, exclude("eth1"), func(pod *datapath.Pod) { pod.Inbound = way })
			w.check(t, "excluded", everyWay(kit.App, kit.Far4, kit.Far6, toOutbound)...)
			w.check(t, "excluded", everyWay(kit.App, beyond4, beyond6, toOutbound)...)
			w.comesIn(t, "excluded", kit.Pod4, kit.Pod6, toInbound)
			before := w.Stat(d, "direct-interface")
			w.check(t, "excluded", everyWay(kit.App, one.far4, one.far6, toServer)...)
			w.comesIn(t, "excluded", one.pod4, one.pod6, toServer)
			if n := w.Stat(d, "direct-interface") - before; n != 5 {
				t.Errorf("direct-interface counts %d of 5 connections", n)
			}
			// Local destinations leave through lo, whatever interface has them.
			w.check(t, "excluded, its own address", everyWay(kit.Proxy, one.pod4, one.pod6, toInbound)...)
			w.check(t, "excluded, its own address", everyWay(kit.App, one.pod4, one.pod6, toServer)...)

			w.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = way })
			w.check(t, "not excluded any more", everyWay(kit.App, one.far4, one.far6, toOutbound)...)
			w.comesIn(t, "not excluded any more", one.pod4, one.pod6, toInbound)
		})
	}
}

func TestAnExcludedLoopbackLeavesLocalCallsAlone(t *testing.T) {
	d := kit.Datapath(t)
	w := newTown(t)
	w.check(t, "without Sluice", everyWay(kit.Proxy, kit.Pod4, kit.Pod6, toServer)...)
	w.Enroll(d)
	w.check(t, "enrolled", everyWay(kit.Proxy, kit.Pod4, kit.Pod6, toInbound)...)
	w.Enroll(d, exclude("lo"))
	w.check(t, "lo excluded", everyWay(kit.Proxy, kit.Pod4, kit.Pod6, toServer)...)
	w.check(t, "lo excluded", everyWay(kit.App, kit.Far4, kit.Far6, toOutbound)...)
	w.comesIn(t, "lo excluded", kit.Pod4, kit.Pod6, toInbound)
}

// start begins a connect that nobody waits for.
func (w *town) start(t *testing.T, to netip.AddrPort, options ...kit.Option) {
	t.Helper()
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	options = append(options, kit.With(func(fd int) error { return unix.SetNonblock(fd, true) }))
	s, err := w.Socket(kit.App, family, options...)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.As(kit.App, func() error { return s.Start(to) }); !errors.Is(err, unix.EINPROGRESS) {
		t.Errorf("connect to %v: %v", to, err)
	}
}

func toDevice(name string) kit.Option {
	return kit.With(func(fd int) error { return unix.BindToDevice(fd, name) })
}

func TestASocketBoundToADeviceIsJudgedByIt(t *testing.T) {
	d := kit.Datapath(t)
	one := wires[1]
	w := newTwoWires(t)
	// What eth1 leads to as well, at a price.
	w.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName("eth1")
		if err != nil {
			return err
		}
		for _, to := range []netip.Prefix{netip.PrefixFrom(beyond4, 32), netip.PrefixFrom(beyond6, 128)} {
			via := one.far4
			if to.Addr().Is6() {
				via = one.far6
			}
			if err := h.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice(), LinkIndex: l.Attrs().Index, Priority: 5000}); err != nil {
				return err
			}
		}
		// and what eth0 leads to, at a price
		l, err = h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(
			h.RouteAdd(&netlink.Route{Dst: ipNet(netip.PrefixFrom(beyond4, 32)), Gw: kit.Far4.AsSlice(), LinkIndex: l.Attrs().Index, Priority: 100}),
			h.RouteAdd(&netlink.Route{Dst: ipNet(netip.PrefixFrom(beyond6, 128)), Gw: kit.Far6.AsSlice(), LinkIndex: l.Attrs().Index, Priority: 100}))
	})
	for _, link := range []string{"eth0", "eth1"} {
		for _, to := range []netip.Addr{beyond4, beyond6} {
			if got := w.goes(t, kit.App, ap(to, 80), toDevice(link)); got != toServer {
				t.Errorf("without Sluice, to %s through %s goes to %s", to, link, got)
			}
		}
	}
	w.Enroll(d, exclude("eth1"))
	w.check(t, "bound to none", everyWay(kit.App, beyond4, beyond6, toOutbound)...)
	for _, to := range []netip.Addr{beyond4, beyond6} {
		if got := w.goes(t, kit.App, ap(to, 80), toDevice("eth1")); got != toServer {
			t.Errorf("bound to eth1, to %s goes to %s", to, got)
		}
		// Captured, but it cannot leave its device: as with iptables.
		captured, direct := w.Stat(d, "captured-out"), w.Stat(d, "direct-interface")
		w.start(t, ap(to, 80), toDevice("eth0"))
		if w.Stat(d, "captured-out") != captured+1 || w.Stat(d, "direct-interface") != direct {
			t.Errorf("bound to eth0, to %s is not captured", to)
		}
	}
	for _, l := range w.places[toServer] {
		checkNothingReached(t, l)
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func TestTheGuardOfExcludedInterfaces(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range []datapath.TCAttach{datapath.Clsact, datapath.TCX} {
		t.Run(string(way), func(t *testing.T) {
			p := kit.NewPod(t)
			wireSecond(p)
			byTC := func(pod *datapath.Pod) { pod.TC = way }
			if _, err := d.Enroll(p.NetNS, datapath.Pod{Rules: rules.Default(), TC: way}); err != nil && way == datapath.TCX {
				t.Skip(err)
			}
			passes := func(when string, want map[string]bool) {
				t.Helper()
				for _, x := range wires {
					for _, packet := range [][]byte{handMadeSYN(x.pod4, x.far4), handMadeSYN(x.pod6, x.far6)} {
						if got := comesOut(t, p, x.link, packet, wireWays[1].send); got != want[x.link] {
							t.Errorf("%s, a raw SYN through %s passes: %v, want %v", when, x.link, got, want[x.link])
						}
					}
				}
			}
			passes("nothing excluded", map[string]bool{})
			p.Enroll(d, byTC, exclude("eth1"))
			passes("eth1 excluded", map[string]bool{"eth1": true})
			p.Enroll(d, byTC, exclude("eth0"))
			passes("eth0 excluded", map[string]bool{"eth0": true})
			p.Enroll(d, byTC)
			passes("nothing excluded any more", map[string]bool{})
		})
	}
}

// What leaves through an interface that stands upon another passes that one as
// well, and its guard.
func TestAnExcludedInterfaceUponOneWithAGuard(t *testing.T) {
	d := kit.Datapath(t)
	for _, kind := range []string{"macvlan", "bridge"} {
		t.Run(kind, func(t *testing.T) {
			w := newTown(t)
			w.Far.AddAddr("eth0", netip.MustParsePrefix("10.96.0.1/24"))
			pod, far, link := netip.MustParsePrefix("10.96.0.2/24"), netip.MustParseAddr("10.96.0.1"), "over"
			if kind == "bridge" {
				wireSecond(w.Pod) // its address moves to the bridge, as it were
				w.Far.AddAddr("eth1", netip.MustParsePrefix("10.95.0.1/24"))
				pod, far = netip.MustParsePrefix("10.95.0.2/24"), netip.MustParseAddr("10.95.0.1")
			}
			upon(t, w, kind, link)
			w.AddAddr(link, pod)
			if got := w.goes(t, kit.App, ap(far, 80)); got != toServer {
				t.Fatalf("without Sluice it goes to %s", got)
			}
			w.Enroll(d)
			if got := w.goes(t, kit.App, ap(far, 80)); got != toOutbound {
				t.Errorf("enrolled, it goes to %s", got)
			}
			w.Enroll(d, exclude(link))
			if got := w.goes(t, kit.App, ap(far, 80)); got != toServer {
				t.Errorf("excluded, it goes to %s", got)
			}
			if got := w.goes(t, kit.App, ap(kit.Far4, 80)); got != toOutbound {
				t.Errorf("what leaves by eth0 goes to %s", got)
			}
		})
	}
}

// upon adds a macvlan upon eth0, or a bridge with eth1.
func upon(t *testing.T, w *town, kind, name string) {
	t.Helper()
	w.Netlink(func(h *netlink.Handle) error {
		attributes := netlink.LinkAttrs{Name: name}
		if kind == "bridge" {
			port, err := h.LinkByName("eth1")
			bridge := &netlink.Bridge{LinkAttrs: attributes}
			if err == nil {
				err = h.LinkAdd(bridge)
			}
			if err == nil {
				err = h.LinkSetMaster(port, bridge)
			}
			if err == nil {
				err = h.LinkSetUp(bridge)
			}
			return err
		}
		below, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		attributes.ParentIndex = below.Attrs().Index
		above := &netlink.Macvlan{LinkAttrs: attributes, Mode: netlink.MACVLAN_MODE_BRIDGE}
		if err := h.LinkAdd(above); err != nil {
			return err
		}
		return h.LinkSetUp(above)
	})
}

func TestEnrolWithAThousandRoutes(t *testing.T) {
	d, opts := ownDatapath(t)
	empty := stateOf(t, opts.Dir)
	w := newTwoWires(t)
	addRoutes(t, w.Pod, "eth1", 1000)
	w.Enroll(d, exclude("eth1"))
	if n := stateOf(t, opts.Dir).Entries["maps/routes4"]; n < 1000 {
		t.Errorf("%d routes are known, want at least 1000", n)
	}
	w.check(t, "enrolled", check{kit.App, unix.AF_INET, ap(wires[1].far4, 80), toServer}, check{kit.App, unix.AF_INET, ap(kit.Far4, 80), toOutbound})
	w.Enroll(d)
	if n := stateOf(t, opts.Dir).Entries["maps/routes4"]; n != 0 {
		t.Errorf("nothing excluded, and %d routes are known", n)
	}
	addRoutes(t, w.Pod, "eth0", 1000)
	w.Enroll(d, exclude("eth1"))
	if _, err := d.Unenroll(w.Cookie(), w.NetNS); err != nil {
		t.Fatal(err)
	}
	if got := stateOf(t, opts.Dir).Entries; fmt.Sprint(got) != fmt.Sprint(empty.Entries) {
		t.Errorf("un-enrolment leaves %v, want %v", got, empty.Entries)
	}
}

// addRoutes adds or replaces 198.18.0.0/32 and those that follow.
func addRoutes(t *testing.T, p *kit.Pod, link string, n int) {
	t.Helper()
	p.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(link)
		for i := 0; i < n && err == nil; i++ {
			a := netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
			err = h.RouteReplace(&netlink.Route{Dst: ipNet(netip.PrefixFrom(a, 32)), LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK})
		}
		return err
	})
}

func TestAFullTableOfInterfacesOrRoutesRefusesTheEnrolment(t *testing.T) {
	d, opts := ownDatapath(t)
	for _, table := range []string{"interfaces", "interface_names", "routes4", "routes6"} {
		t.Run(table, func(t *testing.T) {
			w := newTwoWires(t)
			pin := filepath.Join(opts.Dir, datapath.Layout, "maps", table)
			fill := fillMap
			if table == "routes4" || table == "routes6" {
				fill = fillTrie
			}
			t.Run("first", func(t *testing.T) {
				fill(t, pin)
				enrolFails(t, d, opts, w.Pod, datapath.ErrTableFull, exclude("eth1"))
			})
			if table == "routes6" {
				return // as routes4
			}
			t.Run("again", func(t *testing.T) {
				w.Enroll(d)
				fill(t, pin)
				before := stateOf(t, opts.Dir)
				pod := datapath.Pod{Rules: rules.Default()}
				pod.Rules.ExcludeInterfaces = []string{"eth1"}
				if _, err := d.Enroll(w.NetNS, pod); !errors.Is(err, datapath.ErrTableFull) {
					t.Errorf("enroll: %v, want %v", err, datapath.ErrTableFull)
				}
				if got := stateOf(t, opts.Dir).Entries; fmt.Sprint(got) != fmt.Sprint(before.Entries) {
					t.Errorf("it leaves %v, want %v", got, before.Entries)
				}
				w.check(t, "as it was", everyWay(kit.App, wires[1].far4, wires[1].far6, toOutbound)...)
			})
		})
	}
}

// fillTrie leaves no room in a pinned table of routes until the test ends.
func fillTrie(t *testing.T, pin string) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	var added [][]byte
	t.Cleanup(func() {
		for _, key := range added {
			_ = m.Delete(key)
		}
		m.Close()
	})
	for i := uint32(0); ; i++ {
		key := make([]byte, m.KeySize())
		// All of the key is prefix; no cookie of a test is that large.
		copy(key, []byte{byte((len(key) - 4) * 8), 0, 0, 0, byte(i), byte(i >> 8), byte(i >> 16), 0xff, 0xff, 0xff, 0xff, fillMark})
		err := m.Put(key, uint32(1))
		if errors.Is(err, unix.ENOSPC) {
			return
		}
		if err != nil {
			t.Fatal("fill:", err)
		}
		added = append(added, key)
	}
}
