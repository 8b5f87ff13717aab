package netns

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// whom a connect of the twice tests reaches in an enrolled pod
type whom int

const (
	theProxy whom = iota
	theFarHost
	theApp // another process of the pod
	nobody
)

// target is one connect.
type target struct {
	name     string
	to       netip.AddrPort
	reaches  whom
	proxyOff bool // while the proxy does not listen
}

var (
	lo4 = netip.MustParseAddr("127.0.0.1")
	lo6 = netip.IPv6Loopback()
)

// targetsOf an address family; on AF_INET6 sockets the IPv4 ones are v4-mapped.
func targetsOf(name string, far, pod, lo netip.Addr) []target {
	return []target{
		{"captured " + name, ap(far, 80), theProxy, false},
		{"excluded port " + name, ap(far, 81), theFarHost, false},
		{"loopback " + name, ap(lo, 9001), theApp, false},
		{"own address " + name, ap(pod, 9001), theApp, false},
		{"refused by the proxy " + name, ap(far, 82), nobody, true},
		{"refused on loopback " + name, ap(lo, 9), nobody, false},
	}
}

// twiceWorld is a pod in which every target is there, enrolled or not.
type twiceWorld struct {
	*kit.Pod
	enrolled  bool
	far80     *kit.Sock
	listeners map[whom]*kit.Sock
}

func newTwiceWorld(t *testing.T, d *datapath.Datapath) *twiceWorld {
	w := &twiceWorld{Pod: kit.NewPod(t), enrolled: d != nil, listeners: map[whom]*kit.Sock{}}
	w.far80 = w.Far.Listen(kit.Root, "[::]:80")
	w.listeners[theFarHost] = w.Far.Listen(kit.Root, "[::]:81")
	if d != nil {
		w.Enroll(d, func(p *datapath.Pod) { p.Rules.ExcludeOutboundPorts = []uint16{81} })
	}
	w.listeners[theApp] = w.Listen(kit.App, "[::]:9001")
	w.startProxy()
	return w
}

func (w *twiceWorld) startProxy() {
	w.listeners[theProxy] = w.Listen(kit.Proxy, "[::]:15001")
	if !w.enrolled {
		w.listeners[theProxy].Close()
		w.listeners[theProxy] = w.far80
	}
}

// connect makes one connect and, if it connects, accepts and checks both ends.
func (w *twiceWorld) connect(t *testing.T, s *kit.Sock, to target) (accepted *kit.Sock, err error) {
	t.Helper()
	if to.proxyOff && w.enrolled {
		w.listeners[theProxy].Close()
		defer w.startProxy()
	}
	if err := w.As(kit.App, func() error { return s.Connect(to.to) }); err != nil {
		return nil, errno(err)
	}
	if to.reaches == nobody {
		t.Fatalf("a connect to %s succeeded", to.name)
	}
	c := both2(t, s, w.listeners[to.reaches])
	w.check(t, c, to)
	return c.accepted, nil
}

func both2(t *testing.T, client, listener *kit.Sock) connected {
	t.Helper()
	accepted, from, err := listener.AcceptFrom(kit.Patience)
	if err != nil {
		t.Fatal("accept:", err)
	}
	return connected{client, accepted, from}
}

// check asserts what both ends of a connection to a target see.
func (w *twiceWorld) check(t *testing.T, c connected, to target) {
	t.Helper()
	source := kit.Pod4
	if to.to.Addr().Is6() {
		source = kit.Pod6
	}
	if to.to.Addr().IsLoopback() {
		source = to.to.Addr()
	}
	if c.client.Peer() != to.to {
		t.Errorf("%s: the client's peer is %v, want %v", to.name, c.client.Peer(), to.to)
	}
	if c.client.Name().Addr() != source {
		t.Errorf("%s: the client's name is %v, want address %v", to.name, c.client.Name(), source)
	}
	if c.accepted.Peer() != c.client.Name() || c.from != c.client.Name() {
		t.Errorf("%s: the other end's peer is %v and accept() gave %v, want %v", to.name, c.accepted.Peer(), c.from, c.client.Name())
	}
	if to.reaches != theProxy && c.accepted.Name() != to.to {
		t.Errorf("%s: the other end's name is %v, want %v", to.name, c.accepted.Name(), to.to)
	}
	if w.enrolled {
		w.checkOrigDst(t, c, to)
	}
	kit.Exchange(t, c.client, c.accepted, 1<<10)
}

