package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// later are addresses that pods get after they were enrolled.
var later = []netip.Prefix{netip.MustParsePrefix("10.94.0.2/24"), netip.MustParsePrefix("fd94::2/64")}

func refresh(t *testing.T, d *datapath.Datapath, p *kit.Pod) []string {
	t.Helper()
	done, err := d.Refresh(p.NetNS)
	if err != nil {
		t.Fatal("refresh:", err)
	}
	var out []string
	for _, c := range done.Changes {
		out = append(out, c.What+": "+c.Which)
	}
	return out
}

// refreshes wants just these changes, and none by looking again.
func refreshes(t *testing.T, d *datapath.Datapath, p *kit.Pod, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, refresh(t, d, p)); diff != "" {
		t.Error("what refresh says:", diff)
	}
	if again := refresh(t, d, p); again != nil {
		t.Error("refreshing again changes", again)
	}
}

func (w *town) delAddr(t *testing.T, link string, p netip.Prefix) {
	t.Helper()
	w.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(link)
		if err != nil {
			return err
		}
		return h.AddrDel(l, &netlink.Addr{IPNet: ipNet(p)})
	})
}

func TestRefreshOfAnAddressThatCameAndWent(t *testing.T) {
	d := kit.Datapath(t)
	w := newTown(t)
	v4, v6 := later[0].Addr(), later[1].Addr()
	for _, p := range later {
		w.AddAddr("eth0", p)
	}
	w.check(t, "without Sluice", everyWay(kit.App, v4, v6, toServer)...)
	for _, p := range later {
		w.delAddr(t, "eth0", p)
	}
	w.Enroll(d)
	refreshes(t, d, w.Pod)

	for _, p := range later {
		w.AddAddr("eth0", p)
	}
	w.check(t, "not seen yet", everyWay(kit.App, v4, v6, toOutbound)...)
	refreshes(t, d, w.Pod, "address added: "+v4.String(), "address added: "+v6.String())
	w.check(t, "seen", everyWay(kit.App, v4, v6, toServer)...)
	w.check(t, "seen", everyWay(kit.Proxy, v4, v6, toInbound)...)
	for _, to := range later { // the far host needs an address beside it
		w.Far.AddAddr("eth0", netip.PrefixFrom(to.Addr().Prev(), to.Bits()))
	}
	w.comesIn(t, "seen", v4, v6, toInbound)

	for _, p := range later {
		w.delAddr(t, "eth0", p)
	}
	refreshes(t, d, w.Pod, "address removed: "+v4.String(), "address removed: "+v6.String())
	w.check(t, "gone", everyWay(kit.App, v4, v6, toOutbound)...)
}

func TestRefreshOfThePodsOnlyAddress(t *testing.T) {
	d := kit.Datapath(t)
	w := newTown(t)
	w.Enroll(d)
	w.delAddr(t, "eth0", netip.PrefixFrom(kit.Pod4, 24))
	if got := w.goes(t, kit.App, ap(kit.Far4, 80)); got != toOutbound { // the proxy would find no route
		t.Errorf("not seen yet, it goes to %s", got)
	}
	refreshes(t, d, w.Pod, "address removed: "+kit.Pod4.String(), "source of captured connections: none")
	if _, err := w.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80)); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("seen: %v, want ENETUNREACH", err)
	}
	w.AddAddr("eth0", later[0])
	w.Far.AddAddr("eth0", netip.MustParsePrefix("10.94.0.1/24"))
	refreshes(t, d, w.Pod, "address added: 10.94.0.2", "source of captured connections: 10.94.0.2")
	if got := w.goes(t, kit.App, netip.MustParseAddrPort("10.94.0.1:80")); got != toOutbound {
		t.Errorf("from another address it goes to %s", got)
	}
}

