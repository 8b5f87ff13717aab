package bench

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const soOriginalDst = 80

// The loops below make raw system calls on a thread of their own: nothing of
// Go's scheduler or poller is inside what is measured.

// sysErr is a system call that failed.
func sysErr(call string, errno unix.Errno) error { return fmt.Errorf("%s: %w", call, errno) }

func rawSocket(kind uintptr) (uintptr, error) {
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return 0, sysErr("socket", errno)
	}
	return fd, nil
}

func rawClose(fd uintptr) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0) }

func rawConnect(fd uintptr, sa *unix.RawSockaddrInet4) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(sa)), unsafe.Sizeof(*sa))
	return errno
}

func rawWrite(fd uintptr, buf []byte) error {
	for len(buf) > 0 {
		n, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		if errno != 0 {
			return sysErr("write", errno)
		}
		buf = buf[n:]
	}
	return nil
}

// rawRead fills buf; false means the peer closed before its first byte.
func rawRead(fd uintptr, buf []byte) (bool, error) {
	for got := 0; got < len(buf); {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&buf[got])), uintptr(len(buf)-got))
		if errno != 0 {
			return false, sysErr("read", errno)
		}
		if n == 0 {
			return false, nil
		}
		got += int(n)
	}
	return true, nil
}

func sockaddr(a netip.AddrPort) unix.RawSockaddrInet4 {
	sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:], a.Port())
	return sa
}

// addresses returns n successive addresses from a on.
func addresses(a netip.AddrPort, n int) []unix.RawSockaddrInet4 {
	out := make([]unix.RawSockaddrInet4, 0, max(n, 1))
	for addr := a.Addr(); len(out) < max(n, 1); addr = addr.Next() {
		out = append(out, sockaddr(netip.AddrPortFrom(addr, a.Port())))
	}
	return out
}

// echoOnce writes buf and reads as much back.
func echoOnce(fd uintptr, buf []byte) error {
	if err := rawWrite(fd, buf); err != nil {
		return err
	}
	whole, err := rawRead(fd, buf)
	if err == nil && !whole {
		return sysErr("read", unix.ECONNRESET)
	}
	return err
}

func dial(j job) (reply, error) {
	addrs := addresses(j.Addr, j.Addrs)
	buf := make([]byte, j.Size)
	connect, total := make([]float64, 0, j.Count), make([]float64, 0, j.Count)
	start, busy := time.Now(), threadCPU()
	for i := range j.Warm + j.Count {
		fd, err := rawSocket(unix.SOCK_STREAM)
		if err != nil {
			return reply{}, err
		}
		before := time.Since(start)
		if errno := rawConnect(fd, &addrs[i%len(addrs)]); errno != 0 {
			return reply{}, fmt.Errorf("connect to %s: %w", j.Addr, errno)
		}
		connected := time.Since(start)
		if err := echoOnce(fd, buf); err != nil {
			return reply{}, err
		}
		rawClose(fd)
		closed := time.Since(start)
		if i >= j.Warm {
			connect = append(connect, float64(connected-before))
			total = append(total, float64(closed-before))
		}
	}
	return reply{Connect: connect, Total: total, CPU: threadCPU() - busy}, nil
}

func echo(j job) (reply, error) {
	fd, err := rawSocket(unix.SOCK_STREAM)
	if err != nil {
		return reply{}, err
	}
	defer rawClose(fd)
	if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return reply{}, fmt.Errorf("setsockopt: %w", err)
	}
	if errno := rawConnect(fd, &addresses(j.Addr, 1)[0]); errno != 0 {
		return reply{}, fmt.Errorf("connect to %s: %w", j.Addr, errno)
	}
	buf := make([]byte, j.Size)
	total := make([]float64, 0, j.Count)
	start, busy := time.Now(), threadCPU()
	for i := range j.Warm + j.Count {
		before := time.Since(start)
		if err := echoOnce(fd, buf); err != nil {
			return reply{}, err
		}
		if after := time.Since(start); i >= j.Warm {
			total = append(total, float64(after-before))
		}
	}
	return reply{Total: total, CPU: threadCPU() - busy}, nil
}

// threadCPU is the CPU time of this thread, in nanoseconds.
func threadCPU() float64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts) != nil {
		return 0 // every kernel has it
	}
	return float64(ts.Nano())
}

// spin keeps the CPU busy.
func spin(d time.Duration) {
	for start := time.Now(); d > 0 && time.Since(start) < d; {
	}
}

// serve is the proxy stand-in: it asks for the original destination of every
// connection, as Envoy does, then echoes by itself, so that no second leg adds
// its noise.
func serve(listener int, j job) (reply, error) {
	var out reply
	var original unix.RawSockaddrInet4
	buf := make([]byte, j.Size)
	busy := threadCPU()
	for range j.Count {
		fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
		if errno != 0 {
			return out, sysErr("accept", errno)
		}
		out.ask(fd, &original)
		spin(j.Delay)
		if err := echoUntilEnd(fd, buf, j.Delay); err != nil {
			return out, err
		}
		rawClose(fd)
	}
	out.CPU = threadCPU() - busy
	out.note(&original)
	return out, nil
}

// ask asks for a connection's original destination, and counts answers.
func (r *reply) ask(fd uintptr, original *unix.RawSockaddrInet4) {
	var got unix.RawSockaddrInet4
	size := uint32(unsafe.Sizeof(got))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_IP, soOriginalDst,
		uintptr(unsafe.Pointer(&got)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		r.Refused = errno.Error()
		return
	}
	r.Answered++
	*original = got
}

// note keeps the last answer.
func (r *reply) note(original *unix.RawSockaddrInet4) {
	if r.Answered > 0 {
		port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&original.Port))[:])
		r.Original = netip.AddrPortFrom(netip.AddrFrom4(original.Addr), port)
	}
}

func echoUntilEnd(fd uintptr, buf []byte, delay time.Duration) error {
	for {
		more, err := rawRead(fd, buf)
		if err != nil || !more {
			return err
		}
		spin(delay)
		if err := rawWrite(fd, buf); err != nil {
			return err
		}
	}
}

func listen(at netip.AddrPort) (int, error) {
	family, name := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(at.Port())})
	if at.Addr().Is6() {
		family, name = unix.AF_INET6, &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
	} else {
		name.(*unix.SockaddrInet4).Addr = at.Addr().As4()
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil && at.Addr().Is6() {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(fd, name)
	}
	if err == nil {
		err = unix.Listen(fd, 1024)
	}
	if err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("listen on %s: %w", at, err)
	}
	return fd, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
