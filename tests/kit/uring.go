package kit

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// io_uring's numbers, from linux/io_uring.h.
const (
	uringOffSQ   = 0
	uringOffCQ   = 0x8000000
	uringOffSQEs = 0x10000000

	uringOpAccept  = 13
	uringOpConnect = 16
)

// RingAsync makes a request run on a worker thread of the kernel's (IOSQE_ASYNC).
const RingAsync = 1 << 4

type ringOffsets struct {
	head, tail, mask, entries, flags, dropped, array, _ uint32
	_                                                   uint64
}

type cqOffsets struct {
	head, tail, mask, entries, overflow, cqes, flags, _ uint32
	_                                                   uint64
}

type ringParams struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, wq uint32
	_                                                                [3]uint32
	sq                                                               ringOffsets
	cq                                                               cqOffsets
}

type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	length, op    uint32
	userData      uint64
	_             [3]uint64
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

// Ring is an io_uring of one request at a time, made and used by one locked
// thread (that of NS.As), whose identity its requests have.
type Ring struct {
	fd           int
	sq, cq, sqes []byte
	p            ringParams
	name         []byte // a socket address that the kernel reads or writes
}

// NewRing opens one. Where the kernel refuses, the error says so.
func NewRing() (*Ring, error) {
	r := &Ring{name: make([]byte, 128)}
	fd, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&r.p)), 0)
	if e != 0 {
		off, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
		return nil, fmt.Errorf("io_uring_setup (kernel.io_uring_disabled is %q): %w", off, e)
	}
	r.fd = int(fd)
	var errs [3]error
	r.sq, errs[0] = r.mmap(uringOffSQ, int(r.p.sq.array+r.p.sqEntries*4))
	r.cq, errs[1] = r.mmap(uringOffCQ, int(r.p.cq.cqes)+int(r.p.cqEntries)*int(unsafe.Sizeof(cqe{})))
	r.sqes, errs[2] = r.mmap(uringOffSQEs, int(r.p.sqEntries)*int(unsafe.Sizeof(sqe{})))
	if err := errors.Join(errs[:]...); err != nil {
		r.Close()
		return nil, fmt.Errorf("map the io_uring: %w", err)
	}
	return r, nil
}

func (r *Ring) mmap(offset int64, size int) ([]byte, error) {
	return unix.Mmap(r.fd, offset, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// Close unmaps and closes.
func (r *Ring) Close() {
	for _, m := range [][]byte{r.sq, r.cq, r.sqes} {
		if m != nil {
			_ = unix.Munmap(m)
		}
	}
	unix.Close(r.fd)
}

// Connect is IORING_OP_CONNECT; flags are the request's.
func (r *Ring) Connect(s *Sock, to netip.AddrPort, flags uint8) error {
	n := putSockaddr(r.name, familyOf(s.FD), to)
	res, err := r.do(sqe{opcode: uringOpConnect, flags: flags, fd: int32(s.FD), off: uint64(n)})
	if err == nil && res < 0 {
		err = unix.Errno(-res)
	}
	return err
}

// Accept is IORING_OP_ACCEPT: the connection, and the address it wrote.
func (r *Ring) Accept(s *Sock) (*Sock, netip.AddrPort, error) {
	length := new(uint32)
	*length = uint32(len(r.name))
	res, err := r.do(sqe{opcode: uringOpAccept, fd: int32(s.FD), off: uint64(uintptr(unsafe.Pointer(length))), op: unix.SOCK_CLOEXEC})
	runtime.KeepAlive(length)
	if err == nil && res < 0 {
		err = unix.Errno(-res)
	}
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	c := &Sock{FD: int(res), t: s.t}
	s.t.Cleanup(c.Close)
	c.timeout(Patience)
	return c, getSockaddr(r.name), nil
}

// do submits one request and waits up to Patience for its result.
func (r *Ring) do(request sqe) (int32, error) {
	request.addr = uint64(uintptr(unsafe.Pointer(&r.name[0])))
	tail := r.word(r.sq, r.p.sq.tail)
	index := *tail & *r.word(r.sq, r.p.sq.mask)
	*(*sqe)(unsafe.Pointer(&r.sqes[uintptr(index)*unsafe.Sizeof(request)])) = request
	*r.word(r.sq, r.p.sq.array+index*4) = index
	atomic.AddUint32(tail, 1)
	for submitted := false; !submitted; {
		_, _, e := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 1, 0, 0, 0, 0)
		if e != 0 && e != unix.EINTR {
			return 0, fmt.Errorf("io_uring_enter: %w", e)
		}
		submitted = e == 0
	}
	head := r.word(r.cq, r.p.cq.head)
	deadline := time.Now().Add(Patience)
	for atomic.LoadUint32(r.word(r.cq, r.p.cq.tail)) == *head {
		left := int(time.Until(deadline).Milliseconds())
		if left <= 0 {
			return 0, unix.ETIMEDOUT
		}
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}}, left)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
	at := r.p.cq.cqes + (*head&*r.word(r.cq, r.p.cq.mask))*uint32(unsafe.Sizeof(cqe{}))
	res := (*cqe)(unsafe.Pointer(&r.cq[at])).res
	atomic.AddUint32(head, 1)
	return res, nil
}

func (r *Ring) word(ring []byte, at uint32) *uint32 {
	return (*uint32)(unsafe.Pointer(&ring[at]))
}
