package netns

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

func TestDNSByUDPGoesToTheProxy(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range dnsFamilies {
		for name, bound := range map[string][]kit.Option{
			"": nil, ", bound to a port": {kit.Bind(netip.AddrPortFrom(f.any(), 5353))},
			", bound to the pod's address": {kit.Bind(ap(f.pod, 5353))},
		} {
			for _, connected := range []bool{true, false} {
				way := map[bool]string{true: "connected", false: "unconnected"}[connected]
				t.Run(f.name+", "+way+name, func(t *testing.T) {
					p := newDNSPod(t)
					check := func(want string) {
						t.Helper()
						a := newAsker(t, p, kit.App, f.socket, bound...)
						defer a.Close()
						checkAsks(t, a, f, connected, want)
					}
					check("far")
					enrollDNS(p, d)
					startDNSProxy(t, p)
					before := p.Stat(d, "captured-dns")
					check("proxy")
					if got := p.Stat(d, "captured-dns") - before; got != 1 {
						t.Errorf("captured-dns counts %d, want one per connect or datagram", got)
					}
				})
			}
		}
	}
}

// checkAsks asks once, and wants names and addresses that are the same with and
// without Sluice.
func checkAsks(t *testing.T, a asker, f dnsFamily, connected bool, want string) {
	t.Helper()
	to, bound := f.server(), a.Name()
	if connected {
		if err := a.connect(to); err != nil {
			t.Fatal("connect:", err)
		}
		to = netip.AddrPort{}
		if a.Peer() != f.server() {
			t.Errorf("asking %s: the peer is %v, want %v", want, a.Peer(), f.server())
		}
		if a.Name().Addr() != f.source() {
			t.Errorf("asking %s: the name is %v, want address %v", want, a.Name(), f.source())
		}
	}
	who, from, err := a.ask(to)
	if err != nil {
		t.Fatalf("asking %s: %v", want, err)
	}
	if who != want || from != f.server() {
		t.Errorf("%s answers from %v, want %s from %v", who, from, want, f.server())
	}
	if !connected && a.Name().Addr() != bound.Addr() {
		t.Errorf("asking %s: the name is %v, want address %v", want, a.Name(), bound.Addr())
	}
}

// The DNS proxy's TCP socket is told which server was called.
func TestDNSByTCPGoesToTheProxyWithItsOriginalDestination(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range dnsFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			server := p.Far.Listen(kit.Root, "[::]:53")
			direct, err := p.Dial(kit.App, f.socket, ap(f.far, 53))
			if err != nil {
				t.Fatal("without Sluice:", err)
			}
			kit.Exchange(t, direct, server.MustAccept(), 1<<10)

			enrollDNS(p, d)
			if _, err := p.Dial(kit.App, f.socket, ap(f.far, 53)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("without a DNS proxy the dial ends with %v, want ECONNREFUSED", err)
			}
			proxy := map[bool]*kit.Sock{
				true:  p.Listen(kit.Proxy, "127.0.0.1:15053"),
				false: p.Listen(kit.Proxy, "[::1]:15053"),
			}[f.far.Is4()]
			client, err := p.Dial(kit.App, f.socket, ap(f.far, 53))
			if err != nil {
				t.Fatal(err)
			}
			accepted := proxy.MustAccept()
			if got, err := accepted.OrigDst(f.level); err != nil || got != ap(f.far, 53) {
				t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, ap(f.far, 53))
			}
			if client.Peer() != ap(f.far, 53) || client.Name().Addr() != f.pod || accepted.Peer() != client.Name() {
				t.Errorf("the client is %v to %v, the proxy's peer %v", client.Name(), client.Peer(), accepted.Peer())
			}
			kit.Exchange(t, client, accepted, 1<<20)
			if got := p.Stat(d, "captured-dns"); got != 2 {
				t.Errorf("captured-dns counts %d, want 2", got)
			}
			checkNothingReached(t, server)
			checkNoHandshakes(t, d, p)
		})
	}
}

