package netns

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

var inboundWays = []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC}

// inboundBy asks for a way.
func inboundBy(way datapath.Inbound) func(*datapath.Pod) {
	return func(p *datapath.Pod) { p.Inbound = way }
}

// clientKind is a way to open a connection.
type clientKind struct {
	name  string
	early string // what the first packet carries
	open  func(from *kit.NS, f family, to netip.AddrPort) (*kit.Sock, error)
}

var clientKinds = []clientKind{
	{"blocking", "", func(from *kit.NS, f family, to netip.AddrPort) (*kit.Sock, error) {
		return from.Dial(kit.Root, f.socket, to)
	}},
	{"non-blocking", "", openNonBlocking},
	{"TFO", "said in the SYN", openFast},
	{"MPTCP", "", func(from *kit.NS, f family, to netip.AddrPort) (*kit.Sock, error) {
		return from.Dial(kit.Root, f.socket, to, kit.MPTCP)
	}},
}

func unixAddr(f family, to netip.AddrPort) unix.Sockaddr {
	if f.socket == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}

// begin begins a connect and does not wait for its end.
func begin(from *kit.NS, id kit.ID, f family, to netip.AddrPort, options ...kit.Option) (*kit.Sock, error) {
	var s *kit.Sock
	var err error
	s, err = from.Socket(id, f.socket, append(options, kit.With(func(fd int) error { return unix.SetNonblock(fd, true) }))...)
	if err != nil {
		return nil, err
	}
	err = from.As(id, func() error { return unix.Connect(s.FD, unixAddr(f, to)) })
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		s.Close()
		return nil, err
	}
	return s, nil
}

// finish waits for the end of what begin began.
func finish(s *kit.Sock) error {
	return errors.Join(s.Finish(), unix.SetNonblock(s.FD, false))
}

func openNonBlocking(from *kit.NS, f family, to netip.AddrPort) (*kit.Sock, error) {
	s, err := begin(from, kit.Root, f, to)
	if err != nil {
		return nil, err
	}
	return s, finish(s)
}

// openFast fails also where the data did not travel in the SYN.
func openFast(from *kit.NS, f family, to netip.AddrPort) (*kit.Sock, error) {
	s, err := from.Socket(kit.Root, f.socket)
	if err != nil {
		return nil, err
	}
	early := []byte("said in the SYN")
	err = from.As(kit.Root, func() error { return unix.Sendto(s.FD, early, unix.MSG_FASTOPEN|unix.MSG_NOSIGNAL, unixAddr(f, to)) })
	if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EINPROGRESS) {
		err = s.Finish()
	}
	if err != nil {
		return s, err
	}
	info, err := unix.GetsockoptTCPInfo(s.FD, unix.IPPROTO_TCP, unix.TCP_INFO)
	const synData = 32 // TCPI_OPT_SYN_DATA
	if err == nil && info.Options&synData == 0 {
		err = errors.New("the SYN's data was not taken: no TFO")
	}
	return s, err
}

// allowFastOpen lets clients and servers use TFO without a cookie.
func allowFastOpen(p *kit.Pod) {
	for _, ns := range []*kit.NS{p.NS, p.Far} {
		ns.Sysctl("ipv4/tcp_fastopen", fmt.Sprint(0x1|0x2|0x4|0x200|0x400))
	}
}

// converse reads what came early, then exchanges.
func converse(t *testing.T, early string, client, accepted *kit.Sock) {
	t.Helper()
	got := make([]byte, len(early))
	for n := 0; n < len(got); {
		m, err := unix.Read(accepted.FD, got[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && m == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			t.Fatal("read what the SYN carried:", err)
		}
		n += m
	}
	if !bytes.Equal(got, []byte(early)) {
		t.Fatalf("the SYN carried %q, and %q arrived", early, got)
	}
	kit.Exchange(t, client, accepted, 1<<16)
}

// checkInbound is what must hold for a connection that the proxy has.
func checkInbound(t *testing.T, f family, client, accepted *kit.Sock, port int) {
	t.Helper()
	if got, err := accepted.OrigDst(f.level); err != nil || got != ap(f.pod, port) {
		t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, ap(f.pod, port))
	}
	if accepted.Peer() != client.Name() || client.Name().Addr() != f.far {
		t.Errorf("the proxy's peer is %v, the client's name %v; want both alike, of %v", accepted.Peer(), client.Name(), f.far)
	}
	if accepted.Name() != ap(f.pod, port) || client.Peer() != ap(f.pod, port) {
		t.Errorf("the proxy's name is %v, the client's peer %v; want %v", accepted.Name(), client.Peer(), ap(f.pod, port))
	}
}

// arrives dials the pod and returns both ends: the proxy has accepted it, at
// whichever listener, with the right names.
func arrives(t *testing.T, p *kit.Pod, f family, port int, listeners ...*kit.Sock) (client, accepted *kit.Sock) {
	t.Helper()
	client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, port))
	if err != nil {
		t.Fatal("dial:", err)
	}
	accepted, err = kit.AcceptAny(kit.Patience, listeners...)
	if err != nil {
		t.Fatal("at the proxy:", err)
	}
	checkInbound(t, f, client, accepted, port)
	kit.Exchange(t, client, accepted, 1<<12)
	return client, accepted
}

// direct proves that the app gets connections while nothing redirects them.
func direct(t *testing.T, p *kit.Pod, f family, app *kit.Sock, port int) {
	t.Helper()
	client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, port))
	if err != nil {
		t.Fatal("without Sluice:", err)
	}
	accepted := app.MustAccept()
	kit.Exchange(t, client, accepted, 1<<12)
	client.Close()
	accepted.Close()
}

// refused dials the pod and wants a RST at once.
func refused(t *testing.T, p *kit.Pod, f family, port int, when string) {
	t.Helper()
	if _, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, port)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%s the dial ends with %v, want ECONNREFUSED", when, err)
	}
}

// untouched says that the app got nothing. Where a dial ends is decided before
// connect() returns, so there is nothing to wait for.
func untouched(t *testing.T, app *kit.Sock) {
	t.Helper()
	if _, err := app.AcceptWithin(0); !errors.Is(err, kit.ErrNobody) {
		t.Error("the app got a connection behind the proxy's back")
	}
}
