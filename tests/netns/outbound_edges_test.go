package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// dialErr is how a dial ends: nil, or the kernel's errno.
func dialErr(p *kit.NS, socket int, to netip.AddrPort) error {
	s, err := p.Dial(kit.App, socket, to)
	if err == nil {
		s.Close()
	}
	return errno(err)
}

func errno(err error) error {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}

func TestOutboundOfAPodWithoutThatFamilyIsLeftToTheKernel(t *testing.T) {
	d := kit.Datapath(t)
	for _, c := range []struct {
		name   string
		wiring [2]netip.Prefix
		route  string
		via    netip.Addr
		has    family // and the other is what the pod lacks
		lacks  family
	}{
		{"no IPv6", [2]netip.Prefix{netip.PrefixFrom(kit.Pod4, 24), netip.PrefixFrom(kit.Far4, 24)}, "0.0.0.0/0", kit.Far4, families[0], families[1]},
		{"no IPv4", [2]netip.Prefix{netip.PrefixFrom(kit.Pod6, 64), netip.PrefixFrom(kit.Far6, 64)}, "::/0", kit.Far6, families[1], families[2]},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &kit.Pod{NS: kit.NewNS(t, "pod"), Far: kit.NewNS(t, "far")}
			p.Wire("eth0", c.wiring[:]...)
			p.AddRoute(c.route, c.via)
			server := p.Far.Listen(kit.Root, at(c.has.wildcard, 80))
			both(t, p.NS, c.has, ap(c.has.far, 80), server).close()
			if err := dialErr(p.NS, c.lacks.socket, ap(c.lacks.far, 80)); !errors.Is(err, unix.ENETUNREACH) {
				t.Fatalf("without Sluice the dial ends with %v, want ENETUNREACH", err)
			}
			p.Enroll(d)
			out, _ := proxyListeners(p)
			if err := dialErr(p.NS, c.lacks.socket, ap(c.lacks.far, 80)); !errors.Is(err, unix.ENETUNREACH) {
				t.Errorf("the dial ends with %v, want ENETUNREACH", err)
			}
			got := both(t, p.NS, c.has, ap(c.has.far, 80), out[c.has.wildcard])
			checkCaptured(t, c.has, got, ap(c.has.far, 80), c.has.pod)
			checkNothingReached(t, server)
		})
	}
}

// Destinations to which the kernel itself connects nobody. One is missing: a
// link-local IPv6 address without its interface (EINVAL), because a connect hook
// cannot see whether the app named one; it is captured.
func TestOutboundToWhatIsNoHostEndsAsWithoutSluice(t *testing.T) {
	d := kit.Datapath(t)
	plain, enrolled := kit.NewPod(t), kit.NewPod(t)
	enrolled.Enroll(d)
	out, _ := proxyListeners(enrolled)
	for _, c := range []struct {
		socket int
		to     string
	}{
		{unix.AF_INET, "224.0.0.1:80"},
		{unix.AF_INET, "239.1.2.3:80"},
		{unix.AF_INET, "255.255.255.255:80"},
		{unix.AF_INET, "10.99.0.255:80"}, // the subnet's broadcast address
		{unix.AF_INET, "127.255.255.255:80"},
		{unix.AF_INET, "10.99.0.1:0"},
		{unix.AF_INET, "10.99.0.2:0"},
		{unix.AF_INET, "127.0.0.1:0"},
		{unix.AF_INET6, "[ff02::1]:80"},
		{unix.AF_INET6, "[ff0e::1]:80"},
		{unix.AF_INET6, "[fd99::1]:0"},
		{unix.AF_INET6, "[::1]:0"},
		{unix.AF_INET6, "224.0.0.1:80"},
		{unix.AF_INET6, "255.255.255.255:80"},
		{unix.AF_INET6, "10.99.0.255:80"},
		{unix.AF_INET6, "10.99.0.1:0"},
	} {
		t.Run(fmt.Sprintf("%d/%s", c.socket, c.to), func(t *testing.T) {
			to := netip.MustParseAddrPort(c.to)
			want := dialErr(plain.NS, c.socket, to)
			if want == nil {
				t.Fatal("without Sluice it connects: nothing to compare with")
			}
			started := time.Now()
			if got := dialErr(enrolled.NS, c.socket, to); got != want {
				t.Errorf("the dial ends with %v, without Sluice with %v", got, want)
			}
			if took := time.Since(started); took > kit.Patience/2 {
				t.Errorf("the dial took %v", took)
			}
			for _, l := range out {
				if _, err := l.AcceptWithin(0); !errors.Is(err, kit.ErrNobody) {
					t.Error("the proxy got a connection")
				}
			}
		})
	}
	checkNoHandshakes(t, d, enrolled)
}

