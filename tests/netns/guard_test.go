package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

const (
	byGuard    = "guard-no-verdict"
	byLoopback = "guard-loopback"
	handMade   = "made by hand"
)

// wireWays are how a packet gets on the wire without a connect().
var wireWays = []struct {
	name string
	send func(p *kit.Pod, link string, packet []byte) error
}{
	{"raw socket", func(p *kit.Pod, _ string, packet []byte) error { return p.SendRaw(packet) }},
	{"packet socket", func(p *kit.Pod, link string, packet []byte) error { return p.SendFrame(link, packet) }},
}

// wires are the interface that every pod has, and that of wireSecond.
var wires = []struct {
	link       string
	pod4, far4 netip.Addr
	pod6, far6 netip.Addr
}{
	{"eth0", kit.Pod4, kit.Far4, kit.Pod6, kit.Far6},
	{"eth1", netip.MustParseAddr("10.98.0.2"), netip.MustParseAddr("10.98.0.1"), netip.MustParseAddr("fd98::2"), netip.MustParseAddr("fd98::1")},
}

func wireSecond(p *kit.Pod) {
	w := wires[1]
	p.Wire(w.link, netip.PrefixFrom(w.pod4, 24), netip.PrefixFrom(w.far4, 24),
		netip.PrefixFrom(w.pod6, 64), netip.PrefixFrom(w.far6, 64))
}

// comesOut says whether a packet with the content handMade comes out at the far
// end. A datagram sent after it, in the same way, shows that it is not just late.
func comesOut(t *testing.T, p *kit.Pod, link string, packet []byte, send func(*kit.Pod, string, []byte) error) bool {
	t.Helper()
	src, dst := kit.Pod4, kit.Far4
	if packet[0]>>4 == 6 {
		src, dst = kit.Pod6, kit.Far6
	}
	if link == "eth1" {
		src, dst = wires[1].pod4, wires[1].far4
		if packet[0]>>4 == 6 {
			src, dst = wires[1].pod6, wires[1].far6
		}
	}
	sniffer := p.Far.Sniff(link)
	defer sniffer.Close()
	if err := send(p, link, packet); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOBUFS) {
		t.Fatal("send:", err)
	}
	marker := kit.IP(src, dst, unix.IPPROTO_UDP, kit.Datagram(ap(src, 9), ap(dst, 9), "and then"))
	if err := send(p, link, marker); err != nil {
		t.Fatal("send the datagram after it:", err)
	}
	return sniffer.SawBefore(handMade, "and then")
}

func handMadeSYN(src, dst netip.Addr) []byte {
	return kit.IP(src, dst, unix.IPPROTO_TCP, kit.Segment(ap(src, 4711), ap(dst, 80), kit.SYN, handMade))
}

func TestGuardStopsAHandMadeSYNOnEveryInterface(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	wireSecond(p)
	each := func(visit func(what string, send func() bool)) {
		for _, w := range wires {
			for _, way := range wireWays {
				for i, packet := range [][]byte{handMadeSYN(w.pod4, w.far4), handMadeSYN(w.pod6, w.far6)} {
					visit(fmt.Sprintf("IPv%d by %s on %s", 4+2*i, way.name, w.link),
						func() bool { return comesOut(t, p, w.link, packet, way.send) })
				}
			}
		}
	}
	mustPass := func(when string) {
		each(func(what string, send func() bool) {
			if !send() {
				t.Errorf("%s, %s: the SYN does not arrive", when, what)
			}
		})
	}
	mustPass("before enrolment")
	p.Enroll(d, func(pod *datapath.Pod) { pod.NoGuard = true })
	mustPass("without the guard")
	if n := p.Stat(d, byGuard); n != 0 {
		t.Errorf("without the guard %d SYNs are counted", n)
	}
	p.Enroll(d)
	stopped := uint64(0)
	each(func(what string, send func() bool) {
		if send() {
			t.Errorf("%s: the SYN passes the guard", what)
		}
		stopped++
		if n := p.Stat(d, byGuard); n != stopped {
			t.Errorf("%s: %d SYNs are counted, want %d", what, n, stopped)
		}
	})
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	mustPass("after un-enrolment")
}

