package netns

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// callForClient calls the app as the proxy does for a client.
func callForClient(p *kit.Pod, f family, client netip.AddrPort, port int) (*kit.Sock, error) {
	return p.Dial(kit.TProxy, f.socket, ap(f.pod, port), kit.ForClient(client, 1337))
}

// What the proxy sent for a client lets nothing in from the network: neither
// while the app has that connection, nor before, nor after.
func TestByTPROXYTheNetworkCannotPassForTheProxy(t *testing.T) {
	const rounds = 20
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			client := ap(f.far, 40404)
			app := p.BareListen(kit.App, at(f.wildcard, 8080))
			reuse := kit.Set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			fromNetwork := func() (*kit.Sock, error) {
				return p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080), reuse, kit.Bind(client))
			}
			direct, err := fromNetwork()
			if err != nil {
				t.Fatal("without Sluice:", err)
			}
			served := app.MustAccept()
			direct.Reset()
			served.Reset()

			p.Enroll(d, byTProxy)
			_, in := proxyListeners(p)
			proxy := in[f.wildcard]
			for range rounds {
				captured, err := fromNetwork()
				if err != nil {
					t.Fatal("from the network:", err)
				}
				accepted := proxy.MustAccept()
				captured.Reset()
				accepted.Reset()

				call, err := callForClient(p, f, client, 8080)
				if err != nil {
					t.Fatal("the proxy's call:", err)
				}
				served := app.MustAccept()
				kit.Exchange(t, call, served, 1000)
				call.Reset()
				served.Reset()
			}
			for _, who := range []*kit.Sock{app, proxy} {
				if _, err := who.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
					t.Error("somebody got a connection too many")
				}
			}
			if n := p.Stat(d, "captured-in"); n != rounds {
				t.Errorf("%d connections were captured, want %d", n, rounds)
			}

			// Both at once cannot be: the SYN of the later one is the other's to ignore.
			call, err := callForClient(p, f, client, 8080)
			if err != nil {
				t.Fatal(err)
			}
			served = app.MustAccept()
			if c, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080), reuse, kit.Bind(client), kit.Impatient); !errors.Is(err, unix.ETIMEDOUT) {
				t.Errorf("a client with the ports of a call that is open gets %v, %v", c, err)
			}
			kit.Exchange(t, call, served, 1000)
			captured, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
			if err != nil {
				t.Fatal(err)
			}
			accepted := proxy.MustAccept()
			if c, err := p.Dial(kit.TProxy, f.socket, ap(f.pod, 8080), kit.ForClient(captured.Name(), 1337), kit.Impatient); !errors.Is(err, unix.ETIMEDOUT) {
				t.Errorf("a call with the ports of a client that is connected gets %v, %v", c, err)
			}
			kit.Exchange(t, captured, accepted, 1000)
			if _, err := app.AcceptWithin(0); !errors.Is(err, kit.ErrNobody) {
				t.Error("the app got a connection from the network")
			}
		})
	}
}

// The RST of a port on which nobody listens finds its way as well.
func TestByTPROXYTheProxyIsToldThatTheAppDoesNotListen(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		p := kit.NewPod(t)
		p.Enroll(d, byTProxy)
		c, err := callForClient(p, f, ap(f.far, 0), 8080)
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: the call ends with %v, %v; want ECONNREFUSED", f.name, c, err)
		}
	}
}