func TestOutboundToTheAnyAddressMeansLoopback(t *testing.T) {
	d := kit.Datapath(t)
	for _, c := range []struct {
		name, listen string
		socket       int
		to, peer     string
		level        int
	}{
		{"0.0.0.0", "127.0.0.1:80", unix.AF_INET, "0.0.0.0:80", "127.0.0.1:80", unix.SOL_IP},
		{"::", "[::1]:80", unix.AF_INET6, "[::]:80", "[::1]:80", unix.SOL_IPV6},
		{"::ffff:0.0.0.0", "127.0.0.1:80", unix.AF_INET6, "0.0.0.0:80", "127.0.0.1:80", unix.SOL_IP},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := kit.NewPod(t)
			server := p.Listen(kit.Root, c.listen)
			check := func() {
				t.Helper()
				client, err := p.Dial(kit.App, c.socket, netip.MustParseAddrPort(c.to))
				if err != nil {
					t.Fatal("dial:", err)
				}
				accepted := server.MustAccept()
				if peer := netip.MustParseAddrPort(c.peer); client.Peer() != peer || accepted.Name() != peer {
					t.Errorf("the client's peer is %v and the server's name %v, want %v", client.Peer(), accepted.Name(), peer)
				}
				kit.Exchange(t, client, accepted, 1<<10)
			}
			check()
			p.Enroll(d)
			out, _ := proxyListeners(p)
			check()
			for _, l := range out {
				checkNothingReached(t, l)
			}
		})
	}
}

func TestOutboundOfAClientThatResetsAtOnce(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			both(t, p.NS, f, ap(f.far, 80), server).close()
			p.Enroll(d)
			listener := p.Listen(kit.Proxy, at(f.wildcard, 15001))
			for i := range 100 {
				client, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
				if err != nil {
					t.Fatalf("dial %d: %v", i, err)
				}
				client.Reset()
			}
			// Between connect() and its end as well: a non-blocking one.
			for range 100 {
				s, err := p.Socket(kit.App, f.socket, kit.With(func(fd int) error { return unix.SetNonblock(fd, true) }))
				if err != nil {
					t.Fatal(err)
				}
				if err := p.As(kit.App, func() error { return s.Start(ap(f.far, 80)) }); !errors.Is(err, unix.EINPROGRESS) {
					t.Fatal("connect:", err)
				}
				s.Reset()
			}
			checkNoHandshakes(t, d, p)
			for {
				if _, err := listener.AcceptWithin(0); errors.Is(err, kit.ErrNobody) {
					break
				}
			}
			c := both(t, p.NS, f, ap(f.far, 80), listener)
			checkCaptured(t, f, c, ap(f.far, 80), f.pod)
			checkNothingReached(t, server)
		})
	}
}

func TestOutboundWhileTheProxyIsDeadAndAfterItCameBack(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			both(t, p.NS, f, ap(f.far, 80), server).close()
			p.Enroll(d)
			for range 3 {
				listener := p.Listen(kit.Proxy, at(f.wildcard, 15001))
				c := both(t, p.NS, f, ap(f.far, 80), listener)
				checkCaptured(t, f, c, ap(f.far, 80), f.pod)
				waiting, err := p.Dial(kit.App, f.socket, ap(f.far, 81)) // never accepted
				if err != nil {
					t.Fatal("dial:", err)
				}

				listener.Close()
				c.accepted.Close()
				if err := c.client.ReadFull(make([]byte, 1)); err == nil {
					t.Error("the client read from a dead proxy")
				}
				if err := waiting.ReadFull(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the client in the dead proxy's queue ends with %v, want ECONNRESET", err)
				}
				if err := dialErr(p.NS, f.socket, ap(f.far, 80)); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("with the proxy dead the dial ends with %v, want ECONNREFUSED", err)
				}
				checkNothingReached(t, server)
				checkNoHandshakes(t, d, p)
			}
		})
	}
}
