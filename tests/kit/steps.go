package kit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The calls of connect and accept one by one, for tests of what lies between.

// Start is one connect() call and nothing else: EINPROGRESS is an error. Run it
// within NS.As; Finish waits.
func (s *Sock) Start(to netip.AddrPort) error {
	return unix.Connect(s.FD, sockaddr(familyOf(s.FD), to))
}

// FastOpen is sendto() with MSG_FASTOPEN, all of the data at once. The thread's
// signals must be blocked (Undisturbed): interrupted, nobody knows what is sent.
func (s *Sock) FastOpen(to netip.AddrPort, data []byte) error {
	n, err := unix.SendmsgN(s.FD, data, nil, sockaddr(familyOf(s.FD), to), unix.MSG_FASTOPEN|unix.MSG_NOSIGNAL)
	if err == nil && n < len(data) {
		err = s.write(data[n:])
	}
	return err
}

// Undisturbed runs fn on this (locked) thread with every signal blocked.
func Undisturbed(fn func() error) error {
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	err := fn()
	return errors.Join(err, unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil))
}

// AcceptFrom is AcceptWithin that also gives the address that accept() wrote.
func (s *Sock) AcceptFrom(d time.Duration) (*Sock, netip.AddrPort, error) {
	deadline := time.Now().Add(d)
	for {
		fds := []unix.PollFd{{Fd: int32(s.FD), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, max(int(time.Until(deadline).Milliseconds()), 0))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, netip.AddrPort{}, err
		}
		if n == 0 {
			return nil, netip.AddrPort{}, ErrNobody
		}
		fd, from, err := unix.Accept4(s.FD, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return nil, netip.AddrPort{}, fmt.Errorf("accept: %w", err)
		}
		c := &Sock{FD: fd, t: s.t}
		s.t.Cleanup(c.Close)
		c.timeout(Patience)
		return c, addrPort(from), nil
	}
}

// WriteAll writes all of p, ReadFull reads all of it.
func (s *Sock) WriteAll(p []byte) error { return s.write(p) }

// ReadFull fills p, or says why not.
func (s *Sock) ReadFull(p []byte) error { return s.read(p) }

// waitForAddress waits until the namespace answers at an address. The kernel
// completes an IPv6 address in a work queue, even without duplicate detection,
// and until then sends what is meant for it to the network.
func (n *NS) waitForAddress(a netip.Addr) {
	n.t.Helper()
	Eventually(n.t, a.String()+" is local in "+n.Name, func() (local bool) {
		n.Netlink(func(h *netlink.Handle) error {
			routes, err := h.RouteGet(a.AsSlice())
			local = err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL
			return nil
		})
		return local
	})
}

// putSockaddr writes the kernel's form of an address and returns its length.
func putSockaddr(b []byte, family int, ap netip.AddrPort) int {
	clear(b)
	binary.NativeEndian.PutUint16(b, uint16(family))
	binary.BigEndian.PutUint16(b[2:], ap.Port())
	if family == unix.AF_INET6 {
		a := ap.Addr().As16()
		copy(b[8:], a[:])
		return unix.SizeofSockaddrInet6
	}
	a := ap.Addr().Unmap().As4()
	copy(b[4:], a[:])
	return unix.SizeofSockaddrInet4
}

// getSockaddr reads it, v4-mapped ones unmapped.
func getSockaddr(b []byte) netip.AddrPort {
	port := binary.BigEndian.Uint16(b[2:])
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])).Unmap(), port)
	}
	return netip.AddrPort{}
}

// Bind binds a socket that was opened before.
func (s *Sock) Bind(ap netip.AddrPort) error { return unix.Bind(s.FD, sockaddr(familyOf(s.FD), ap)) }

// ReadSome reads what comes; io.EOF at the end.
func (s *Sock) ReadSome() (int, error) {
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(s.FD, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = io.EOF
		}
		return max(n, 0), err
	}
}
