package netns

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// nothingStopped fails if the guard has stopped anything of the pod's.
func nothingStopped(t *testing.T, p *kit.Pod, d *datapath.Datapath) {
	t.Helper()
	if n := p.Stat(d, byGuard) + p.Stat(d, byLoopback); n != 0 {
		t.Errorf("the guard stopped %d packets", n)
	}
}

func TestGuardLeavesAloneWhatThePodForwards(t *testing.T) {
	d := kit.Datapath(t)
	inner4, outer4 := netip.MustParseAddr("10.97.0.2"), netip.MustParseAddr("10.97.0.1")
	inner6, outer6 := netip.MustParseAddr("fd97::2"), netip.MustParseAddr("fd97::1")
	for _, way := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
		t.Run(string(way), func(t *testing.T) {
			p := kit.NewPod(t)
			behind := &kit.Pod{NS: kit.NewNS(t, "behind"), Far: p.NS}
			behind.Wire("eth2", netip.PrefixFrom(inner4, 24), netip.PrefixFrom(outer4, 24), netip.PrefixFrom(inner6, 64), netip.PrefixFrom(outer6, 64))
			behind.AddRoute("0.0.0.0/0", outer4)
			behind.AddRoute("::/0", outer6)
			p.Far.AddRoute("10.97.0.0/24", kit.Pod4)
			p.Far.AddRoute("fd97::/64", kit.Pod6)
			p.Sysctl("ipv4/ip_forward", "1")
			p.Sysctl("ipv6/conf/all/forwarding", "1")

			there := p.Far.Listen(kit.Root, at("[::]", 80))
			here := behind.Listen(kit.Root, at("[::]", 80))
			both := func(when string) {
				for _, c := range []struct {
					from     *kit.NS
					family   int
					src, dst netip.Addr
					to       *kit.Sock
				}{
					{behind.NS, unix.AF_INET, inner4, kit.Far4, there}, {behind.NS, unix.AF_INET6, inner6, kit.Far6, there},
					{p.Far, unix.AF_INET, kit.Far4, inner4, here}, {p.Far, unix.AF_INET6, kit.Far6, inner6, here},
				} {
					client, err := c.from.Dial(kit.App, c.family, ap(c.dst, 80))
					if err != nil {
						t.Errorf("%s, %v to %v: %v", when, c.src, c.dst, err)
						continue
					}
					server := c.to.MustAccept()
					if server.Peer().Addr() != c.src {
						t.Errorf("%s: the server's peer is %v, want %v", when, server.Peer(), c.src)
					}
					kit.Exchange(t, client, server, 1<<16)
				}
			}
			both("without Sluice")
			p.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = way })
			proxyListeners(p)
			both("enrolled")
			nothingStopped(t, p, d)
		})
	}
}

func TestGuardLeavesAloneTheProxyByUIDOrGIDAndExcludedDestinations(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	for _, f := range families {
		server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
		for _, tt := range []struct {
			name   string
			who    kit.ID
			change func(*rules.Rules)
		}{
			{"UID and GID", kit.Proxy, func(*rules.Rules) {}},
			{"UID alone", kit.ProxyUID, func(*rules.Rules) {}},
			{"GID alone", kit.ProxyGID, func(*rules.Rules) {}},
			{"excluded port", kit.App, func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{80} }},
			{"excluded address", kit.App, func(r *rules.Rules) { r.ExcludeOutboundCIDRs = prefixes("10.99.0.1/32", "fd99::1/128") }},
			{"not included", kit.App, func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} }},
		} {
			p.Enroll(d, func(pod *datapath.Pod) { tt.change(&pod.Rules) })
			client, err := p.Dial(tt.who, f.socket, ap(f.far, 80))
			if err != nil {
				t.Errorf("%s, %s: dial: %v", f.name, tt.name, err)
				continue
			}
			accepted := server.MustAccept()
			if accepted.Peer() != client.Name() || client.Name().Addr() != f.pod {
				t.Errorf("%s, %s: the server's peer is %v, the client's name %v", f.name, tt.name, accepted.Peer(), client.Name())
			}
			kit.Exchange(t, client, accepted, 1<<16)
		}
		server.Close()
	}
	nothingStopped(t, p, d)
}

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