// Whoever calls the DNS proxy itself reaches it, enrolled or not.
func TestDNSADirectCallOfTheProxysPort(t *testing.T) {
	d := kit.Datapath(t)
	p := newDNSPod(t)
	startDNSProxy(t, p)
	check := func(when string) {
		t.Helper()
		for _, to := range []string{"127.0.0.1:15053", "[::1]:15053"} {
			to := netip.MustParseAddrPort(to)
			family := map[bool]int{true: unix.AF_INET, false: unix.AF_INET6}[to.Addr().Is4()]
			for _, connected := range []bool{true, false} {
				a := newAsker(t, p, kit.App, family)
				target := to
				if connected {
					if err := a.connect(to); err != nil {
						t.Fatal(err)
					}
					target = netip.AddrPort{}
				}
				if who, from, err := a.ask(target); err != nil || who != "proxy" || from != to {
					t.Errorf("%s, connected %v: %s answers from %v, %v; want the proxy from %v", when, connected, who, from, err, to)
				}
			}
			client, err := p.Dial(kit.App, family, to)
			if err != nil {
				t.Errorf("%s: dial %v: %v", when, to, err)
				continue
			}
			if client.Peer() != to || client.Name().Addr() != to.Addr() {
				t.Errorf("%s: the client is %v to %v", when, client.Name(), client.Peer())
			}
		}
	}
	check("without Sluice")
	enrollDNS(p, d)
	check("enrolled")
}

// askAll asks several servers from one socket before it reads an answer, and
// returns the source that each answer had, by the server that was asked.
func (a asker) askAll(servers []netip.Addr) map[netip.Addr]netip.AddrPort {
	a.t.Helper()
	asked := map[uint16]netip.Addr{}
	for _, s := range servers {
		q := query(a.t, "who.test.")
		asked[uint16(q[0])<<8|uint16(q[1])] = s
		if err := a.p.As(a.id, func() error { return a.SendTo(ap(s, 53), q) }); err != nil {
			a.t.Fatalf("ask %v: %v", s, err)
		}
	}
	out := map[netip.Addr]netip.AddrPort{}
	for range servers {
		b, from, err := a.RecvFrom(kit.Patience)
		if err != nil {
			a.t.Fatal("receive:", err)
		}
		id, _ := answeredBy(a.t, b)
		out[asked[id]] = from
	}
	return out
}

// One socket asks several servers at once, as musl's resolver does. By IPv4 each
// answer is from its own server; by IPv6 from the one asked last.
func TestDNSOfSeveralServersFromOneSocket(t *testing.T) {
	d := kit.Datapath(t)
	for _, enrolled := range []bool{false, true} {
		p := newDNSPod(t)
		if enrolled {
			enrollDNS(p, d)
			startDNSProxy(t, p)
		}
		for _, f := range dnsFamilies {
			last := f.servers[len(f.servers)-1]
			for s, from := range newAsker(t, p, kit.App, f.socket).askAll(f.servers) {
				if enrolled && f.far.Is6() {
					s = last
				}
				if from != ap(s, 53) {
					t.Errorf("enrolled %v, %s: the answer of %v is from %v", enrolled, f.name, s, from)
				}
			}
		}
		mixed := []netip.Addr{servers4[0], servers6[1], servers4[1]}
		for s, from := range newAsker(t, p, kit.App, unix.AF_INET6).askAll(mixed) {
			if from != ap(s, 53) {
				t.Errorf("enrolled %v, both families from one socket: the answer of %v is from %v", enrolled, s, from)
			}
		}
	}
}

func TestDNSAnswersOfEverySize(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range dnsFamilies {
		p := newDNSPod(t)
		for _, enrolled := range []bool{false, true} {
			want := "far"
			if enrolled {
				enrollDNS(p, d)
				startDNSProxy(t, p)
				want = "proxy"
			}
			for name, size := range map[string]int{"512.big.test.": 512, "1232.big.test.": 1232, "4096.big.test.": 4096, "60000.big.test.": 60000} {
				for _, connected := range []bool{true, false} {
					a := newAsker(t, p, kit.App, f.socket)
					to := f.server()
					if connected {
						if err := a.connect(to); err != nil {
							t.Fatal(err)
						}
					}
					if err := p.As(kit.App, func() error { return a.SendTo(to, query(t, name)) }); err != nil {
						t.Fatal(err)
					}
					b, from, err := a.RecvFrom(kit.Patience)
					if err != nil {
						t.Fatalf("%s, enrolled %v, connected %v, %s: %v", f.name, enrolled, connected, name, err)
					}
					if _, who := answeredBy(t, b); who != want || from != to || len(b) < size {
						t.Errorf("%s, %s: %d bytes by %s from %v, want %s from %v", f.name, name, len(b), who, from, want, to)
					}
				}
			}
		}
	}
}

