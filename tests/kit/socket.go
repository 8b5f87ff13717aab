package kit

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Patience is how long anything may take that should happen.
const Patience = 5 * time.Second

// Quiet is how long a test waits for what should not happen, beside a proof
// that it would have been seen: see Pod's users.
const Quiet = 200 * time.Millisecond

// SOOriginalDst is SO_ORIGINAL_DST, and IP6T_SO_ORIGINAL_DST.
const SOOriginalDst = 80

// Sock is a raw socket descriptor with the calls that tests make.
type Sock struct {
	FD int
	t  testing.TB
}

// Option changes a socket before it is bound or connected.
type Option func(*opts)

type opts struct {
	protocol int
	setup    []func(fd int) error
}

// MPTCP makes the socket an MPTCP one.
func MPTCP(o *opts) { o.protocol = unix.IPPROTO_MPTCP }

// V6Only sets IPV6_V6ONLY.
func V6Only(o *opts) { Set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)(o) }

// ReusePort sets SO_REUSEPORT.
func ReusePort(o *opts) { Set(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)(o) }

// Set sets an integer socket option.
func Set(level, name, value int) Option {
	return With(func(fd int) error { return unix.SetsockoptInt(fd, level, name, value) })
}

// Bind binds before connect.
func Bind(ap netip.AddrPort) Option {
	return With(func(fd int) error { return unix.Bind(fd, sockaddr(familyOf(fd), ap)) })
}

// With runs anything on the new socket.
func With(fn func(fd int) error) Option {
	return func(o *opts) { o.setup = append(o.setup, fn) }
}

// Socket opens a TCP socket in the namespace as somebody. Calls on it time out
// after Patience.
func (n *NS) Socket(id ID, family int, options ...Option) (*Sock, error) {
	var s *Sock
	err := n.As(id, func() (err error) {
		s, err = open(n.t, family, options)
		return err
	})
	return s, err
}

func open(t testing.TB, family int, options []Option) (*Sock, error) {
	o := opts{protocol: unix.IPPROTO_TCP}
	for _, option := range options {
		option(&o)
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, o.protocol)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	s := &Sock{FD: fd, t: t}
	t.Cleanup(s.Close)
	s.timeout(Patience)
	for _, setup := range o.setup {
		if err := setup(fd); err != nil {
			return nil, fmt.Errorf("set the socket up: %w", err)
		}
	}
	return s, nil
}