func TestGuardOfAnInterfaceThatCameLaterIsThereOnceEnrolledAgain(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	p.Enroll(d)
	wireSecond(p)
	w := wires[1]
	if !comesOut(t, p, w.link, handMadeSYN(w.pod4, w.far4), wireWays[1].send) {
		t.Error("the SYN does not arrive through an interface without a guard")
	}
	p.Enroll(d)
	if comesOut(t, p, w.link, handMadeSYN(w.pod4, w.far4), wireWays[1].send) {
		t.Error("the SYN passes the guard")
	}
}

// header6 is an IPv6 extension header of eight bytes, all padding.
func header6(next uint8) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

func TestGuardFindsASYNWhereverItHides(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	src4, dst4, src6, dst6 := kit.Pod4, kit.Far4, kit.Pod6, kit.Far6
	tcp4 := kit.Segment(ap(src4, 4711), ap(dst4, 80), kit.SYN, handMade)
	tcp6 := kit.Segment(ap(src6, 4711), ap(dst6, 80), kit.SYN, handMade)
	behind := func(first uint8, headers ...[]byte) []byte {
		var payload []byte
		for _, h := range headers {
			payload = append(payload, h...)
		}
		return kit.IP(src6, dst6, first, append(payload, tcp6...))
	}
	const hop, dest, routing, fragment, tcp = 0, 60, 43, 44, 6
	withOptions := kit.IP(src4, dst4, tcp, append([]byte{1, 1, 1, 0}, tcp4...))
	withOptions[0] = 0x46
	for _, tt := range []struct {
		name   string
		packet []byte
		stops  bool
	}{
		{"plain", kit.IP(src4, dst4, tcp, tcp4), true},
		{"IPv4 options", withOptions, true},
		{"first fragment with the flags", kit.Fragment(kit.IP(src4, dst4, tcp, tcp4), 0, true), true},
		{"first fragment that hides the flags", kit.Fragment(kit.IP(src4, dst4, tcp, tcp4[:8]), 0, true), true},
		{"later fragment", kit.Fragment(kit.IP(src4, dst4, tcp, tcp4), 1480, false), false},
		{"hop-by-hop options", behind(hop, header6(tcp)), true},
		{"destination options", behind(dest, header6(tcp)), true},
		{"routing header", behind(routing, header6(tcp)), true},
		{"three headers", behind(hop, header6(dest), header6(routing), header6(tcp)), true},
		{"more headers than anybody sends", behind(dest, header6(dest), header6(dest), header6(dest), header6(dest), header6(dest), header6(dest), header6(tcp)), true},
		{"first IPv6 fragment", behind(fragment, []byte{tcp, 0, 0, 1, 0, 0, 0, 1}), true},
		{"later IPv6 fragment", behind(fragment, []byte{tcp, 0, 0x05, 0xc8, 0, 0, 0, 1}), false},
		{"SYN and ACK", kit.IP(src4, dst4, tcp, kit.Segment(ap(src4, 4711), ap(dst4, 80), kit.SYN|kit.ACK, handMade)), false},
		{"ACK", kit.IP(src4, dst4, tcp, kit.Segment(ap(src4, 4711), ap(dst4, 80), kit.ACK, handMade)), false},
		{"ICMP", kit.IP(src4, dst4, unix.IPPROTO_ICMP, append([]byte{8, 0, 0, 0, 0, 0, 0, 0}, handMade...)), false},
		{"ICMPv6", kit.IP(src6, dst6, unix.IPPROTO_ICMPV6, append([]byte{128, 0, 0, 0, 0, 0, 0, 0}, handMade...)), false},
		{"UDP", kit.IP(src6, dst6, unix.IPPROTO_UDP, kit.Datagram(ap(src6, 4711), ap(dst6, 80), handMade)), false},
		{"too short to be IP", append([]byte{0x45, 0, 0, 15}, handMade...), false},
	} {
		// What arrives of a fragment without flags is not its content.
		if tt.name != "first fragment that hides the flags" && !comesOut(t, p, "eth0", tt.packet, wireWays[1].send) {
			t.Fatalf("%s: without Sluice it does not arrive", tt.name)
		}
		p.Enroll(d)
		arrived := comesOut(t, p, "eth0", tt.packet, wireWays[1].send)
		counted := p.Stat(d, byGuard)
		if arrived == tt.stops {
			t.Errorf("%s: arrives: %v, want %v", tt.name, arrived, !tt.stops)
		}
		if (counted == 1) != tt.stops {
			t.Errorf("%s: the guard counts %d", tt.name, counted)
		}
		if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
			t.Fatal(err)
		}
	}
}

