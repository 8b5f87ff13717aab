package netns

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

const tcpFastOpenConnect = 30 // TCP_FASTOPEN_CONNECT

// dialing is what a way of connecting gets.
type dialing struct {
	from     *kit.NS
	f        family
	to       netip.AddrPort
	listener *kit.Sock // whoever will accept
}

func (d dialing) socket(options ...kit.Option) (*kit.Sock, error) {
	return d.from.Socket(kit.App, d.f.socket, options...)
}

// as runs a step as the app.
func (d dialing) as(step func() error) error { return d.from.As(kit.App, step) }

// any is the any address as this socket family binds it.
func (d dialing) any() netip.Addr {
	if d.f.socket == unix.AF_INET6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// loopback is 127.0.0.1 or ::1, of the destination's family.
func (d dialing) loopback() netip.Addr {
	if d.to.Addr().Is4() {
		return netip.MustParseAddr("127.0.0.1")
	}
	return netip.IPv6Loopback()
}

// way is one way in which an app connects.
type way struct {
	name     string
	dial     func(d dialing) (s *kit.Sock, err error)
	sent     bool                       // dial has sent the greeting
	source   func(d dialing) netip.Addr // nil: the pod's address
	captured bool                       // it connects only because it is captured
}

var greeting = []byte("sent while connecting")

func plain(options ...kit.Option) func(dialing) (*kit.Sock, error) {
	return func(d dialing) (*kit.Sock, error) {
		return d.from.Dial(kit.App, d.f.socket, d.to, options...)
	}
}

// nonBlocking connects as event loops do.
func nonBlocking(options ...kit.Option) func(dialing) (*kit.Sock, error) {
	return func(d dialing) (*kit.Sock, error) {
		s, err := d.socket(append(slices.Clone(options), kit.With(func(fd int) error { return unix.SetNonblock(fd, true) }))...)
		if err != nil {
			return nil, err
		}
		if err := d.as(func() error { return s.Start(d.to) }); !errors.Is(err, unix.EINPROGRESS) {
			return nil, errors.Join(errors.New("a non-blocking connect did not say EINPROGRESS"), err)
		}
		if err := s.Finish(); err != nil {
			return nil, err
		}
		return s, unix.SetNonblock(s.FD, false)
	}
}

func bound(at func(d dialing) netip.AddrPort, options ...kit.Option) func(dialing) (*kit.Sock, error) {
	return func(d dialing) (*kit.Sock, error) {
		return d.from.Dial(kit.App, d.f.socket, d.to, append(slices.Clone(options), kit.Bind(at(d)))...)
	}
}

// again connects, disconnects with AF_UNSPEC and connects again.
func again(at func(d dialing) netip.AddrPort, options ...kit.Option) func(dialing) (*kit.Sock, error) {
	return func(d dialing) (*kit.Sock, error) {
		setup := slices.Clone(options)
		if at != nil {
			setup = append(setup, kit.Bind(at(d)))
		}
		s, err := d.from.Dial(kit.App, d.f.socket, d.to, setup...)
		if err != nil {
			return nil, err
		}
		first, err := d.listener.Accept()
		if err != nil {
			return nil, err
		}
		defer first.Close()
		return s, errors.Join(s.Disconnect(), d.as(func() error { return s.Connect(d.to) }))
	}
}

// fastOpen sends with the SYN, by sendto() or by TCP_FASTOPEN_CONNECT.
func fastOpen(byConnect bool) func(dialing) (*kit.Sock, error) {
	return func(d dialing) (*kit.Sock, error) {
		options := []kit.Option{}
		if byConnect {
			options = append(options, kit.Set(unix.IPPROTO_TCP, tcpFastOpenConnect, 1))
		}
		s, err := d.socket(options...)
		if err != nil {
			return nil, err
		}
		return s, d.as(func() error {
			return kit.Undisturbed(func() error {
				if !byConnect {
					return s.FastOpen(d.to, greeting)
				}
				if err := s.Start(d.to); err != nil {
					return err
				}
				return s.WriteAll(greeting)
			})
		})
	}
}

func uring(flags uint8, options ...kit.Option) func(dialing) (*kit.Sock, error) {
	return func(d dialing) (*kit.Sock, error) {
		s, err := d.socket(options...)
		if err != nil {
			return nil, err
		}
		return s, d.as(func() error {
			ring, err := kit.NewRing()
			if err != nil {
				return err
			}
			defer ring.Close()
			return ring.Connect(s, d.to, flags)
		})
	}
}

func uringBound() func(dialing) (*kit.Sock, error) {
	return func(d dialing) (*kit.Sock, error) { return uring(0, kit.Bind(podPort(0)(d)))(d) }
}

func podPort(port int) func(dialing) netip.AddrPort {
	return func(d dialing) netip.AddrPort { return ap(d.f.pod, port) }
}

func anyPort(port int) func(dialing) netip.AddrPort {
	return func(d dialing) netip.AddrPort { return ap(d.any(), port) }
}

func loopbackPort(d dialing) netip.AddrPort { return ap(d.loopback(), 0) }

// Ways of connecting. Each is taken by IPv4, IPv6 and v4-mapped sockets.
var ways = []way{
	{name: "blocking", dial: plain()},
	{name: "non-blocking", dial: nonBlocking()},
	{name: "bound to the pod's address", dial: bound(podPort(0))},
	{name: "bound to the pod's address and a port", dial: bound(podPort(2345))},
	{name: "bound to a port", dial: bound(anyPort(2346))},
	{name: "bound to port 0", dial: bound(anyPort(0))},
	{name: "bound with IP_BIND_ADDRESS_NO_PORT", dial: bound(podPort(0), kit.Set(unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))},
	// Without Sluice the kernel refuses this or nobody answers.
	{name: "bound to loopback", dial: bound(loopbackPort), source: dialing.loopback, captured: true},
	{name: "after AF_UNSPEC", dial: again(nil)},
	{name: "after AF_UNSPEC, bound to the pod's address", dial: again(podPort(0))},
	{name: "io_uring", dial: uring(0)},
	{name: "io_uring, by a kernel thread", dial: uring(kit.RingAsync)},
	{name: "io_uring, bound to the pod's address", dial: uringBound()},
}

// The same with MPTCP, where an app's socket is not the one that the hooks see.
var mptcpWays = []way{
	{name: "MPTCP", dial: plain(kit.MPTCP)},
	{name: "MPTCP, non-blocking", dial: nonBlocking(kit.MPTCP)},
	{name: "MPTCP, bound to the pod's address", dial: bound(podPort(0), kit.MPTCP)},
	{name: "MPTCP, bound to port 0", dial: bound(anyPort(0), kit.MPTCP)},
	{name: "MPTCP, after AF_UNSPEC", dial: again(nil, kit.MPTCP)},
	{name: "MPTCP, io_uring", dial: uring(0, kit.MPTCP)},
}

// TCP Fast Open. The first connection without a cookie asks for one and sends
// nothing with its SYN.
var fastOpenWays = []way{
	{name: "sendto", dial: fastOpen(false), sent: true},
	{name: "TCP_FASTOPEN_CONNECT", dial: fastOpen(true), sent: true},
}
