package kit

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// UDPSocket opens a UDP socket in the namespace as somebody.
func (n *NS) UDPSocket(id ID, family int, options ...Option) (*Sock, error) {
	var o opts
	for _, option := range options {
		option(&o)
	}
	s := &Sock{FD: -1, t: n.t}
	err := n.As(id, func() (err error) {
		if s.FD, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		for _, setup := range o.setup {
			if err := setup(s.FD); err != nil {
				return fmt.Errorf("set the socket up: %w", err)
			}
		}
		return nil
	})
	n.t.Cleanup(s.Close)
	return s, err
}

// SendTo is sendto(), as whoever calls; to the peer if to is not valid.
func (s *Sock) SendTo(to netip.AddrPort, data []byte) error {
	for {
		var err error
		if to.IsValid() {
			err = unix.Sendto(s.FD, data, 0, sockaddr(familyOf(s.FD), to))
		} else {
			_, err = unix.Write(s.FD, data)
		}
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// RecvFrom is recvfrom() that waits up to d; ErrNobody if nothing came.
func (s *Sock) RecvFrom(d time.Duration) ([]byte, netip.AddrPort, error) {
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
		buf := make([]byte, 1<<16)
		size, from, err := unix.Recvfrom(s.FD, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, netip.AddrPort{}, err
		}
		return buf[:size], addrPort(from), nil
	}
}

// ListenUDP opens a UDP server's socket in the namespace as somebody.
func (n *NS) ListenUDP(id ID, at string) *net.UDPConn {
	n.t.Helper()
	var conn *net.UDPConn
	err := n.As(id, func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		return err
	})
	if err != nil {
		n.t.Fatalf("listen on %s in %s: %v", at, n.Name, err)
	}
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

// ListenTCP opens a TCP server's socket in the namespace as somebody.
func (n *NS) ListenTCP(id ID, at string) *net.TCPListener {
	n.t.Helper()
	var l *net.TCPListener
	err := n.As(id, func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		return err
	})
	if err != nil {
		n.t.Fatalf("listen on %s in %s: %v", at, n.Name, err)
	}
	n.t.Cleanup(func() { l.Close() })
	return l
}