// AnyIP: a whole prefix is the pod's own.
func TestRefreshOfALocalPrefix(t *testing.T) {
	d := kit.Datapath(t)
	w := newTown(t)
	inside4, inside6 := netip.MustParseAddr("10.93.7.7"), netip.MustParseAddr("fd93::7:7")
	routes := []*netlink.Route{localRoute("10.93.0.0/16"), localRoute("fd93::/64")}
	change := func(what func(*netlink.Handle, *netlink.Route) error) {
		w.Netlink(func(h *netlink.Handle) error { return errors.Join(what(h, routes[0]), what(h, routes[1])) })
	}
	change((*netlink.Handle).RouteAdd)
	w.check(t, "without Sluice", everyWay(kit.App, inside4, inside6, toServer)...)
	w.Enroll(d)
	w.check(t, "enrolled", everyWay(kit.App, inside4, inside6, toServer)...)
	w.check(t, "enrolled", everyWay(kit.Proxy, inside4, inside6, toInbound)...)
	change((*netlink.Handle).RouteDel)
	refreshes(t, d, w.Pod, "route removed: 10.93.0.0/16", "route removed: fd93::/64")
	w.check(t, "removed", everyWay(kit.App, inside4, inside6, toOutbound)...)
	change((*netlink.Handle).RouteAdd)
	refreshes(t, d, w.Pod, "local prefix: 10.93.0.0/16", "local prefix: fd93::/64")
	w.check(t, "added", everyWay(kit.App, inside4, inside6, toServer)...)
}

func localRoute(prefix string) *netlink.Route {
	return &netlink.Route{
		Dst: ipNet(netip.MustParsePrefix(prefix)), LinkIndex: 1, Type: unix.RTN_LOCAL,
		Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
	}
}

func TestRefreshOfRoutesThroughAnExcludedInterface(t *testing.T) {
	d := kit.Datapath(t)
	w := newTwoWires(t)
	one := wires[1]
	beyond := []netip.Prefix{netip.PrefixFrom(beyond4, 24).Masked(), netip.PrefixFrom(beyond6, 64).Masked()}
	through := func(what func(*netlink.Handle, *netlink.Route) error) {
		w.Netlink(func(h *netlink.Handle) error {
			return errors.Join(
				what(h, &netlink.Route{Dst: ipNet(beyond[0]), Gw: one.far4.AsSlice()}),
				what(h, &netlink.Route{Dst: ipNet(beyond[1]), Gw: one.far6.AsSlice()}))
		})
	}
	through((*netlink.Handle).RouteAdd)
	w.check(t, "without Sluice", everyWay(kit.App, beyond4, beyond6, toServer)...)
	through((*netlink.Handle).RouteDel)
	w.check(t, "without Sluice", everyWay(kit.App, beyond4, beyond6, toServer)...)

	w.Enroll(d, exclude("eth1"))
	w.check(t, "by eth0", everyWay(kit.App, beyond4, beyond6, toOutbound)...)
	through((*netlink.Handle).RouteAdd)
	w.check(t, "not seen yet", everyWay(kit.App, beyond4, beyond6, toOutbound)...)
	refreshes(t, d, w.Pod, "route excluded: 10.97.0.0/24", "route excluded: fd97::/64")
	w.check(t, "by eth1", everyWay(kit.App, beyond4, beyond6, toServer)...)

	// The route is gone, and not seen yet: what is let go for eth1 leaves by eth0,
	// where the guard stops it.
	through((*netlink.Handle).RouteDel)
	for i, to := range []netip.Addr{beyond4, beyond6} {
		w.start(t, ap(to, 80))
		if n := w.Stat(d, "guard-other-interface"); n != uint64(i+1) {
			t.Errorf("guard-other-interface counts %d of %d", n, i+1)
		}
	}
	refreshes(t, d, w.Pod, "route removed: 10.97.0.0/24", "route removed: fd97::/64")
	w.check(t, "by eth0 again", everyWay(kit.App, beyond4, beyond6, toOutbound)...)
}