// Without a DNS proxy nothing is answered, and nothing reaches the servers.
func TestDNSWithoutAProxyIsRefused(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range dnsFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := newDNSPod(t)
			checkAsks(t, newAsker(t, p, kit.App, f.socket), f, true, "far")
			enrollDNS(p, d)
			a := newAsker(t, p, kit.App, f.socket)
			if err := a.connect(f.server()); err != nil {
				t.Fatal(err)
			}
			if who, _, err := a.ask(netip.AddrPort{}); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("connected: %s answers, %v; want ECONNREFUSED", who, err)
			}
			a = newAsker(t, p, kit.App, f.socket)
			if err := p.As(kit.App, func() error { return a.SendTo(f.server(), query(t, "who.test.")) }); err != nil {
				t.Error("unconnected:", err)
			}
			if _, from, err := a.RecvFrom(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
				t.Errorf("unconnected: something comes from %v, %v", from, err)
			}
			// And the same sockets are answered once it is there.
			startDNSProxy(t, p)
			if who, from, err := a.ask(f.server()); err != nil || who != "proxy" || from != f.server() {
				t.Errorf("%s answers from %v, %v", who, from, err)
			}
		})
	}
}

// The rules apply to datagrams as to connects.
func TestDNSRules(t *testing.T) {
	d := kit.Datapath(t)
	none := func(*rules.Rules) {}
	local := netip.MustParseAddrPort("127.0.0.53:53")
	for _, tt := range []struct {
		name   string
		id     kit.ID
		change func(*rules.Rules)
		to     netip.AddrPort // not valid: the family's server
		want   string
		reason string
	}{
		{"O10", kit.App, none, netip.AddrPort{}, "proxy", "captured-dns"},
		{"O10 without DNS capture", kit.App, func(r *rules.Rules) { r.DNS = false }, netip.AddrPort{}, "far", ""},
		{"O10 comes before O12", kit.App, func(r *rules.Rules) { r.ExcludeOutboundCIDRs = prefixes("10.99.0.0/24", "fd99::/64") }, netip.AddrPort{}, "proxy", "captured-dns"},
		{"O10 comes before O14", kit.App, func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} }, netip.AddrPort{}, "proxy", "captured-dns"},
		{"O1", kit.App, func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{53} }, netip.AddrPort{}, "far", "direct-port-out"},
		{"O5", kit.ProxyUID, none, netip.AddrPort{}, "far", "direct-proxy"},
		{"O8", kit.ProxyGID, none, netip.AddrPort{}, "far", "direct-proxy"},
		{"O9", kit.App, func(r *rules.Rules) { r.ExcludeOwnerGroups = []uint32{1000} }, netip.AddrPort{}, "far", "direct-owner-group"},
		{"O9, another group", kit.Root, func(r *rules.Rules) { r.ExcludeOwnerGroups = []uint32{1000} }, netip.AddrPort{}, "proxy", "captured-dns"},
		{"before the proxy is ready", kit.App, func(r *rules.Rules) { r.From = rules.ProxyReady }, netip.AddrPort{}, "far", "direct-not-ready"},
		{"O4 is not for port 53", kit.App, none, local, "proxy", "captured-dns"},
		{"the proxy calls a local server", kit.Proxy, none, local, "local", "direct-proxy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newDNSPod(t)
			nameServer{"local", farServer.v4, farServer.v6}.serve(t, p.NS, kit.Root, local.String())
			enrollDNS(p, d, func(pod *datapath.Pod) { tt.change(&pod.Rules) })
			startDNSProxy(t, p)
			calls := uint64(0)
			for _, f := range dnsFamilies {
				to := tt.to
				if !to.IsValid() {
					to = f.server()
				} else if f.far.Is6() {
					continue
				}
				for _, connected := range []bool{true, false} {
					a := newAsker(t, p, tt.id, f.socket)
					target := to
					if connected {
						if err := a.connect(to); err != nil {
							t.Fatal(err)
						}
						target = netip.AddrPort{}
					}
					calls++
					who, from, err := a.ask(target)
					if err != nil || who != tt.want || from != to {
						t.Errorf("%s, connected %v: %s answers from %v, %v; want %s from %v", f.name, connected, who, from, err, tt.want, to)
					}
				}
			}
			if tt.reason != "" && p.Stat(d, tt.reason) != calls {
				t.Errorf("%s counts %d, want %d", tt.reason, p.Stat(d, tt.reason), calls)
			}
		})
	}
}

