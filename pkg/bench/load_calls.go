package bench

import (
	"fmt"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// calls measures one system call in batches. Its sockets are made here and now,
// in this process's cgroup.
func calls(j job) (reply, error) {
	const batch = 200
	once, done, err := caller(j)
	if err != nil {
		return reply{}, err
	}
	defer done()
	total := make([]float64, 0, j.Count)
	start := time.Now()
	for i := range j.Warm + j.Count {
		before := time.Since(start)
		for range batch {
			if errno := once(); errno != 0 {
				return reply{}, sysErr(string(j.Call), errno)
			}
		}
		if after := time.Since(start); i >= j.Warm {
			total = append(total, float64(after-before)/batch)
		}
	}
	return reply{Total: total}, nil
}

// caller returns a function that makes the call once.
func caller(j job) (once func() unix.Errno, done func(), err error) {
	target := sockaddr(j.Addr)
	switch j.Call {
	case callConnectTCP, callConnectUDP:
		kind := uintptr(unix.SOCK_STREAM)
		if j.Call == callConnectUDP {
			kind, target = unix.SOCK_DGRAM, sockaddr(netip.MustParseAddrPort("127.0.0.1:9"))
		}
		fd, err := rawSocket(kind)
		return func() unix.Errno {
			errno := rawConnect(fd, &target)
			if errno == unix.ENETUNREACH && j.Call == callConnectTCP {
				return 0
			}
			return errno
		}, func() { rawClose(fd) }, err
	}
	pair, err := newPair()
	if err != nil {
		return nil, nil, err
	}
	fd := uintptr(pair[1])
	buf, size := new([unix.SizeofSockaddrAny]byte), new(uint32)
	return func() (errno unix.Errno) {
		*size = uint32(len(buf))
		switch j.Call {
		case callGetsockopt:
			*size = 4
			_, _, errno = unix.RawSyscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_ERROR,
				uintptr(unsafe.Pointer(buf)), uintptr(unsafe.Pointer(size)), 0)
		case callGetsockname:
			_, _, errno = unix.RawSyscall(unix.SYS_GETSOCKNAME, fd, uintptr(unsafe.Pointer(buf)), uintptr(unsafe.Pointer(size)))
		case callGetpeername:
			_, _, errno = unix.RawSyscall(unix.SYS_GETPEERNAME, fd, uintptr(unsafe.Pointer(buf)), uintptr(unsafe.Pointer(size)))
		default:
			errno = unix.ENOSYS
		}
		runtime.KeepAlive(buf)
		return errno
	}, func() { closeAll(pair[:]) }, nil
}

// newPair is a listener on loopback and a connection to it.
func newPair() (fds [2]int, err error) {
	listener, err := listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		return fds, err
	}
	sa, err := unix.Getsockname(listener)
	if err != nil {
		unix.Close(listener)
		return fds, fmt.Errorf("getsockname: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(fd, sa)
	}
	if err != nil {
		closeAll([]int{listener, fd})
		return fds, fmt.Errorf("connect to oneself: %w", err)
	}
	return [2]int{listener, fd}, nil
}