// checkOrigDst: the proxy's end and the client's answer with the destination;
// a local server's with its own address, never with another.
func (w *twiceWorld) checkOrigDst(t *testing.T, c connected, to target) {
	t.Helper()
	level, wrong := unix.SOL_IP, unix.SOL_IPV6
	if to.to.Addr().Is6() {
		level, wrong = wrong, level
	}
	ends := map[string]*kit.Sock{"client": c.client}
	if to.reaches != theFarHost {
		ends["other end"] = c.accepted
	}
	for end, s := range ends {
		if got, err := s.OrigDst(level); err != nil || got != to.to {
			t.Errorf("%s: SO_ORIGINAL_DST of the %s is %v, %v; want %v", to.name, end, got, err, to.to)
		}
		if got, err := s.OrigDst(wrong); err == nil {
			t.Errorf("%s: SO_ORIGINAL_DST of the %s at the other level is %v", to.name, end, got)
		}
	}
}

// twice connects one socket to two targets and returns how each connect ended.
func (w *twiceWorld) twice(t *testing.T, socket int, first, second target, unspec bool, options []kit.Option) (err1, err2 error) {
	t.Helper()
	s, err := w.Socket(kit.App, socket, options...)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	accepted, err1 := w.connect(t, s, first)
	if accepted != nil {
		defer accepted.Close()
	}
	if unspec {
		if err := s.Disconnect(); err != nil {
			t.Fatal("disconnect:", err)
		}
	}
	again, err2 := w.connect(t, s, second)
	if again != nil {
		again.Close()
	}
	if err2 == unix.EISCONN && accepted != nil {
		w.check(t, connected{s, accepted, s.Name()}, first) // and it is as it was
	}
	return err1, err2
}

// hangs: once a socket has spoken IPv4, the kernel sends its IPv6 SYN but never
// finds the socket for the answer (icsk_af_ops stay those of v4-mapped).
func hangs(socket int, first, second target, unspec bool) bool {
	return socket == unix.AF_INET6 && first.to.Addr().Is4() && second.to.Addr().Is6() && (unspec || first.reaches == nobody)
}

// briefly makes a connect give up soon.
var briefly = kit.With(func(fd int) error {
	tv := unix.NsecToTimeval(kit.Quiet.Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
})

func checkTwice(t *testing.T, options ...kit.Option) {
	d := kit.Datapath(t)
	plain, enrolled := newTwiceWorld(t, nil), newTwiceWorld(t, d)
	targets4 := targetsOf("v4", kit.Far4, kit.Pod4, lo4)
	targets := map[int][]target{
		unix.AF_INET:  targets4,
		unix.AF_INET6: append(targetsOf("v6", kit.Far6, kit.Pod6, lo6), targets4...),
	}
	for _, socket := range []int{unix.AF_INET, unix.AF_INET6} {
		for _, first := range targets[socket] {
			for _, second := range targets[socket] {
				for _, unspec := range []bool{false, true} {
					options := slices.Clone(options)
					if hangs(socket, first, second, unspec) {
						if first.name != "captured v4" || second.name != "captured v6" {
							continue // one stands for all
						}
						options = append(options, briefly)
					}
					name := fmt.Sprintf("family %d, %s, then %s, AF_UNSPEC between %v", socket, first.name, second.name, unspec)
					t.Run(name, func(t *testing.T) {
						want1, want2 := plain.twice(t, socket, first, second, unspec, options)
						got1, got2 := enrolled.twice(t, socket, first, second, unspec, options)
						if got1 != want1 || got2 != want2 {
							t.Errorf("the connects end with %v and %v, without Sluice with %v and %v", got1, got2, want1, want2)
						}
					})
				}
			}
		}
	}
	checkNoHandshakes(t, d, enrolled.Pod)
	checkNothingReached(t, enrolled.far80)
}

func TestOneSocketConnectsTwiceAsWithoutSluice(t *testing.T) { checkTwice(t) }

func TestOneMPTCPSocketConnectsTwiceAsWithoutSluice(t *testing.T) {
	needMPTCP(t)
	checkTwice(t, kit.MPTCP)
}
