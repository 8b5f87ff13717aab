package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// sizes are of getsockopt buffers: none, too short, exact, a page, and more.
var sizes = []int{0, 1, 4, 15, 16, 27, 28, 128, 4095, 4096, 4097, 65536}

// questions are getsockopt calls, SO_ORIGINAL_DST's number at every level among
// them, whose answers are always the same.
var questions = []struct{ level, name int }{
	{unix.SOL_SOCKET, 80}, {unix.SOL_TCP, 80}, {unix.SOL_UDP, 80}, {unix.SOL_MPTCP, 80}, {unix.SOL_RAW, 80}, {4711, 80}, {-1, 80},
	{unix.SOL_IP, 80}, {unix.SOL_IPV6, 80}, {unix.SOL_IP, 81}, {unix.SOL_IPV6, 81},
	{unix.SOL_SOCKET, unix.SO_TYPE}, {unix.SOL_SOCKET, unix.SO_RCVBUF}, {unix.SOL_SOCKET, unix.SO_DOMAIN}, {unix.SOL_SOCKET, unix.SO_GET_FILTER},
	{unix.SOL_TCP, unix.TCP_CONGESTION}, {unix.SOL_TCP, unix.TCP_NODELAY}, {unix.SOL_IP, unix.IP_TTL}, {unix.SOL_IP, unix.IP_OPTIONS},
	{unix.SOL_IPV6, unix.IPV6_V6ONLY}, {unix.SOL_IPV6, unix.IPV6_2292PKTOPTIONS},
}

// answers asks a socket everything, but what skip names.
func answers(fd int, skip func(level, name int) bool) map[string]string {
	out := map[string]string{}
	for _, q := range questions {
		if skip(q.level, q.name) {
			continue
		}
		for _, size := range sizes {
			answer, err := (&kit.Sock{FD: fd}).Getsockopt(q.level, q.name, size)
			out[fmt.Sprintf("level %d, option %d, %d bytes", q.level, q.name, size)] = fmt.Sprintf("%x %v", answer, err)
		}
	}
	return out
}

func nothingSkipped(int, int) bool { return false }

// kinds opens one socket of every kind in a pod: the names say which.
func kinds(t *testing.T, p *kit.Pod, port int) map[string]int {
	t.Helper()
	out := map[string]int{}
	p.Far.Listen(kit.Root, at("[::]", port)) // stays, or the clients would be reset
	for _, f := range families {
		listener := p.Listen(kit.Root, at(f.wildcard, port), kit.ReusePort)
		out[f.name+" listener"] = listener.FD
		s, err := p.Dial(kit.ProxyUID, f.socket, ap(f.far, port)) // direct, enrolled or not
		if err != nil {
			t.Fatal("dial:", err)
		}
		out[f.name+" client"] = s.FD
		if out[f.name+" unconnected"] = raw(t, p, f.socket, unix.SOCK_STREAM); f.name == "v4-mapped" {
			continue
		}
		out[f.name+" UDP"] = raw(t, p, f.socket, unix.SOCK_DGRAM)
	}
	out["unix"] = raw(t, p, unix.AF_UNIX, unix.SOCK_STREAM)
	return out
}

