package datapath

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

const (
	other    = connectRouteKindROUTE_OTHER
	excluded = connectRouteKindROUTE_EXCLUDED
	local    = connectRouteKindROUTE_LOCAL
)

func TestCompileRoutes(t *testing.T) {
	const eth0, net1, net2 = 2, 3, 4 // net1 and net2 are excluded
	interfaces := map[uint32]connectInterfaceKind{net1: connectInterfaceKindINTERFACE_EXCLUDED, net2: connectInterfaceKindINTERFACE_EXCLUDED}
	route := func(dst string, metric uint32, links ...int) netns.Route {
		return netns.Route{Dst: netip.MustParsePrefix(dst), Metric: metric, Links: links}
	}
	partial := func(r netns.Route) netns.Route { r.Partial = true; return r }
	type table = map[netip.Prefix]connectRouteKind
	at := func(dst string, kind connectRouteKind) table { return table{netip.MustParsePrefix(dst): kind} }
	both := func(tables ...table) table {
		out := table{}
		for _, x := range tables {
			maps.Copy(out, x)
		}
		return out
	}
	for _, tt := range []struct {
		name   string
		routes []netns.Route
		local  []string
		want   table
	}{
		{"none", nil, nil, table{}},
		{"what makes no difference", []netns.Route{route("0.0.0.0/0", 0, eth0), route("10.0.0.0/8", 0, eth0), route("::/0", 0, eth0)}, nil, table{}},
		{"excluded", []netns.Route{route("0.0.0.0/0", 0, eth0), route("10.0.0.0/8", 0, net1), route("fd00::/8", 0, net2)}, nil,
			both(at("10.0.0.0/8", excluded), at("fd00::/8", excluded))},
		{"excluded inside excluded", []netns.Route{route("0.0.0.0/0", 0, net1), route("10.0.0.0/8", 0, net2)}, nil, at("0.0.0.0/0", excluded)},
		{"not excluded inside excluded", []netns.Route{route("0.0.0.0/0", 0, net1), route("10.0.0.0/8", 0, eth0), route("10.1.0.0/16", 0, net1)}, nil,
			both(at("0.0.0.0/0", excluded), at("10.0.0.0/8", other), at("10.1.0.0/16", excluded))},
		{"the lower metric", []netns.Route{route("10.0.0.0/8", 100, eth0), route("10.0.0.0/8", 50, net1)}, nil, at("10.0.0.0/8", excluded)},
		{"the lower metric is not excluded", []netns.Route{route("10.0.0.0/8", 50, net1), route("10.0.0.0/8", 0, eth0)}, nil, table{}},
		{"equal metrics", []netns.Route{route("fd00::/8", 50, net1), route("fd00::/8", 50, eth0)}, nil, table{}},
		{"several next hops, all excluded", []netns.Route{route("10.0.0.0/8", 0, net1, net2)}, nil, at("10.0.0.0/8", excluded)},
		{"several next hops, not all excluded", []netns.Route{route("10.0.0.0/8", 0, net1, eth0)}, nil, table{}},
		{"unreachable inside excluded", []netns.Route{route("0.0.0.0/0", 0, net1), route("10.0.0.0/8", 0)}, nil,
			both(at("0.0.0.0/0", excluded), at("10.0.0.0/8", other))},
		{"for some sources only", []netns.Route{route("fd00::/8", 50, net1), partial(route("fd00::/8", 10, eth0))}, nil, table{}},
		{"excluded for some sources only", []netns.Route{partial(route("fd00::/8", 0, net1))}, nil, table{}},
		{"local", []netns.Route{route("0.0.0.0/0", 0, eth0)}, []string{"10.0.0.0/8", "10.99.0.2/32", "fd95::/64"},
			both(at("10.0.0.0/8", local), at("fd95::/64", local))},
		{"local beside main", []netns.Route{route("10.1.0.0/16", 0, eth0), route("10.0.0.0/7", 0, net1)}, []string{"10.0.0.0/8"},
			both(at("10.0.0.0/7", excluded), at("10.0.0.0/8", local), at("10.1.0.0/16", other))},
		{"of IPv6, local comes before main", []netns.Route{route("fd00:1::/32", 0, net1), route("fc00::/7", 0, net1)}, []string{"fd00::/8"},
			both(at("fc00::/7", excluded), at("fd00::/8", local))},
		{"the same prefix", []netns.Route{route("10.0.0.0/8", 0, net1)}, []string{"10.0.0.0/8"}, at("10.0.0.0/8", local)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			network := netns.Network{Routes: tt.routes}
			for _, p := range tt.local {
				network.Local = append(network.Local, netip.MustParsePrefix(p))
			}
			got := compileRoutes(network, interfaces, true)
			if diff := cmp.Diff(tt.want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
			for p, kind := range compileRoutes(network, interfaces, false) {
				if kind != local {
					t.Errorf("without named interfaces there is %s: %d", p, kind)
				}
			}
		})
	}
}