// Who calls the pod itself in TPROXY mode, and where it gets: what was measured
// on Istio's rules, but for port 15008, which they capture.
func TestByTPROXYCallsOfThePodItself(t *testing.T) {
	const app, proxy = "the app", "the proxy"
	byUID := kit.ID{UID: 1337, GID: 0}
	onV6 := netip.MustParseAddr("::1")
	lo4, other4 := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.6")
	mark := func(value int) kit.Option { return kit.Set(unix.SOL_SOCKET, unix.SO_MARK, value) }
	for name, tt := range map[string]struct {
		who    kit.ID
		to     netip.AddrPort
		option kit.Option
		want   string // in TPROXY mode
		before string // in REDIRECT mode
	}{
		"app":                                  {kit.App, ap(kit.Pod4, 8080), nil, app, app},
		"app, IPv6":                            {kit.App, ap(kit.Pod6, 8080), nil, app, app},
		"GID":                                  {kit.TProxy, ap(kit.Pod4, 8080), nil, proxy, app},
		"GID, IPv6":                            {kit.TProxy, ap(kit.Pod6, 8080), nil, proxy, app},
		"GID, 127.0.0.1":                       {kit.TProxy, ap(lo4, 8080), nil, app, app},
		"GID, ::1":                             {kit.TProxy, ap(onV6, 8080), nil, app, app},
		"GID, 127.0.0.6":                       {kit.TProxy, ap(other4, 8080), nil, proxy, app},
		"GID, port excluded inbound":           {kit.TProxy, ap(kit.Pod4, 15021), nil, app, app},
		"GID, port 15008":                      {kit.TProxy, ap(kit.Pod4, 15008), nil, app, app},
		"GID, marked":                          {kit.TProxy, ap(kit.Pod4, 8080), mark(1337), app, app},
		"GID, marked, IPv6":                    {kit.TProxy, ap(kit.Pod6, 8080), mark(1337), app, app},
		"GID, another mark":                    {kit.TProxy, ap(kit.Pod4, 8080), mark(1338), proxy, app},
		"GID, excluded outbound, for a client": {kit.TProxy, ap(kit.Pod4, 3306), kit.ForClient(ap(kit.Far4, 0), 0), app, ""},
		"GID, for a client, unmarked":          {kit.TProxy, ap(kit.Pod4, 8080), kit.ForClient(ap(kit.Far4, 0), 0), app, ""},
		"GID, from 127.0.0.6":                  {kit.TProxy, ap(kit.Pod4, 8080), kit.Bind(ap(other4, 0)), app, app},
		"UID":                                  {byUID, ap(kit.Pod4, 8080), nil, proxy, proxy},
		"UID, port excluded inbound":           {byUID, ap(kit.Pod4, 15021), nil, proxy, proxy},
		"root, for a client":                   {kit.Root, ap(kit.Pod4, 8080), kit.ForClient(ap(kit.Far4, 0), 1337), "nobody", ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := kit.Datapath(t)
			p := kit.NewPod(t)
			wildcard, family := "0.0.0.0", unix.AF_INET
			if tt.to.Addr().Is6() {
				wildcard, family = "[::]", unix.AF_INET6
			}
			listener := p.BareListen(kit.App, at(wildcard, int(tt.to.Port())))
			_, in := proxyListeners(p)
			got := func() string {
				c, err := p.Dial(tt.who, family, tt.to, options(tt.option, kit.Impatient)...)
				if err != nil {
					return "nobody"
				}
				defer c.Close()
				for kind, l := range map[string]*kit.Sock{app: listener, proxy: in[wildcard]} {
					if a, err := l.AcceptWithin(0); err == nil {
						kit.Exchange(t, c, a, 1000)
						return kind
					}
				}
				return "nobody known"
			}
			if tt.before != "" {
				if who := got(); who != app {
					t.Errorf("without Sluice it gets to %s", who)
				}
				p.Enroll(d, func(pod *datapath.Pod) { pod.Rules.ExcludeOutboundPorts = []uint16{3306} })
				if who := got(); who != tt.before {
					t.Errorf("in REDIRECT mode it gets to %s, want %s", who, tt.before)
				}
			}
			p.Enroll(d, byTProxy, func(pod *datapath.Pod) { pod.Rules.ExcludeOutboundPorts = []uint16{3306} })
			if who := got(); who != tt.want {
				t.Errorf("in TPROXY mode it gets to %s, want %s", who, tt.want)
			}
		})
	}
}

func options(some ...kit.Option) (out []kit.Option) {
	for _, o := range some {
		if o != nil {
			out = append(out, o)
		}
	}
	return out
}