func raw(t *testing.T, p *kit.Pod, family, kind int) int {
	t.Helper()
	fd := -1
	err := p.Do(func() (err error) {
		fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal("socket:", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestGetsockoptOfOtherOptionsIsAsWithoutSluice(t *testing.T) {
	d := kit.Datapath(t)
	for _, enrolled := range []bool{false, true} {
		t.Run(fmt.Sprint("enrolled ", enrolled), func(t *testing.T) {
			p := kit.NewPod(t)
			var without map[string]int
			kit.Outside(t, func() { without = kinds(t, p, 80) })
			if enrolled { // now, or the guard would stop those from outside
				p.Enroll(d)
			}
			with := kinds(t, p, 81)
			for kind := range with {
				skip := nothingSkipped
				if enrolled && (kind == "IPv4 client" || kind == "IPv6 client" || kind == "v4-mapped client") {
					// These get an answer, and that is tested elsewhere.
					skip = func(level, name int) bool { return name == 80 && (level == unix.SOL_IP || level == unix.SOL_IPV6) }
				}
				if diff := cmp.Diff(answers(without[kind], skip), answers(with[kind], skip)); diff != "" {
					t.Errorf("%s: %s", kind, diff)
				}
			}
		})
	}
}

// seen is what a program outside any enrolled namespace sees of its sockets.
type seen struct {
	Connect, Refused, Bind     string
	Name, Peer, AcceptedPeer   netip.Addr
	PeerPort                   uint16
	OrigDst, AcceptedOrigDst   [2]string
	BoundTwice, ConnectedTwice string
}

func look(t *testing.T, p *kit.Pod, f family) seen {
	t.Helper()
	server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
	defer server.Close()
	client, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	accepted := server.MustAccept()
	defer accepted.Close()
	s := seen{Name: client.Name().Addr(), Peer: client.Peer().Addr(), PeerPort: client.Peer().Port(), AcceptedPeer: accepted.Peer().Addr()}
	for i, level := range []int{unix.SOL_IP, unix.SOL_IPV6} {
		got, err := client.OrigDst(level)
		s.OrigDst[i] = fmt.Sprint(got, err)
		got, err = accepted.OrigDst(level)
		s.AcceptedOrigDst[i] = fmt.Sprint(got, err)
	}
	s.ConnectedTwice = fmt.Sprint(p.As(kit.App, func() error { return client.Connect(ap(f.far, 81)) }))
	_, err = p.Dial(kit.App, f.socket, ap(f.far, 81))
	s.Refused = fmt.Sprint(err)
	_, err = p.TryListen(kit.App, at(f.wildcard, 15001))
	s.Bind = fmt.Sprint(err)
	_, err = p.TryListen(kit.App, at(f.wildcard, 15001))
	s.BoundTwice = fmt.Sprint(err)
	return s
}

func TestWhoIsNotEnrolledSeesNoDifference(t *testing.T) {
	d := kit.Datapath(t)
	other := kit.NewPod(t)
	other.Enroll(d)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			var without, with seen
			p, q := kit.NewPod(t), kit.NewPod(t)
			kit.Outside(t, func() { without = look(t, p, f) })
			with = look(t, q, f)
			if diff := cmp.Diff(without, with, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
			if n := len(stats(t, q, d)); n != 0 {
				t.Errorf("it is counted: %v", stats(t, q, d))
			}
		})
	}
}

func stats(t *testing.T, p *kit.Pod, d *datapath.Datapath) map[string]uint64 {
	t.Helper()
	all, err := d.Stats()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]uint64{}
	for _, s := range all {
		if s.Cookie == p.Cookie() {
			out[s.Reason] = s.Count
		}
	}
	return out
}

// Every pod of the kit has the same addresses; these use the same ports too.
func TestPodsWithTheSameAddressesDoNotMix(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			const n = 50
			type pair struct {
				p   *kit.Pod
				out *kit.Sock
			}
			var pods []pair
			for range 2 {
				p := kit.NewPod(t)
				p.Enroll(d)
				out, _ := proxyListeners(p)
				pods = append(pods, pair{p, out[f.wildcard]})
			}
			source := f.pod
			for i := range n {
				var clients [2]*kit.Sock
				for j, pod := range pods {
					from := kit.With(func(fd int) error {
						return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
					})
					var err error
					// The same 4-tuple up to the destination's port, which tells the pods apart.
					clients[j], err = pod.p.Dial(kit.App, f.socket, ap(f.far, 1000+j*n+i), from, kit.Bind(ap(source, 20000+i)))
					if err != nil {
						t.Fatal("dial:", err)
					}
				}
				for j, pod := range pods {
					accepted := pod.out.MustAccept()
					want := ap(f.far, 1000+j*n+i)
					if got, err := accepted.OrigDst(f.level); err != nil || got != want {
						t.Errorf("pod %d: SO_ORIGINAL_DST is %v, %v; want %v", j, got, err, want)
					}
					if accepted.Peer() != ap(source, 20000+i) || clients[j].Peer() != want {
						t.Errorf("pod %d: the proxy's peer is %v, the client's %v", j, accepted.Peer(), clients[j].Peer())
					}
					kit.Exchange(t, clients[j], accepted, 64)
				}
			}
			for j, pod := range pods {
				if got := stats(t, pod.p, d)["captured-out"]; got != n {
					t.Errorf("pod %d: captured-out is %d, want %d", j, got, n)
				}
			}
		})
	}
}

func TestUDPIsLeftAlone(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families[:2] {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			for _, enrolled := range []bool{false, true} {
				if enrolled {
					p.Enroll(d, kit.ByTC)
					proxyListeners(p)
				}
				for _, way := range []struct {
					from, to *kit.NS
					src, dst netip.Addr
				}{{p.NS, p.Far, f.pod, f.far}, {p.Far, p.NS, f.far, f.pod}, {p.NS, p.NS, f.pod, f.pod}} {
					if err := datagrams(t, way.from, way.to, f.socket, way.src, way.dst); err != nil {
						t.Errorf("enrolled %v, %v to %v: %v", enrolled, way.src, way.dst, err)
					}
				}
			}
			if got := stats(t, p, d); len(got) != 0 {
				t.Errorf("it is counted: %v", got)
			}
		})
	}
}

// datagrams sends one there from an unconnected socket and one back from a connected
// one, and compares content and names.
func datagrams(t *testing.T, from, to *kit.NS, family int, src, dst netip.Addr) error {
	t.Helper()
	open := func(ns *kit.NS, local netip.AddrPort) (fd int, err error) {
		err = ns.As(kit.App, func() error {
			if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			tv := unix.NsecToTimeval(kit.Patience.Nanoseconds())
			return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv), unix.Bind(fd, sockaddrOf(local)))
		})
		return fd, err
	}
	client, err1 := open(from, ap(src, 5000))
	server, err2 := open(to, ap(dst, 15001))
	defer unix.Close(client)
	defer unix.Close(server)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	buf := make([]byte, 100)
	if err := unix.Sendto(client, []byte("there"), 0, sockaddrOf(ap(dst, 15001))); err != nil {
		return err
	}
	n, peer, err := unix.Recvfrom(server, buf, 0)
	if err != nil || string(buf[:n]) != "there" || addrPortOf(peer) != ap(src, 5000) {
		return fmt.Errorf("the server got %q from %v, %w", buf[:n], addrPortOf(peer), err)
	}
	if err := errors.Join(unix.Connect(server, peer), unix.Connect(client, sockaddrOf(ap(dst, 15001)))); err != nil {
		return err
	}
	if _, err := unix.Write(server, []byte("back")); err != nil {
		return err
	}
	n, err = unix.Read(client, buf)
	name, err1 := unix.Getsockname(client)
	peer, err2 = unix.Getpeername(client)
	err = errors.Join(err, err1, err2)
	if err != nil || string(buf[:n]) != "back" || addrPortOf(peer) != ap(dst, 15001) || addrPortOf(name) != ap(src, 5000) {
		return fmt.Errorf("the client got %q, %w; it is %v, its peer %v", buf[:n], err, addrPortOf(name), addrPortOf(peer))
	}
	return nil
}

func sockaddrOf(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
