package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What istio-validation does: as the proxy's user, listen where the proxy would,
// call a port that nobody listens on from a source that is not exempt, and ask an
// accepted connection where it was going.
const (
	probePort  = 15002
	probeLimit = 5 * time.Second
	// SO_ORIGINAL_DST, for IPv4 and IPv6 alike.
	originalDst = 80
)

func validate() error {
	if os.Getuid() == 0 {
		return errors.New("validation as root says nothing: run it as the proxy's user")
	}
	loopback, probe := "127.0.0.1", "127.0.0.6"
	if !hasIPv4() {
		loopback, probe = "::1", "::6"
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
	defer cancel()
	reuse := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if controlErr := c.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
		}); controlErr != nil {
			return controlErr
		}
		return err
	}}
	results := make(chan error, 8)
	for _, port := range []string{"15001", "15006"} {
		l, err := reuse.Listen(ctx, "tcp", net.JoinHostPort(loopback, port))
		if err != nil {
			return err
		}
		defer l.Close()
		go accept(l, results)
	}
	go dialEverySecond(ctx, net.JoinHostPort(loopback, "0"), net.JoinHostPort(probe, fmt.Sprint(probePort)))
	select {
	case err := <-results:
		return err
	case <-ctx.Done():
		return fmt.Errorf("no connection to %s was redirected within %v: this pod is not enrolled", probe, probeLimit)
	}
}

// hasIPv4 says whether the pod has an IPv4 address beyond loopback.
func hasIPv4() bool {
	addresses, _ := net.InterfaceAddrs()
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() {
			return true
		}
	}
	return false
}

func dialEverySecond(ctx context.Context, from, to string) {
	local, err := net.ResolveTCPAddr("tcp", from)
	if err != nil {
		return
	}
	dialer := &net.Dialer{LocalAddr: local, Timeout: time.Second}
	for ctx.Err() == nil {
		if c, err := dialer.DialContext(ctx, "tcp", to); err == nil {
			defer c.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

func accept(l net.Listener, results chan<- error) {
	c, err := l.Accept()
	if err != nil {
		return
	}
	defer c.Close()
	to, err := original(c.(*net.TCPConn))
	if err == nil && to.Port() != probePort {
		err = fmt.Errorf("SO_ORIGINAL_DST is %v, but port %d was called", to, probePort)
	}
	results <- err
}

// original asks where a connection was going.
func original(c *net.TCPConn) (to netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return to, err
	}
	level := uintptr(unix.SOL_IP)
	if local := c.LocalAddr().(*net.TCPAddr).AddrPort(); local.Addr().Unmap().Is6() {
		level = unix.SOL_IPV6
	}
	var buffer [32]byte
	size := uint32(len(buffer))
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, level, originalDst, uintptr(unsafe.Pointer(&buffer[0])), uintptr(unsafe.Pointer(&size)), 0)
	}); err != nil {
		return to, err
	}
	if errno != 0 {
		return to, fmt.Errorf("getsockopt(SO_ORIGINAL_DST): %w", errno)
	}
	port := binary.BigEndian.Uint16(buffer[2:4])
	switch size {
	case unix.SizeofSockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(buffer[4:8])), port), nil
	case unix.SizeofSockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(buffer[8:24])), port), nil
	}
	return to, fmt.Errorf("SO_ORIGINAL_DST has %d bytes", size)
}