func TestGuardLeavesAloneServersOnExcludedInboundPorts(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
		for _, f := range families {
			t.Run(string(way)+"/"+f.name, func(t *testing.T) {
				p := kit.NewPod(t)
				p.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = way; pod.Rules.ExcludeInboundPorts = []uint16{9090} })
				for _, port := range []int{9090, 15008, 15020, 15021, 15090} {
					app := p.Listen(kit.App, at(f.wildcard, port))
					client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, port))
					if err != nil {
						t.Fatalf("dial port %d: %v", port, err)
					}
					kit.Exchange(t, client, app.MustAccept(), 1000)
				}
				nothingStopped(t, p, d)
			})
		}
	}
}

func TestConnectionsThatWereOpenAtEnrolmentGoOn(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			far, app := p.Far.Listen(kit.Root, at(f.wildcard, 80)), p.Listen(kit.App, at(f.wildcard, 8080))
			out, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
			if err != nil {
				t.Fatal(err)
			}
			in, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
			if err != nil {
				t.Fatal(err)
			}
			outFar, inApp := far.MustAccept(), app.MustAccept()
			kit.Exchange(t, out, outFar, 1000)
			name, peer := out.Name(), out.Peer()
			exchange := func() {
				kit.Exchange(t, out, outFar, 1<<18)
				kit.Exchange(t, in, inApp, 1<<18)
				if out.Name() != name || out.Peer() != peer || peer != ap(f.far, 80) {
					t.Errorf("the names became %v and %v", out.Name(), out.Peer())
				}
			}
			p.Enroll(d, kit.ByTC)
			exchange()
			proxyListeners(p)
			exchange()
			nothingStopped(t, p, d)
			if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
				t.Fatal(err)
			}
			exchange()
		})
	}
}

// A SYN is kept waiting: its destination has no neighbour entry yet. The kernel
// asks for it three times, a second apart.
func TestAConnectThatWaitsAtEnrolmentGoesOn(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			late := netip.PrefixFrom(netip.MustParseAddr("10.99.0.77"), 24)
			if f.far.Is6() {
				late = netip.PrefixFrom(netip.MustParseAddr("fd99::77"), 64)
			}
			p := kit.NewPod(t)
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			s, err := p.Socket(kit.App, f.socket)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.SetNonblock(s.FD, true); err != nil {
				t.Fatal(err)
			}
			if err := s.Connect(ap(late.Addr(), 80)); err != unix.ETIMEDOUT { // the kit's word for "in progress"
				t.Fatal("the connect does not wait:", err)
			}
			p.Hold(kit.App, s)
			if e := p.Enroll(d); e.Before != 1 {
				t.Errorf("enrolment saw %d connects under way, want 1", e.Before)
			}
			p.Far.AddAddr("eth0", late)
			if err := s.Finish(); err != nil {
				t.Fatal("the connect ends with", err)
			}
			if err := unix.SetNonblock(s.FD, false); err != nil {
				t.Fatal(err)
			}
			kit.Exchange(t, s, server.MustAccept(), 1<<16)
			nothingStopped(t, p, d)
		})
	}
}

func TestSomebodyElsesFilterStaysWhenThePodIsUnenrolled(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	filters := func() (names []string, qdisc bool) {
		p.Netlink(func(h *netlink.Handle) error {
			l, err := h.LinkByName("eth0")
			if err != nil {
				return err
			}
			qdiscs, err := h.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				qdisc = qdisc || q.Type() == "clsact"
			}
			for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
				found, err := h.FilterList(l, parent)
				if err != nil && qdisc {
					return err
				}
				for _, f := range found {
					if bpf, ok := f.(*netlink.BpfFilter); ok {
						names = append(names, bpf.Name)
					}
				}
			}
			return nil
		})
		return names, qdisc
	}
	p.Enroll(d, kit.ByTC)
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	if names, qdisc := filters(); qdisc || len(names) != 0 {
		t.Errorf("after un-enrolment there are filters %v, clsact %v", names, qdisc)
	}
	if n := tcxPrograms(t, p, "eth0"); n != 0 {
		t.Errorf("after un-enrolment there are %d TCX programs", n)
	}

	somebodys := addFilter(t, p, "eth0")
	p.Enroll(d, kit.ByTC)
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	if names, qdisc := filters(); !qdisc || len(names) != 1 || names[0] != somebodys {
		t.Errorf("after un-enrolment there are filters %v, clsact %v; somebody else's is %s", names, qdisc, somebodys)
	}
}