// UDP to other ports is left alone, and so is a far host's answer from port 53.
func TestDNSOtherUDPIsUntouched(t *testing.T) {
	d := kit.Datapath(t)
	p := newDNSPod(t)
	nameServer{"other port", farServer.v4, farServer.v6}.serve(t, p.Far, kit.Root, "[::]:54")
	enrollDNS(p, d)
	startDNSProxy(t, p)
	for _, f := range dnsFamilies {
		for _, connected := range []bool{true, false} {
			a := newAsker(t, p, kit.App, f.socket)
			to, target := ap(f.far, 54), ap(f.far, 54)
			if connected {
				if err := a.connect(to); err != nil {
					t.Fatal(err)
				}
				target = netip.AddrPort{}
			}
			who, from, err := a.ask(target)
			if err != nil || who != "other port" || from != to {
				t.Errorf("%s, connected %v: %s answers from %v, %v", f.name, connected, who, from, err)
			}
		}
	}
	if got := p.Stat(d, "captured-dns"); got != 0 {
		t.Errorf("captured-dns counts %d", got)
	}
}

// Un-enrolled, or enrolled anew without DNS capture, a socket asks the server
// itself, and shows who answers; one that is connected stays with the proxy, as
// open TCP connections do, until it connects anew.
func TestDNSSocketsOutliveTheEnrolment(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range dnsFamilies {
		for _, again := range []bool{false, true} {
			t.Run(f.name, func(t *testing.T) {
				p := newDNSPod(t)
				before := newAsker(t, p, kit.App, f.socket)
				checkAsks(t, before, f, true, "far")
				enrollDNS(p, d)
				stop := startDNSProxy(t, p)
				if who, from, err := before.ask(netip.AddrPort{}); err != nil || who != "far" || from != f.server() {
					t.Errorf("connected before: %s answers from %v, %v", who, from, err)
				}
				free, peered := newAsker(t, p, kit.App, f.socket), newAsker(t, p, kit.App, f.socket)
				bound := newAsker(t, p, kit.App, f.socket, kit.Bind(ap(f.pod, 5353)))
				checkAsks(t, free, f, false, "proxy")
				checkAsks(t, bound, f, false, "proxy")
				checkAsks(t, peered, f, true, "proxy")
				if again {
					p.Enroll(d)
				} else if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
					t.Fatal(err)
				}
				checkAsks(t, free, f, false, "far")
				checkAsks(t, bound, f, false, "far")
				if who, from, err := peered.ask(netip.AddrPort{}); err != nil || who != "proxy" || from != f.server() {
					t.Errorf("connected: %s answers from %v, %v", who, from, err)
				}
				// What now answers on loopback is shown as it is.
				proxy := map[bool]string{true: "127.0.0.1:15053", false: "[::1]:15053"}[f.far.Is4()]
				if who, from, err := free.ask(netip.MustParseAddrPort(proxy)); err != nil || who != "proxy" || from.String() != proxy {
					t.Errorf("the former DNS proxy: %s answers from %v, %v", who, from, err)
				}
				stop()
				if err := peered.Disconnect(); err != nil {
					t.Fatal(err)
				}
				checkAsks(t, peered, f, true, "far")
			})
		}
	}
}

func TestDNSIsRefusedWhereAHookIsMissing(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "dns-hook-missing")
	d := kit.OwnDatapath(t, datapath.Options{Dir: dir})
	p := kit.NewPod(t)
	pod := datapath.Pod{Rules: rules.Default()}
	pod.Rules.DNS = true
	if _, err := d.Enroll(p.NetNS, pod); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, datapath.Layout, "links", "node", "sendmsg6")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Enroll(p.NetNS, pod); !errors.Is(err, datapath.ErrNotUp) {
		t.Errorf("enrolling with DNS capture ends with %v, want ErrNotUp", err)
	}
	pod.Rules.DNS = false
	if _, err := d.Enroll(p.NetNS, pod); err != nil {
		t.Error("without DNS capture:", err)
	}
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Error(err)
	}
}
