package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// inherited stands for a listener that another process opened.
var inherited = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)

// Identity is who and where a worker is.
type Identity struct {
	UID, GID int
	CPU      int  // the CPU that its load thread keeps to
	Inherits bool // descriptor 3 is a listener, to be served at the address "inherited"
}

// Worker runs jobs from in until it ends. It is the body of the hidden command
// "sluicectl bench worker".
func Worker(id Identity, in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	debug.SetGCPercent(-1) // a job allocates little, and a collection would wait for its raw calls
	if err := becomeQuiet(id); err != nil {
		return err
	}
	listeners := map[netip.AddrPort]int{}
	if id.Inherits {
		listeners[inherited] = 3
	}
	jobs, replies := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var j job
		if err := jobs.Decode(&j); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read a job: %w", err)
		}
		r, err := do(j, listeners)
		if err != nil {
			r.Error = fmt.Sprintf("%s: %v", j.Kind, err)
		}
		if err := replies.Encode(r); err != nil {
			return fmt.Errorf("write a reply: %w", err)
		}
	}
}

func do(j job, listeners map[netip.AddrPort]int) (reply, error) {
	switch j.Kind {
	case jobListen:
		fd, err := listen(j.Addr)
		listeners[j.Addr] = fd
		return reply{}, err
	case jobListenUDP:
		fd, err := listenUDP(j.Addr)
		listeners[j.Addr] = fd
		return reply{}, err
	case jobServe:
		return onListener(listeners, j, serve)
	case jobDial:
		return dial(j)
	case jobEcho:
		return echo(j)
	case jobCalls:
		return calls(j)
	case jobStream:
		return stream(j)
	case jobServeStream:
		return onListener(listeners, j, serveStream)
	case jobRate:
		return connectionRate(j)
	case jobServeRate:
		return onListener(listeners, j, serveRate)
	case jobNumber:
		return onListener(listeners, j, func(fd int, _ job) (reply, error) { return reply{Done: fd}, nil })
	case jobGet:
		return get(j), nil
	case jobHold:
		return hold(j)
	case jobServeHold:
		return onListener(listeners, j, serveHold)
	case jobQuery:
		return query(j)
	case jobServeQuery:
		return onListener(listeners, j, serveQuery)
	default:
		return reply{}, errors.New("no such job")
	}
}

func onListener(listeners map[netip.AddrPort]int, j job, serve func(int, job) (reply, error)) (reply, error) {
	fd, ok := listeners[j.Addr]
	if !ok {
		return reply{}, fmt.Errorf("nothing listens on %s", j.Addr)
	}
	return serve(fd, j)
}

// becomeQuiet pins this thread and sees that nothing but its blocking calls
// takes it off its CPU: the scheduler does not let one SCHED_BATCH thread
// preempt another when it wakes.
func becomeQuiet(id Identity) error {
	var set unix.CPUSet
	set.Set(id.CPU)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to CPU %d: %w", id.CPU, err)
	}
	const schedBatch = 3
	var priority int32
	if _, _, errno := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, 0, schedBatch, uintptr(unsafe.Pointer(&priority))); errno != 0 {
		return fmt.Errorf("choose the batch scheduler: %w", errno)
	}
	if err := raiseFiles(); err != nil {
		return err
	}
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, -20); err != nil {
		return fmt.Errorf("raise the priority: %w", err)
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("drop groups: %w", err)
	}
	if err := syscall.Setresgid(id.GID, id.GID, id.GID); err != nil {
		return fmt.Errorf("become group %d: %w", id.GID, err)
	}
	if err := syscall.Setresuid(id.UID, id.UID, id.UID); err != nil {
		return fmt.Errorf("become user %d: %w", id.UID, err)
	}
	return nil
}

// raiseFiles allows this process as many descriptors as its hard limit says.
func raiseFiles() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raise the limit of open files to %d: %w", limit.Max, err)
	}
	return nil
}
