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

// Identity is who and where a worker is.
type Identity struct {
	UID, GID int
	CPU      int // the CPU that its load thread keeps to
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
	case jobServe:
		fd, ok := listeners[j.Addr]
		if !ok {
			return reply{}, fmt.Errorf("nothing listens on %s", j.Addr)
		}
		return serve(fd, j)
	case jobDial:
		return dial(j)
	case jobEcho:
		return echo(j)
	case jobCalls:
		return calls(j)
	default:
		return reply{}, errors.New("no such job")
	}
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
