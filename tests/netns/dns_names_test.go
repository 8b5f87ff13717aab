package netns

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// A connected socket that sends a query to another server by name keeps its peer,
// enrolled or not.
func TestDNSAConnectedSocketThatAsksAnotherServer(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range dnsFamilies {
		p := newDNSPod(t)
		nameServer{"other port", farServer.v4, farServer.v6}.serve(t, p.Far, kit.Root, "[::]:54")
		for _, enrolled := range []bool{false, true} {
			want := "far"
			if enrolled {
				enrollDNS(p, d)
				startDNSProxy(t, p)
				want = "proxy"
			}
			for _, port := range []int{53, 54} {
				a := newAsker(t, p, kit.App, f.socket)
				peer, other := ap(f.servers[0], port), ap(f.servers[1], 53)
				if err := a.connect(peer); err != nil {
					t.Fatal(err)
				}
				if err := p.As(kit.App, func() error { return a.SendTo(other, query(t, "who.test.")) }); err != nil {
					t.Fatal(err)
				}
				if enrolled && port == 53 { // answered by its peer, the DNS proxy
					if _, from, err := a.RecvFrom(kit.Patience); err != nil || from != peer {
						t.Errorf("%s: the answer is from %v, %v", f.name, from, err)
					}
				} else if _, from, err := a.RecvFrom(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
					t.Errorf("%s, port %d, enrolled %v: an answer from %v, %v", f.name, port, enrolled, from, err)
				}
				if a.Peer() != peer {
					t.Errorf("%s, port %d, enrolled %v: the peer is %v, want %v", f.name, port, enrolled, a.Peer(), peer)
				}
				who := want
				if port == 54 {
					who = "other port"
				}
				for _, to := range []netip.AddrPort{peer, {}} { // by name, and as its peer
					if got, from, err := a.ask(to); err != nil || got != who || from != peer {
						t.Errorf("%s, port %d, enrolled %v: %s answers from %v, %v", f.name, port, enrolled, got, from, err)
					}
				}
			}
		}
	}
}

// Calling another of the pod's own addresses, a socket has that as its source.
func TestDNSOfAServerInThePod(t *testing.T) {
	d := kit.Datapath(t)
	second := map[bool]netip.Addr{true: netip.MustParseAddr("10.98.0.7"), false: netip.MustParseAddr("fd99::7")}
	p := newDNSPod(t)
	p.AddAddr("eth0", netip.PrefixFrom(second[true], 24))
	p.AddAddr("eth0", netip.PrefixFrom(second[false], 64))
	nameServer{"local", farServer.v4, farServer.v6}.serve(t, p.NS, kit.Root, "[::]:53")
	for _, enrolled := range []bool{false, true} {
		want := "local"
		if enrolled {
			enrollDNS(p, d)
			startDNSProxy(t, p)
			want = "proxy"
		}
		for _, f := range dnsFamilies {
			to := ap(second[f.far.Is4()], 53)
			a := newAsker(t, p, kit.App, f.socket)
			if err := a.connect(to); err != nil {
				t.Fatal(err)
			}
			who, from, err := a.ask(netip.AddrPort{})
			if err != nil || who != want || from != to || a.Name().Addr() != to.Addr() || a.Peer() != to {
				t.Errorf("UDP, %s, enrolled %v: %v to %v, %s answers from %v, %v", f.name, enrolled, a.Name(), a.Peer(), who, from, err)
			}
			c, err := p.Dial(kit.App, f.socket, to)
			if err != nil {
				t.Fatal(err)
			}
			if c.Name().Addr() != to.Addr() || c.Peer() != to {
				t.Errorf("TCP, %s, enrolled %v: %v to %v", f.name, enrolled, c.Name(), c.Peer())
			}
			c.Close()
		}
	}
}
