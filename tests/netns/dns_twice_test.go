package netns

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// dnsTarget is one connect of a UDP socket: to port 53, which is captured, or to
// another, which is not.
type dnsTarget struct {
	name string
	to   netip.AddrPort
}

func (x dnsTarget) captured() bool { return x.to.Port() == 53 }
func (x dnsTarget) loopback() bool { return x.to.Addr().IsLoopback() }
func (x dnsTarget) far() bool      { return slices.Contains(slices.Concat(servers4, servers6), x.to.Addr()) }

func dnsTargets(family string, servers []netip.Addr, pod, lo netip.Addr) []dnsTarget {
	out := []dnsTarget{
		{"a server", ap(servers[0], 53)},
		{"another server", ap(servers[1], 53)},
		{"another port", ap(servers[0], 54)},
		{"a loopback server", ap(lo, 53)},
		{"the pod's own server", ap(pod, 53)},
		{"loopback", ap(lo, 54)},
		{"the pod's own address", ap(pod, 54)},
		{"the DNS proxy itself", ap(lo, 15053)},
	}
	for i := range out {
		out[i].name += " by " + family
	}
	return out
}

// newDNSTwicePod is a pod that has a server at every target.
func newDNSTwicePod(t *testing.T, d *datapath.Datapath) *kit.Pod {
	p := newDNSPod(t)
	server := nameServer{"direct", farServer.v4, farServer.v6}
	server.serve(t, p.Far, kit.Root, "[::]:54")
	server.serve(t, p.NS, kit.Root, "[::]:54")
	server.serve(t, p.NS, kit.Root, "[::]:53")
	startDNSProxy(t, p)
	if d != nil {
		enrollDNS(p, d)
	}
	return p
}

// fare is how a connect goes, what the socket shows then, and who answers.
type fare struct {
	Connect, Ask string // the error
	Peer, Name   string // the name without its port
	From         string
	proxy        bool
}

func (a asker) fare(to dnsTarget) fare {
	if err := a.connect(to.to); err != nil {
		return fare{Connect: errno(err).Error()}
	}
	out := fare{Peer: a.Peer().String(), Name: a.Name().Addr().String()}
	who, from, err := a.ask(netip.AddrPort{})
	if err != nil {
		out.Ask = errno(err).Error()
		return out
	}
	out.From, out.proxy = from.String(), who == "proxy"
	return out
}

// dnsTwice is one socket that connects to two targets.
type dnsTwice struct {
	family        int
	bound, unspec bool // to a port; AF_UNSPEC between
	first, second dnsTarget
}

// fares of both connects, and between them what the socket shows after AF_UNSPEC.
func (x dnsTwice) run(t *testing.T, p *kit.Pod) [3]fare {
	t.Helper()
	var options []kit.Option
	if x.bound {
		options = append(options, kit.Bind(netip.AddrPortFrom(dnsFamily{family: family{socket: x.family}}.any(), 5353)))
	}
	a := newAsker(t, p, kit.App, x.family, options...)
	defer a.Close()
	out := [3]fare{a.fare(x.first)}
	if x.unspec {
		if err := a.Disconnect(); err != nil {
			t.Fatal("disconnect:", err)
		}
		out[1].Name = a.Name().Addr().String()
	}
	out[2] = a.fare(x.second)
	return out
}

// hangs: the kernel lets an AF_INET6 socket that has spoken one family connect by
// the other, and then delivers no answer to it; and it lets an IPv6 one connect
// afar from ::1.
func (x dnsTwice) hangs() bool {
	first6, second6 := x.first.to.Addr().Is6(), x.second.to.Addr().Is6()
	if x.fromLoopback() && second6 && !x.second.captured() {
		return true
	}
	if x.unspec {
		return !first6 && second6 && x.first.far() && x.second.far()
	}
	return first6 && !second6
}

func (x dnsTwice) oneFamily() bool { return x.first.to.Addr().Is4() == x.second.to.Addr().Is4() }

// fromLoopback: connected to loopback first, it keeps that source, from which
// nothing comes back from afar. Captured, it does.
func (x dnsTwice) fromLoopback() bool {
	return !x.unspec && x.oneFamily() && x.first.loopback() && x.second.far()
}

// stuck: what the app has bound to a port cannot be bound to a source, and an
// IPv6 socket should not: connected to loopback by capture, it keeps that source
// as well.
func (x dnsTwice) stuck() bool {
	return !x.unspec && x.oneFamily() && (x.bound || x.first.to.Addr().Is6()) &&
		x.first.captured() && !x.first.loopback() && !x.second.captured()
}

// fares of the socket in a pod without Sluice and in an enrolled one, and what
// the latter should be.
func (x dnsTwice) compare(t *testing.T, plain, enrolled *kit.Pod) (want, got [3]fare) {
	t.Helper()
	alone := x
	if x.fromLoopback() && x.second.captured() {
		alone.second = x.first
	}
	want, got = alone.run(t, plain), x.run(t, enrolled)
	switch lo := want[2].Name; {
	case x.fromLoopback() && x.second.captured():
		want[2] = fare{Peer: x.second.to.String(), Name: lo, From: x.second.to.String()}
	case x.stuck() && x.second.far():
		want[2] = fare{Connect: unix.EINVAL.Error()}
	case x.stuck():
		want[2].Name = map[bool]string{true: lo4.String(), false: lo6.String()}[x.first.to.Addr().Is4()]
	}
	return want, got
}

func TestDNSOneSocketConnectsTwiceAsWithoutSluice(t *testing.T) {
	d := kit.Datapath(t)
	plain, enrolled := newDNSTwicePod(t, nil), newDNSTwicePod(t, d)
	targets4 := dnsTargets("v4", servers4, kit.Pod4, lo4)
	targets := map[int][]dnsTarget{
		unix.AF_INET:  targets4,
		unix.AF_INET6: append(dnsTargets("v6", servers6, kit.Pod6, lo6), targets4...),
	}
	for family, targets := range targets {
		for _, first := range targets {
			for _, second := range targets {
				for i := range 4 {
					x := dnsTwice{family, i&1 != 0, i&2 != 0, first, second}
					if x.hangs() {
						continue
					}
					name := fmt.Sprintf("family %d, %s, then %s, bound %v, AF_UNSPEC between %v", family, first.name, second.name, x.bound, x.unspec)
					t.Run(name, func(t *testing.T) {
						want, got := x.compare(t, plain, enrolled)
						for i, to := range map[int]dnsTarget{0: first, 2: second} {
							if got[i].From != "" && got[i].proxy != (to.captured() || to.to.Port() == 15053) {
								t.Errorf("%s: the proxy answers: %v", to.name, got[i].proxy)
							}
							got[i].proxy, want[i].proxy = false, false
						}
						if diff := cmp.Diff(want, got, cmp.AllowUnexported(fare{})); diff != "" {
							t.Errorf("the two connects, and AF_UNSPEC, end otherwise:\n%s", diff)
						}
					})
				}
			}
		}
	}
}
