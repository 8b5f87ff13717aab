package demo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// RunHelper asks the kernel in HAProxy's place where an IPv6 connection was
// going. HAProxy (up to 3.x) asks with SO_ORIGINAL_DST for IPv4 only, and so
// cannot be the target of an IPv6 redirection by itself, whoever redirects. The
// helper listens where the proxy should, asks, and hands each connection on to
// HAProxy at to, with the answer in a header of the PROXY protocol. It does not
// return without an error.
func RunHelper(listen, to string) error {
	l, err := net.Listen("tcp6", listen)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		if in, ok := c.(*net.TCPConn); ok {
			go func() {
				defer in.Close()
				_ = handOn(in, to) // both ends see it closed
			}()
		}
	}
}

func handOn(in *net.TCPConn, to string) error {
	_, peer := names(in)
	dst, err := originalDst6(in)
	if err != nil {
		return err
	}
	c, err := net.Dial("tcp6", to)
	if err != nil {
		return err
	}
	out, ok := c.(*net.TCPConn)
	if !ok {
		return errors.New("not a TCP connection")
	}
	defer out.Close()
	if _, err := fmt.Fprintf(out, "PROXY TCP6 %s %s %d %d\r\n", peer.Addr(), dst.Addr(), peer.Port(), dst.Port()); err != nil {
		return err
	}
	var both sync.WaitGroup
	pipe := func(from, to *net.TCPConn) {
		_, _ = io.Copy(to, from) // the digests tell whether all of it arrived
		_ = to.CloseWrite()
	}
	both.Go(func() { pipe(in, out) })
	both.Go(func() { pipe(out, in) })
	both.Wait()
	return nil
}

// originalDst6 is getsockopt(SOL_IPV6, IP6T_SO_ORIGINAL_DST).
func originalDst6(c *net.TCPConn) (netip.AddrPort, error) {
	const ip6tSoOriginalDst = 80
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var sa unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(sa))
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_IPV6, ip6tSoOriginalDst,
			uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
	}); err != nil {
		return netip.AddrPort{}, err
	}
	if errno != 0 {
		return netip.AddrPort{}, fmt.Errorf("ask for the original destination: %w", errno)
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port), nil
}