// randomTable has overlapping prefixes below 10.0.0.0/8, so that a few addresses
// meet most of them.
func randomTable(r *rand.Rand) map[netip.Prefix]connectRouteKind {
	out := map[netip.Prefix]connectRouteKind{}
	for range r.IntN(12) {
		bits := []int{0, 8, 30, 31, 32}[r.IntN(5)]
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(4))}), bits).Masked()
		out[p] = connectRouteKind(1 + r.IntN(3))
	}
	return out
}

func TestRouteStepsNeverShowWhatNeitherTableSays(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 20000 {
		old, new := randomTable(r), randomTable(r)
		now := maps.Clone(old)
		for _, step := range routeSteps(old, new) {
			if step.kind == nil {
				delete(now, step.prefix)
			} else {
				now[step.prefix] = step.kind.(connectRouteKind)
			}
			for last := range byte(5) {
				a := netip.AddrFrom4([4]byte{10, 0, 0, last})
				if got, was, will := tableVerdict(now, a), tableVerdict(old, a), tableVerdict(new, a); got != was && got != will {
					t.Fatalf("from %v to %v, after %v: %s is judged %d, neither %d nor %d", old, new, step, a, got, was, will)
				}
			}
		}
		if !maps.Equal(now, new) {
			t.Fatalf("from %v the steps lead to %v, not to %v", old, now, new)
		}
	}
}

func TestInterfacesThatCarryExcludedOnes(t *testing.T) {
	network := netns.Network{Links: []netns.Link{
		{Index: 1, Name: "lo"}, {Index: 2, Name: "eth0"}, {Index: 3, Name: "eth0.100", Parent: 2}, {Index: 4, Name: "eth1", Master: 6},
		{Index: 5, Name: "eth1.7", Parent: 4}, {Index: 6, Name: "br0"}, {Index: 7, Name: "eth2"}, {Index: 8, Name: "eth2.1", Parent: 7},
	}}
	names := map[string]connectInterfaceKind{"eth0.100": connectInterfaceKindINTERFACE_EXCLUDED, "br0": connectInterfaceKindINTERFACE_EXCLUDED, "none": connectInterfaceKindINTERFACE_EXCLUDED}
	want := map[uint32]connectInterfaceKind{
		3: connectInterfaceKindINTERFACE_EXCLUDED, 6: connectInterfaceKindINTERFACE_EXCLUDED,
		2: connectInterfaceKindINTERFACE_CARRIER, 4: connectInterfaceKindINTERFACE_CARRIER,
	}
	if diff := cmp.Diff(want, interfacesOf(network, names)); diff != "" {
		t.Error(diff)
	}
}

// The kernel's own choice of an interface is the judge of what is compiled.
func TestCompiledRoutesAreWhatTheKernelDoes(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("SLUICE_REQUIRE_ROOT") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	for range 20 {
		checkAgainstTheKernel(t, r)
	}
}

func checkAgainstTheKernel(t *testing.T, r *rand.Rand) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h, err := ns.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links := wires(t, h, "eth0", "net1", "net2")
	var added []string
	for range 25 {
		route := randomRoute(r, links)
		if err := h.RouteAppend(&route); err == nil { // many are refused: that is the kernel's word too
			added = append(added, fmt.Sprintf("%+v", route))
		}
	}
	network, err := ns.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]connectInterfaceKind{"net1": connectInterfaceKindINTERFACE_EXCLUDED, "net2": connectInterfaceKindINTERFACE_EXCLUDED}
	entries := networkOf(network, names)
	for range 200 {
		a := randomAddr(r)
		got := tableVerdict(entries.routes, a)
		if entries.own[toAddr(a)] == connectOwnKindOWN_ADDR { // which is asked first
			got = local
		}
		routes, err := h.RouteGet(a.AsSlice())
		isLocal := err == nil && routes[0].Type == unix.RTN_LOCAL
		isExcluded := err == nil && !isLocal && routes[0].Type == unix.RTN_UNICAST && entries.excludes(routes[0].LinkIndex)
		if (got == local) != isLocal {
			t.Fatalf("%s: compiled as %d, but the kernel says %v %v\n%v", a, got, routes, err, added)
		}
		// With several next hops the kernel may choose an excluded one: captured all the same.
		if got == excluded && !isExcluded {
			t.Fatalf("%s: compiled as excluded, but the kernel says %v %v\n%v", a, routes, err, added)
		}
		if isExcluded && got != excluded && !spread(network, a) {
			t.Fatalf("%s: compiled as %d, but the kernel says %v\n%v", a, got, routes, added)
		}
	}
}

