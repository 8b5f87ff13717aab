package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func portOf(sa unix.RawSockaddrInet4) int {
	return int(binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:]))
}

// hold opens connections to successive addresses and keeps them for as long as
// the process lives. The first that fails ends it, which is no error. So does a
// hundred that together take longer than patience: NAT with few tuples left
// searches ever longer for one.
func hold(j job) (reply, error) {
	const hundred = 100
	var out reply
	to, since := j.Addr.Addr(), time.Now()
	for range j.Count {
		_, err := dialTo(netip.AddrPortFrom(to, j.Addr.Port())) // and never closed
		if errors.Is(err, unix.EINPROGRESS) {
			err = fmt.Errorf("connect: no answer within %s", patience)
		}
		if err != nil {
			out.Failed, out.Failure = 1, err.Error()
			return out, nil
		}
		if out.Done++; out.Done%hundred == 0 {
			if took := time.Since(since); took > patience {
				out.Failed, out.Failure = 1, fmt.Sprintf("%d connections took %s", hundred, took.Round(time.Second/10))
				return out, nil
			}
			since = time.Now()
		}
		if !j.Same {
			to = to.Next()
		}
	}
	return out, nil
}

// idle is how long serveHold waits for another connection before it looks whether
// the next job is there, which says that no more will come.
const idle = 500 * time.Millisecond

// serveHold accepts and keeps. Every connection must say where it was going:
// Answered counts those that did, of Accepted.
func serveHold(listener int, j job) (reply, error) {
	var out reply
	var original unix.RawSockaddrInet4
	waited := unix.NsecToTimeval(int64(idle))
	if err := unix.SetsockoptTimeval(listener, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &waited); err != nil {
		return out, fmt.Errorf("setsockopt: %w", err)
	}
	for out.Accepted < j.Count {
		fd, from, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EAGAIN) {
			if !nextJob() {
				continue
			}
			break
		}
		if err != nil {
			return out, fmt.Errorf("accept: %w", err)
		}
		out.Accepted++
		if _, six := from.(*unix.SockaddrInet6); six {
			out.ask6(fd)
		} else {
			out.ask(uintptr(fd), &original)
		}
	}
	out.note(&original)
	return out, nil
}

// nextJob says whether this worker has another job, or has lost its parent.
func nextJob() bool {
	in := []unix.PollFd{{Fd: 0, Events: unix.POLLIN}}
	n, err := unix.Poll(in, 0)
	return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
}

// ask6 is ask for IPv6.
func (r *reply) ask6(fd int) {
	var got unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(got))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IPV6, soOriginalDst,
		uintptr(unsafe.Pointer(&got)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		r.Refused = errno.Error()
		return
	}
	r.Answered++
}

// query sends datagrams from one connected socket, as glibc's and Go's resolvers
// do, and waits for each answer.
func query(j job) (reply, error) {
	fd, err := rawSocket(unix.SOCK_DGRAM)
	if err != nil {
		return reply{}, err
	}
	defer rawClose(fd)
	limit := unix.NsecToTimeval(int64(5 * time.Second))
	if err := unix.SetsockoptTimeval(int(fd), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return reply{}, fmt.Errorf("setsockopt: %w", err)
	}
	if errno := rawConnect(fd, &addresses(j.Addr, 1)[0]); errno != 0 {
		return reply{}, fmt.Errorf("connect to %s: %w", j.Addr, errno)
	}
	buf := make([]byte, j.Size)
	times := make([]float64, 0, j.Count)
	start, busy := time.Now(), threadCPU()
	for i := range j.Warm + j.Count {
		binary.BigEndian.PutUint32(buf, uint32(i))
		before := time.Since(start)
		if err := rawWrite(fd, buf); err != nil {
			return reply{}, err
		}
		whole, err := rawRead(fd, buf)
		if err != nil {
			return reply{}, fmt.Errorf("query %d to %s was not answered: %w", i, j.Addr, err)
		}
		if !whole || binary.BigEndian.Uint32(buf) != uint32(i) {
			return reply{}, fmt.Errorf("query %d to %s was answered with another's answer", i, j.Addr)
		}
		if after := time.Since(start); i >= j.Warm {
			times = append(times, float64(after-before))
		}
	}
	return reply{Total: times, CPU: threadCPU() - busy, Done: j.Warm + j.Count}, nil
}

// listenUDP is where the DNS proxy's stand-in will answer.
func listenUDP(at netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	limit := unix.NsecToTimeval(int64(5 * time.Second))
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
	}
	if err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("listen on %s: %w", at, err)
	}
	return fd, nil
}

// serveQuery is the DNS proxy's stand-in: it answers Count datagrams with
// themselves. Those that do not come within seconds are not waited for.
func serveQuery(fd int, j job) (reply, error) {
	var out reply
	buf := make([]byte, j.Size)
	busy := threadCPU()
	for range j.Count {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return out, fmt.Errorf("wait for query %d: %w", out.Accepted, err)
		}
		out.Accepted++
		if err := unix.Sendto(fd, buf[:n], 0, from); err != nil {
			return out, fmt.Errorf("answer: %w", err)
		}
	}
	out.CPU = threadCPU() - busy
	return out, nil
}