func TestRefreshOfInterfacesThatComeAndGo(t *testing.T) {
	d, opts := ownDatapath(t)
	for _, way := range []datapath.TCAttach{datapath.Clsact, datapath.TCX} {
		t.Run(string(way), func(t *testing.T) {
			p := kit.NewPod(t)
			pod := func(pod *datapath.Pod) {
				pod.TC, pod.Inbound = way, datapath.InboundTC
				pod.Rules.ExcludeInterfaces = []string{"eth1"}
			}
			if _, err := d.Enroll(p.NetNS, datapath.Pod{Rules: defaultRules(), TC: way}); err != nil && way == datapath.TCX {
				t.Skip(err)
			}
			e := p.Enroll(d, pod)
			if len(e.Notes) != 1 {
				t.Errorf("enrolment notes %v, want one that eth1 is not there", e.Notes)
			}
			before := stateOf(t, opts.Dir).Links

			wireSecond(p) // an excluded one
			refresh(t, d, p)
			packet := func(send func(*kit.Pod, string, []byte) error) bool {
				return comesOut(t, p, "eth1", handMadeSYN(wires[1].pod4, wires[1].far4), send)
			}
			if !packet(wireWays[1].send) {
				t.Error("a raw SYN does not pass the excluded interface")
			}
			if diff := cmp.Diff(before, stateOf(t, opts.Dir).Links); diff != "" {
				t.Error("programs on an excluded interface:", diff)
			}

			rename(t, p, "eth1", "net9") // not excluded by that name
			changes := refresh(t, d, p)
			rename(t, p, "net9", "eth1x")
			refreshes(t, d, p)
			rename(t, p, "eth1x", "eth1")
			if want := "program attached: guard to net9"; !contains(changes, want) {
				t.Errorf("refresh says %v, without %q", changes, want)
			}
			// excluded again: the guard goes
			refresh(t, d, p)
			if !packet(wireWays[1].send) {
				t.Error("a raw SYN does not pass the interface that is excluded again")
			}
			p.Netlink(func(h *netlink.Handle) error {
				l, err := h.LinkByName("eth1")
				if err != nil {
					return err
				}
				return h.LinkDel(l)
			})
			refresh(t, d, p)
			if diff := cmp.Diff(before, stateOf(t, opts.Dir).Links); diff != "" {
				t.Error("an interface that is gone leaves:", diff)
			}
			wireThird(p)
			refresh(t, d, p)
			if comesOut(t, p, "eth2", handMadeSYN(wires[1].pod4, wires[1].far4), sendOn("eth2")) {
				t.Error("a raw SYN passes a new interface")
			}
			p.Netlink(func(h *netlink.Handle) error {
				l, err := h.LinkByName("eth2")
				if err != nil {
					return err
				}
				return h.LinkDel(l)
			})
			refresh(t, d, p)
			if diff := cmp.Diff(before, stateOf(t, opts.Dir).Links); diff != "" {
				t.Error("an interface with a guard that is gone leaves:", diff)
			}
			if _, err := os.Stat(filepath.Join(opts.Dir, datapath.Layout, "links", "pods", fmt.Sprint(p.Cookie()))); err != nil {
				t.Error(err)
			}
		})
	}
}

// The new guard is counted on as well by who starts the node's programs again.
func TestRefreshKnowsTheInterfacesAfterARestart(t *testing.T) {
	d, opts := ownDatapath(t)
	w := newTown(t)
	w.Enroll(d, exclude("eth1"))
	again, err := datapath.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	wireSecond(w.Pod)
	w.check(t, "not seen yet", everyWay(kit.App, wires[1].far4, wires[1].far6, toOutbound)...)
	refresh(t, again, w.Pod)
	w.check(t, "seen", everyWay(kit.App, wires[1].far4, wires[1].far6, toServer)...)
}

func TestRefreshOfAFullTableKeepsWhatWas(t *testing.T) {
	d, opts := ownDatapath(t)
	w := newTwoWires(t)
	w.Enroll(d, exclude("eth1"))
	fillTrie(t, filepath.Join(opts.Dir, datapath.Layout, "maps", "routes4"))
	before := stateOf(t, opts.Dir).Entries
	addRoutes(t, w.Pod, "eth1", 3)
	if _, err := d.Refresh(w.NetNS); !errors.Is(err, datapath.ErrTableFull) {
		t.Errorf("refresh: %v, want %v", err, datapath.ErrTableFull)
	}
	if diff := cmp.Diff(before, stateOf(t, opts.Dir).Entries); diff != "" {
		t.Error("it leaves:", diff)
	}
	w.check(t, "as it was", everyWay(kit.App, wires[1].far4, wires[1].far6, toServer)...)
}

func TestRefreshOfANamespaceThatIsNotEnrolled(t *testing.T) {
	d := kit.Datapath(t)
	if _, err := d.Refresh(kit.NewPod(t).NetNS); !errors.Is(err, datapath.ErrNotEnrolled) {
		t.Errorf("refresh: %v, want %v", err, datapath.ErrNotEnrolled)
	}
}