func wires(t *testing.T, h *netlink.Handle, names ...string) (out []int) {
	for i, name := range names {
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "p-" + name}); err != nil {
			t.Fatal(err)
		}
		l, err := h.LinkByName(name)
		peer, err2 := h.LinkByName("p-" + name)
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		if err := h.LinkSetUp(peer); err != nil {
			t.Fatal(err)
		}
		a4 := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, byte(i), 1), Mask: net.CIDRMask(24, 32)}}
		a6 := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(fmt.Sprintf("fd00:%d::1", i)), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}
		if err := errors.Join(h.AddrAdd(l, a4), h.AddrAdd(l, a6), h.LinkSetUp(l)); err != nil {
			t.Fatal(err)
		}
		out = append(out, l.Attrs().Index)
		awaitLocal(t, h, a6.IP)
	}
	return out
}

// awaitLocal: the kernel completes an IPv6 address in a work queue.
func awaitLocal(t *testing.T, h *netlink.Handle, a net.IP) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		routes, err := h.RouteGet(a)
		if err == nil && routes[0].Type == unix.RTN_LOCAL {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not local: %v, %v", a, routes, err)
		}
	}
}

// randomAddr is one of few, so that routes and questions meet.
func randomAddr(r *rand.Rand) netip.Addr {
	if r.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte{10, byte(r.IntN(3)), byte(r.IntN(3)), byte(1 + r.IntN(3))})
	}
	var b [16]byte
	b[0], b[3], b[7], b[15] = 0xfd, byte(r.IntN(3)), byte(r.IntN(2)), byte(1+r.IntN(3))
	return netip.AddrFrom16(b)
}

func randomRoute(r *rand.Rand, links []int) netlink.Route {
	a := randomAddr(r)
	bits := []int{0, 8, 16, 24, 30, 32}[r.IntN(6)]
	if a.Is6() {
		bits = []int{0, 8, 32, 64, 127, 128}[r.IntN(6)]
	}
	p := netip.PrefixFrom(a, bits).Masked()
	out := netlink.Route{
		Dst:      &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())},
		Priority: 10 * r.IntN(3), LinkIndex: links[r.IntN(len(links))], Scope: netlink.SCOPE_LINK,
	}
	switch r.IntN(8) {
	case 0:
		out.Type, out.LinkIndex, out.Scope = []int{unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT}[r.IntN(3)], 0, 0
	case 1:
		out.Type, out.Table, out.LinkIndex, out.Scope = unix.RTN_LOCAL, unix.RT_TABLE_LOCAL, 1, netlink.SCOPE_HOST
	case 2:
		out.LinkIndex = 0
		for range 2 {
			out.MultiPath = append(out.MultiPath, &netlink.NexthopInfo{LinkIndex: links[r.IntN(len(links))]})
		}
	}
	return out
}

func tableVerdict(table map[netip.Prefix]connectRouteKind, a netip.Addr) connectRouteKind {
	for bits := a.BitLen(); bits >= 0; bits-- {
		if kind, ok := table[netip.PrefixFrom(a, bits).Masked()]; ok {
			return kind
		}
	}
	return other
}

// spread says whether several interfaces, or none, share the routes of the prefix
// that an address meets.
func spread(network netns.Network, a netip.Addr) bool {
	longest, metric := -1, uint32(0)
	links := map[int]bool{}
	for _, r := range network.Routes {
		if r.Dst.Addr().BitLen() != a.BitLen() || !r.Dst.Contains(a) || r.Dst.Bits() < longest {
			continue
		}
		if r.Dst.Bits() > longest || r.Metric < metric {
			longest, metric = r.Dst.Bits(), r.Metric
			clear(links)
		}
		if r.Metric == metric {
			for _, l := range r.Links {
				links[l] = true
			}
			if len(r.Links) == 0 {
				links[0] = true
			}
		}
	}
	return len(links) > 1
}