func TestGuardDropsLoopbackDestinationsOnTheWire(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	loopback := netip.MustParseAddr("127.128.1.2")
	packets := [][]byte{
		handMadeSYN(kit.Pod4, loopback),
		kit.IP(kit.Pod4, loopback, unix.IPPROTO_UDP, kit.Datagram(ap(kit.Pod4, 1), ap(loopback, 2), handMade)),
	}
	for _, packet := range packets {
		if !comesOut(t, p, "eth0", packet, wireWays[1].send) {
			t.Fatal("without Sluice it does not arrive")
		}
	}
	p.Enroll(d)
	for i, packet := range packets {
		if comesOut(t, p, "eth0", packet, wireWays[1].send) {
			t.Errorf("packet %d passes the guard", i)
		}
		if n := p.Stat(d, byLoopback); n != uint64(i+1) {
			t.Errorf("%d are counted, want %d", n, i+1)
		}
	}
}

func TestACapturedConnectBoundToAnInterfaceNeverLeavesThePod(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			toDevice := kit.With(func(fd int) error { return unix.BindToDevice(fd, "eth0") })
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			direct, err := p.Dial(kit.App, f.socket, ap(f.far, 80), toDevice)
			if err != nil {
				t.Fatal("without Sluice:", err)
			}
			kit.Exchange(t, direct, server.MustAccept(), 100)

			p.Enroll(d)
			proxyListeners(p)
			s, err := p.Socket(kit.App, f.socket, toDevice)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.SetNonblock(s.FD, true); err != nil {
				t.Fatal(err)
			}
			if err := p.As(kit.App, func() error { return s.Connect(ap(f.far, 80)) }); err == nil {
				t.Error("the connect succeeds")
			}
			kit.Eventually(t, "the guard stops the SYN", func() bool { return p.Stat(d, byLoopback)+p.Stat(d, byGuard) > 0 })
			if _, err := server.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
				t.Error("the far server got a connection behind the proxy's back")
			}
		})
	}
}

// A socket from another cgroup, whose connect() no hook sees. Its SYN is dropped, and
// sent again after a second.
func TestGuardCountsSYNsAndNoConnections(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	server := p.Far.Listen(kit.Root, at("0.0.0.0", 80))
	defer server.Close()
	kit.Outside(t, func() {
		direct, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80))
		if err != nil {
			t.Fatal("without Sluice:", err)
		}
		kit.Exchange(t, direct, server.MustAccept(), 100)
		p.Enroll(d)
		s, err := p.Socket(kit.App, unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if err := unix.SetNonblock(s.FD, true); err != nil {
			t.Fatal(err)
		}
		if err := s.Connect(ap(kit.Far4, 80)); !errors.Is(err, unix.ETIMEDOUT) { // it is under way
			t.Fatal("the connect ends with", err)
		}
		kit.Eventually(t, "the SYN is sent again", func() bool { return p.Stat(d, byGuard) > 1 })
	})
	stats, err := d.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range stats {
		if s.Cookie == p.Cookie() && (s.Reason != byGuard || s.Unit != "SYNs") {
			t.Errorf("counted is %+v", s)
		}
	}
}
