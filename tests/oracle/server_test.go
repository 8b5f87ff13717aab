package oracle

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// saying is the line with which every server answers: who it is, and what it
// knows of its caller.
type saying struct {
	By, Name, Peer, OrigDst string
}

// servers is every listener of a site, served by one goroutine.
type servers struct {
	t     testing.TB
	epoll int
	mu    sync.Mutex
	open  map[int]listener
	done  chan struct{}
}

type listener struct {
	by  string
	udp bool
}

func serve(t testing.TB) *servers {
	t.Helper()
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal("epoll:", err)
	}
	s := &servers{t: t, epoll: epoll, open: map[int]listener{}, done: make(chan struct{})}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal("eventfd:", err)
	}
	if err := s.watch(wake); err != nil {
		t.Fatal(err)
	}
	go s.run(wake)
	t.Cleanup(func() {
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-s.done
		for fd := range s.open {
			unix.Close(fd)
		}
		unix.Close(wake)
		unix.Close(epoll)
	})
	return s
}

func (s *servers) watch(fd int) error {
	return unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func (s *servers) run(wake int) {
	defer close(s.done)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(s.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		for _, e := range events[:max(n, 0)] {
			if int(e.Fd) == wake {
				return
			}
			s.mu.Lock()
			if l, ok := s.open[int(e.Fd)]; ok && l.udp {
				answerDatagrams(int(e.Fd), l.by)
			} else if ok {
				answerConnections(int(e.Fd), l.by)
			}
			s.mu.Unlock()
		}
	}
}

// listen opens TCP and UDP servers in a namespace, on a port of one address.
func (s *servers) listen(ns *kit.NS, id kit.ID, at netip.AddrPort, by string) (fds []int, err error) {
	err = ns.As(id, func() error {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			fd, err := listening(kind, at)
			if err != nil {
				return fmt.Errorf("listen on %s as %v: %w", at, id, err)
			}
			fds = append(fds, fd)
			s.mu.Lock()
			s.open[fd] = listener{by: by, udp: kind == unix.SOCK_DGRAM}
			s.mu.Unlock()
			if err := s.watch(fd); err != nil {
				return err
			}
		}
		return nil
	})
	return fds, err
}

func (s *servers) close(fds []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fd := range fds {
		delete(s.open, fd)
		unix.Close(fd)
	}
}

func listening(kind int, at netip.AddrPort) (int, error) {
	family, level, pktinfo := unix.AF_INET, unix.IPPROTO_IP, unix.IP_PKTINFO
	if at.Addr().Is6() {
		family, level, pktinfo = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if family == unix.AF_INET6 {
		err = errors.Join(err, unix.SetsockoptInt(fd, level, unix.IPV6_V6ONLY, 1))
	}
	if kind == unix.SOCK_DGRAM { // to answer from the address that was asked
		err = errors.Join(err, unix.SetsockoptInt(fd, level, pktinfo, 1))
	}
	if err == nil {
		err = unix.Bind(fd, sockaddr(family, at))
	}
	if err == nil && kind == unix.SOCK_STREAM {
		err = unix.Listen(fd, 4096)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func answerConnections(fd int, by string) {
	for {
		c, from, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		line := saying{By: by, Peer: shown(from)}
		if name, err := unix.Getsockname(c); err == nil {
			line.Name = shown(name)
		}
		// accept() and getpeername() must agree, and the question is by family.
		if peer, err := unix.Getpeername(c); err != nil || shown(peer) != line.Peer {
			line.Peer += fmt.Sprintf(" (getpeername: %s, %v)", shown(peer), err)
		}
		level := unix.SOL_IP
		if addrPort(from).Addr().Is6() {
			level = unix.SOL_IPV6
		}
		line.OrigDst = originalDst(c, level)
		say(c, line, nil)
		unix.Close(c)
	}
}

// originalDst asks as Envoy does. The kernel's own answer does not say how long it
// is: the family does.
func originalDst(fd, level int) string {
	s := kit.Sock{FD: fd}
	buf, err := s.Getsockopt(level, kit.SOOriginalDst, 128)
	if err != nil {
		return errno(err)
	}
	port := binary.BigEndian.Uint16(buf[2:])
	if binary.NativeEndian.Uint16(buf) == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(buf[4:8])), port).String()
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(buf[8:24])), port).String()
}

func answerDatagrams(fd int, by string) {
	var data, control [256]byte
	for {
		_, n, _, from, err := unix.Recvmsg(fd, data[:], control[:], unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) || from == nil {
			return
		}
		out, err := marshal(saying{By: by, Peer: shown(from)})
		if err == nil {
			_ = unix.Sendmsg(fd, out, answerFrom(control[:n]), from, 0)
		}
	}
}

// answerFrom turns the control message that says where a datagram arrived into
// one that says where the answer is from.
func answerFrom(control []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) == 0 {
		return nil
	}
	data := messages[0].Data
	if messages[0].Header.Level == unix.IPPROTO_IP && len(data) >= unix.SizeofInet4Pktinfo {
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(data[8:12])})
	}
	if len(data) >= unix.SizeofInet6Pktinfo {
		return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: [16]byte(data[:16])})
	}
	return nil
}

func marshal(line saying) ([]byte, error) {
	out, err := json.Marshal(line)
	return append(out, '\n'), err
}

func say(fd int, line saying, to unix.Sockaddr) {
	if out, err := marshal(line); err == nil {
		_ = unix.Sendto(fd, out, unix.MSG_NOSIGNAL, to)
	}
}

func sockaddr(family int, ap netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET6 {
		return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

func shown(sa unix.Sockaddr) string { return addrPort(sa).String() }

// errno is the name of an error number.
func errno(err error) string {
	var e unix.Errno
	if errors.As(err, &e) {
		return unix.ErrnoName(e)
	}
	return err.Error()
}