// The proxy may not call its own ports for a client: it would be handed its own
// call, for ever.
func TestByTPROXYAClientOfTheProxysOwnPort(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	p.Enroll(d, byTProxy)
	p.StartTProxy()
	for _, f := range families {
		client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 15006))
		if err != nil {
			t.Fatal(f.name, err)
		}
		if _, err := client.ReadSome(); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: the client reads %v, want a reset", f.name, err)
		}
	}
	if n := p.Stat(d, "refused-loop"); n != uint64(len(families)) {
		t.Errorf("%d calls were refused, want one per client, %d", n, len(families))
	}
}

// An app calls a service whose only endpoint is its own pod: the proxy picks it,
// and gets its own call, to judge it as inbound. The app then sees the pod.
func TestByTPROXYTheProxyCallsItsOwnPodAsAService(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	p.Enroll(d, byTProxy)
	p.StartTProxy()
	for _, f := range families[:2] {
		app := p.BareListen(kit.App, at(f.wildcard, 8080))
		call, err := p.Dial(kit.TProxy, f.socket, ap(f.pod, 8080))
		if err != nil {
			t.Fatal(f.name, err)
		}
		served := app.MustAccept()
		if served.Peer().Addr() != f.pod || served.Peer() == call.Name() {
			t.Errorf("%s: the app's peer is %v, want %v by way of the proxy (%v)", f.name, served.Peer(), f.pod, call.Name())
		}
		kit.Exchange(t, call, served, 1<<20)
		app.Close()
	}
}

// What is not the proxy's in TPROXY mode passes as ever.
func TestByTPROXYLeavesTheRestAlone(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families[:2] {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			probed := p.Listen(kit.App, at(f.wildcard, 15021))
			included := p.Listen(kit.App, at(f.wildcard, 8080))
			connect := func(l *kit.Sock, port int) (client, served *kit.Sock) {
				client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, port))
				if err != nil {
					t.Fatal(err)
				}
				served = l.MustAccept()
				if served.Peer() != client.Name() {
					t.Errorf("port %d: the app's peer is %v, want %v itself", port, served.Peer(), client.Name())
				}
				kit.Exchange(t, client, served, 1<<16)
				return client, served
			}
			connect(probed, 15021)
			client, served := connect(included, 8080) // stays open
			echo := udpEcho(t, p, f)
			ping := func() {
				t.Helper()
				kit.Exchange(t, client, served, 1<<20)
				connect(probed, 15021)
				echo()
			}
			echo()
			p.Enroll(d, byTProxy)
			ping()
			if _, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("a new connection ends with %v, want ECONNREFUSED", err)
			}
			p.Enroll(d, byTProxy, func(pod *datapath.Pod) { pod.Rules.IncludeInboundPorts = rules.Ports{List: []uint16{9090}} })
			connect(included, 8080)
			ping()
			if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
				t.Fatal(err)
			}
			ping()
		})
	}
}

// udpEcho opens two UDP sockets; each call sends a datagram to the pod and one
// back.
func udpEcho(t *testing.T, p *kit.Pod, f family) (ping func()) {
	t.Helper()
	listen := func(ns *kit.NS, a netip.Addr) *net.UDPConn {
		var c *net.UDPConn
		err := ns.Do(func() (err error) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(ap(a, 0)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	far, pod := listen(p.Far, f.far), listen(p.NS, f.pod)
	return func() {
		t.Helper()
		for _, way := range []struct{ from, to *net.UDPConn }{{far, pod}, {pod, far}} {
			buf := make([]byte, 100)
			err := way.to.SetDeadline(time.Now().Add(kit.Patience))
			if err == nil {
				_, err = way.from.WriteTo([]byte("ping"), way.to.LocalAddr())
			}
			if err == nil {
				_, _, err = way.to.ReadFrom(buf)
			}
			if err != nil {
				t.Error("UDP:", err)
			}
		}
	}
}