func (s *Sock) timeout(d time.Duration) {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	_ = unix.SetsockoptTimeval(s.FD, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
	_ = unix.SetsockoptTimeval(s.FD, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
}

// Close is idempotent.
func (s *Sock) Close() {
	if s.FD >= 0 {
		unix.Close(s.FD)
		s.FD = -1
	}
}

// Reset closes with a RST.
func (s *Sock) Reset() {
	_ = unix.SetsockoptLinger(s.FD, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	s.Close()
}

// Dial connects; addresses of the other family become v4-mapped on AF_INET6.
func (n *NS) Dial(id ID, family int, to netip.AddrPort, options ...Option) (*Sock, error) {
	var s *Sock
	err := n.As(id, func() (err error) {
		if s, err = open(n.t, family, options); err != nil {
			return err
		}
		return s.Connect(to)
	})
	if err != nil && s != nil {
		s.Close()
	}
	return s, err
}

// Connect connects, as whoever calls.
func (s *Sock) Connect(to netip.AddrPort) error {
	err := unix.Connect(s.FD, sockaddr(familyOf(s.FD), to))
	if errors.Is(err, unix.EINTR) {
		err = s.finishConnect()
	}
	if errors.Is(err, unix.EINPROGRESS) { // SO_SNDTIMEO ran out
		return unix.ETIMEDOUT
	}
	return err
}

// finishConnect waits for a connect that a signal interrupted (Go's runtime
// sends them), or that does not block.
func (s *Sock) finishConnect() error {
	deadline := time.Now().Add(Patience)
	for {
		fds := []unix.PollFd{{Fd: int32(s.FD), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return unix.ETIMEDOUT
		}
		soErr, err := unix.GetsockoptInt(s.FD, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && soErr != 0 {
			err = unix.Errno(soErr)
		}
		return err
	}
}

// Finish is finishConnect for tests of non-blocking sockets.
func (s *Sock) Finish() error { return s.finishConnect() }

// Disconnect is connect() to AF_UNSPEC.
func (s *Sock) Disconnect() error {
	var sa unix.RawSockaddr
	sa.Family = unix.AF_UNSPEC
	return rawConnect(s.FD, &sa)
}

// Listen opens a listener in the namespace as somebody.
func (n *NS) Listen(id ID, at string, options ...Option) *Sock {
	n.t.Helper()
	s, err := n.TryListen(id, at, options...)
	if err != nil {
		n.t.Fatalf("listen on %s in %s: %v", at, n.Name, err)
	}
	return s
}

// TryListen is Listen for what may fail. The family is the address's.
func (n *NS) TryListen(id ID, at string, options ...Option) (*Sock, error) {
	ap := netip.MustParseAddrPort(at)
	family := unix.AF_INET
	if ap.Addr().Is6() {
		family = unix.AF_INET6
	}
	// Not V6ONLY unless asked, whatever the machine's default is.
	if family == unix.AF_INET6 {
		options = append([]Option{Set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)}, options...)
	}
	options = append([]Option{Set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)}, options...)
	var s *Sock
	err := n.As(id, func() (err error) {
		if s, err = open(n.t, family, options); err != nil {
			return err
		}
		if err := unix.Bind(s.FD, sockaddr(family, ap)); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		return unix.Listen(s.FD, 4096)
	})
	if err != nil && s != nil {
		s.Close()
	}
	return s, err
}

// Accept waits up to Patience for a connection.
func (s *Sock) Accept() (*Sock, error) { return s.AcceptWithin(Patience) }

// AcceptWithin waits up to d; ErrNobody if nobody came.
func (s *Sock) AcceptWithin(d time.Duration) (*Sock, error) {
	deadline := time.Now().Add(d)
	for {
		fds := []unix.PollFd{{Fd: int32(s.FD), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, max(int(time.Until(deadline).Milliseconds()), 0))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, ErrNobody
		}
		fd, _, err := unix.Accept4(s.FD, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("accept: %w", err)
		}
		c := &Sock{FD: fd, t: s.t}
		s.t.Cleanup(c.Close)
		c.timeout(Patience)
		return c, nil
	}
}

// AcceptAny accepts from whichever listener has a connection within d.
// ErrNobody if none has.
func AcceptAny(d time.Duration, listeners ...*Sock) (*Sock, error) {
	deadline := time.Now().Add(d)
	for {
		var fds []unix.PollFd
		for _, l := range listeners {
			fds = append(fds, unix.PollFd{Fd: int32(l.FD), Events: unix.POLLIN}) // poll skips closed ones, -1
		}
		n, err := unix.Poll(fds, max(int(time.Until(deadline).Milliseconds()), 0))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, ErrNobody
		}
		for i, f := range fds {
			if f.Revents&unix.POLLIN != 0 {
				return listeners[i].AcceptWithin(0)
			}
		}
		return nil, errors.New("a listener is shut down")
	}
}

// ErrNobody is returned by AcceptWithin.
var ErrNobody = errors.New("nobody connected")

// MustAccept is Accept for what must come.
func (s *Sock) MustAccept() *Sock {
	s.t.Helper()
	c, err := s.Accept()
	if err != nil {
		s.t.Fatal("accept:", err)
	}
	return c
}

// Name and Peer are getsockname and getpeername, v4-mapped ones unmapped.
func (s *Sock) Name() netip.AddrPort {
	s.t.Helper()
	sa, err := unix.Getsockname(s.FD)
	if err != nil {
		s.t.Fatal("getsockname:", err)
	}
	return addrPort(sa)
}

// Peer is getpeername.
func (s *Sock) Peer() netip.AddrPort {
	s.t.Helper()
	sa, err := unix.Getpeername(s.FD)
	if err != nil {
		s.t.Fatal("getpeername:", err)
	}
	return addrPort(sa)
}

// OrigDst asks SO_ORIGINAL_DST at a level (SOL_IP or SOL_IPV6) with the 128-byte
// buffer that Envoy uses.
func (s *Sock) OrigDst(level int) (netip.AddrPort, error) {
	buf, err := s.Getsockopt(level, SOOriginalDst, 128)
	if err != nil {
		return netip.AddrPort{}, err
	}
	switch {
	case len(buf) == unix.SizeofSockaddrInet4 && binary.NativeEndian.Uint16(buf) == unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(buf[4:8])), binary.BigEndian.Uint16(buf[2:])), nil
	case len(buf) == unix.SizeofSockaddrInet6 && binary.NativeEndian.Uint16(buf) == unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(buf[8:24])), binary.BigEndian.Uint16(buf[2:])), nil
	}
	return netip.AddrPort{}, fmt.Errorf("SO_ORIGINAL_DST answered %d bytes of family %d", len(buf), binary.NativeEndian.Uint16(buf))
}

// Getsockopt is the raw call with a buffer of a size.
func (s *Sock) Getsockopt(level, name, size int) ([]byte, error) {
	return rawGetsockopt(s.FD, level, name, size)
}

// Exchange sends content both ways and compares hashes. Big content shows
// order and loss, small content speed.
func Exchange(t testing.TB, a, b *Sock, size int) {
	t.Helper()
	for _, way := range []struct{ from, to *Sock }{{a, b}, {b, a}} {
		content := make([]byte, size)
		rand.Read(content)
		sent := make(chan error, 1)
		go func() { sent <- way.from.write(content) }()
		got := make([]byte, size)
		if err := way.to.read(got); err != nil {
			t.Fatal("read:", err)
		}
		if err := <-sent; err != nil {
			t.Fatal("write:", err)
		}
		if sha256.Sum256(content) != sha256.Sum256(got) || !bytes.Equal(content, got) {
			t.Fatal("what arrived is not what was sent")
		}
	}
}

func (s *Sock) write(p []byte) error {
	for len(p) > 0 {
		n, err := unix.SendmsgN(s.FD, p, nil, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func (s *Sock) read(p []byte) error {
	for len(p) > 0 {
		n, err := unix.Read(s.FD, p)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		p = p[n:]
	}
	return nil
}

// Eventually polls until a condition holds. It waits long, for what it waits for
// may take processes that have to share the machine with other tests.
func Eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	const limit = 8 * Patience
	deadline := time.Now().Add(limit)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Scaled is a limit for a machine with a CPU to spare, on one that has more to do
// than its CPUs can: as much longer as a process waits there.
func Scaled(t testing.TB, limit time.Duration) time.Duration {
	t.Helper()
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	var load float64
	if _, err := fmt.Sscan(string(text), &load); err != nil {
		t.Fatal(err)
	}
	return time.Duration(float64(limit) * max(1, load/float64(runtime.NumCPU())))
}
