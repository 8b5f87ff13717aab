package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The loads of this file use many threads or descriptors, and calls that the Go
// scheduler knows of: what they measure are throughput and limits, in which its
// microsecond does not show.

// each runs n functions at once, on threads of their own.
func each(n int, do func(i int) reply) reply {
	replies := make([]reply, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			runtime.LockOSThread() // and never unlocked: it ends with the function
			replies[i] = do(i)
		})
	}
	all.Wait()
	var out reply
	for _, r := range replies {
		out.Bytes += r.Bytes
		out.Done += r.Done
		out.Failed += r.Failed
		out.Answered += r.Answered
		out.Accepted += r.Accepted
		if r.Failure != "" {
			out.Failure = r.Failure
		}
		if r.Refused != "" {
			out.Refused = r.Refused
		}
		if r.Answered > 0 {
			out.Original = r.Original
		}
	}
	return out
}

// processCPU is the CPU time of this process, in nanoseconds.
func processCPU() float64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts) != nil {
		return 0 // every kernel has it
	}
	return float64(ts.Nano())
}

// patience is how long dialTo waits for an answer: EINPROGRESS says that none came.
// Where NAT has no tuple left, SYNs vanish.
const patience = 5 * time.Second

// dialTo connects a new socket.
func dialTo(to netip.AddrPort) (int, error) {
	family, name := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
	if to.Addr().Is6() {
		family = unix.AF_INET6
	} else {
		name = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	limit := unix.NsecToTimeval(int64(patience))
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit)
	if err == nil {
		err = unix.Connect(fd, name)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

const chunk = 128 << 10

// sendFor writes until the time is over, then closes: the reader sees the end.
func sendFor(fd int, d time.Duration) error {
	defer unix.Close(fd)
	buf := make([]byte, chunk)
	for start := time.Now(); time.Since(start) < d; {
		if _, err := unix.Write(fd, buf); err != nil {
			return fmt.Errorf("write: %w", err)
		}
	}
	return nil
}

// readAll reads to the end and returns how much that was.
func readAll(fd int) (float64, error) {
	defer unix.Close(fd)
	buf := make([]byte, chunk)
	var bytes float64
	for {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return bytes, fmt.Errorf("read: %w", err)
		}
		if n == 0 {
			return bytes, nil
		}
		bytes += float64(n)
	}
}

// transfer is one end of a stream.
func transfer(fd int, j job, sends bool) (r reply) {
	var err error
	if sends {
		err = sendFor(fd, j.Time)
	} else {
		r.Bytes, err = readAll(fd)
	}
	if err != nil {
		r.Failed, r.Failure = 1, err.Error()
	}
	return r
}

// stream is the client's end of Clients streams. Total is how long all took.
func stream(j job) (reply, error) {
	var fds []int
	for i := range j.Clients {
		to := j.Addr
		for range i % max(j.Addrs, 1) {
			to = netip.AddrPortFrom(to.Addr().Next(), to.Port())
		}
		fd, err := dialTo(to)
		if err != nil {
			closeAll(fds)
			return reply{}, err
		}
		fds = append(fds, fd)
	}
	busy, start := processCPU(), time.Now()
	out := each(len(fds), func(i int) reply { return transfer(fds[i], j, !j.Down) })
	out.Total = []float64{float64(time.Since(start))}
	out.CPU = processCPU() - busy
	if out.Failed > 0 {
		return out, errors.New(out.Failure)
	}
	return out, nil
}

// serveStream is the server's end. Down is from its own point of view.
func serveStream(listener int, j job) (reply, error) {
	var asked reply
	var original unix.RawSockaddrInet4
	var fds []int
	for range j.Count {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err != nil {
			closeAll(fds)
			return asked, fmt.Errorf("accept: %w", err)
		}
		asked.ask(uintptr(fd), &original)
		fds = append(fds, fd)
	}
	busy := processCPU()
	out := each(len(fds), func(i int) reply { return transfer(fds[i], j, !j.Down) })
	out.CPU = processCPU() - busy
	out.Answered, out.Refused = asked.Answered, asked.Refused
	out.note(&original)
	if out.Failed > 0 {
		return out, errors.New(out.Failure)
	}
	return out, nil
}

// acceptors is how many threads of the stand-in accept short connections.
const acceptors = 4

// stop is the first byte of what tells an acceptor to end.
const stop = 'Q'

// connectionRate counts short connections. The clients may use every CPU.
func connectionRate(j job) (reply, error) {
	busy, start := processCPU(), time.Now()
	out := each(j.Clients, func(i int) (r reply) {
		everyCPU()
		buf := make([]byte, echoBytes)
		addrs := addresses(j.Addr, j.Addrs)
		for k := i; time.Since(start) < j.Time; k++ {
			if err := once(addrs[k%len(addrs)], buf); err != nil {
				r.Failed++
				r.Failure = err.Error()
				continue
			}
			r.Done++
		}
		return r
	})
	out.Total, out.CPU = []float64{float64(time.Since(start))}, processCPU()-busy
	last := make([]byte, echoBytes)
	last[0] = stop
	for ended, deadline := 0, time.Now().Add(10*time.Second); ended < acceptors; {
		if err := once(addresses(j.Addr, 1)[0], last); err == nil {
			ended++
		} else if time.Now().After(deadline) {
			return out, fmt.Errorf("the server cannot be told to stop: %w", err)
		}
	}
	return out, nil
}

// everyCPU lets this thread run anywhere.
func everyCPU() {
	var set unix.CPUSet
	for i := range runtime.NumCPU() {
		set.Set(i)
	}
	_ = unix.SchedSetaffinity(0, &set) // at worst it stays where it is
}

// once is a whole short connection.
func once(to unix.RawSockaddrInet4, buf []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: portOf(to), Addr: to.Addr}); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if _, err := unix.Write(fd, buf); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	for got := 0; got < len(buf); {
		n, err := unix.Read(fd, buf[got:])
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if n == 0 {
			return errors.New("read: the connection ended early")
		}
		got += n
	}
	return nil
}

// serveRate echoes once on each connection, until each acceptor has been stopped.
func serveRate(listener int, _ job) (reply, error) {
	busy := processCPU()
	out := each(acceptors, func(int) (r reply) {
		everyCPU()
		var original unix.RawSockaddrInet4
		buf := make([]byte, echoBytes)
		for {
			fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
			if err != nil {
				r.Failed, r.Failure = 1, fmt.Sprintf("accept: %v", err)
				return r
			}
			r.Accepted++
			r.ask(uintptr(fd), &original)
			stopped := echoShort(fd, buf)
			unix.Close(fd)
			if stopped {
				r.note(&original)
				return r
			}
		}
	})
	out.CPU = processCPU() - busy
	if out.Failed > 0 {
		return out, errors.New(out.Failure)
	}
	return out, nil
}

// echoShort echoes until the client closes, who may also reset. True: it said stop.
func echoShort(fd int, buf []byte) (stopped bool) {
	for {
		n, err := unix.Read(fd, buf)
		if err != nil || n == 0 {
			return stopped
		}
		stopped = stopped || buf[0] == stop
		if _, err := unix.Write(fd, buf[:n]); err != nil {
			return stopped
		}
	}
}
