package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Socket is a TCP socket of some process in a namespace. Close its File.
type Socket struct {
	State uint8
	File  *os.File // a duplicate of the process's descriptor
	PID   int
	UID   uint32 // real UID and GID of the process, as this process sees them
	GID   uint32
}

// TCPSockets duplicates, from the processes that have them open, the namespace's
// TCP sockets (MPTCP's too) in the given states (TCP_LISTEN, TCP_SYN_SENT as in
// tcp_states.h). A socket that several processes share comes once. Processes
// that end meanwhile are skipped.
func (n *NetNS) TCPSockets(states ...uint8) ([]Socket, error) {
	pids, err := n.processes()
	if err != nil {
		return nil, err
	}
	seen := map[uint64]bool{}
	var out []Socket
	var errs error
	for _, pid := range pids {
		found, err := n.socketsOf(pid, states, seen)
		errs = errors.Join(errs, err)
		out = append(out, found...)
	}
	return out, errs
}

// HasTCP says whether the namespace has any TCP socket that listens or connects.
// If it cannot be told, it may.
func (n *NetNS) HasTCP() bool {
	some := true
	err := n.Do(func() error {
		v4, err4 := os.ReadFile("/proc/thread-self/net/sockstat")
		v6, err6 := os.ReadFile("/proc/thread-self/net/sockstat6")
		if err4 != nil || err6 != nil && !errors.Is(err6, os.ErrNotExist) {
			return nil
		}
		some = !strings.Contains(string(v4), "TCP: inuse 0 ") || err6 == nil && !strings.Contains(string(v6), "TCP6: inuse 0\n")
		return nil
	})
	return err != nil || some
}

// processes lists those with at least one thread in the namespace, found by the
// main thread; a socket of this namespace held elsewhere (ztunnel's) is found
// by its cookie only where its process is also known, and is not looked for.
func (n *NetNS) processes() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(filepath.Join("/proc", e.Name(), "ns/net"), &st) == nil && st.Ino == n.inode {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func (n *NetNS) socketsOf(pid int, states []uint8, seen map[uint64]bool) ([]Socket, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("list the sockets of process %d (needs CAP_SYS_PTRACE, and CAP_DAC_READ_SEARCH where it is another user's): %w", pid, err)
	}
	if err != nil {
		return nil, nil // it ended
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, nil
	}
	defer unix.Close(pidfd)
	uid, gid, err := realIDs(pid)
	if err != nil {
		return nil, nil
	}
	var out []Socket
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !strings.HasPrefix(target, "socket:[") {
			continue
		}
		inode, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(target, "socket:["), "]"), 10, 64)
		if err != nil || seen[inode] {
			continue
		}
		number, _ := strconv.Atoi(e.Name())
		fd, err := unix.PidfdGetfd(pidfd, number, 0)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
			return out, fmt.Errorf("read the sockets of process %d (needs CAP_SYS_PTRACE and Linux 5.6): %w", pid, err)
		}
		if err != nil {
			continue
		}
		state, ok := n.tcpState(fd)
		if !ok || !slices.Contains(states, state) {
			unix.Close(fd)
			continue
		}
		seen[inode] = true
		out = append(out, Socket{State: state, File: os.NewFile(uintptr(fd), target), PID: pid, UID: uid, GID: gid})
	}
	return out, nil
}

// tcpState is the state of a TCP or MPTCP socket of this namespace.
func (n *NetNS) tcpState(fd int) (state uint8, ok bool) {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil || protocol != unix.IPPROTO_TCP && protocol != unix.IPPROTO_MPTCP {
		return 0, false
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil || cookie != n.cookie {
		return 0, false
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, false
	}
	return info.State, true
}

func realIDs(pid int) (uid, gid uint32, err error) {
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		id, err := strconv.ParseUint(fields[1], 10, 32)
		switch {
		case fields[0] == "Uid:" && err == nil:
			uid = uint32(id)
		case fields[0] == "Gid:" && err == nil:
			gid = uint32(id)
			return uid, gid, nil
		}
	}
	return 0, 0, fmt.Errorf("no Uid and Gid in /proc/%d/status", pid)
}

// ByCookie finds a path to every namespace that a process or "ip netns" keeps.
func ByCookie() map[uint64]string {
	candidates, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	named, _ := filepath.Glob("/var/run/netns/*")
	seen := map[uint64]bool{}
	out := map[uint64]string{}
	for _, path := range append(candidates, named...) {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || seen[st.Ino] {
			continue
		}
		seen[st.Ino] = true
		if ns, err := Open(path); err == nil {
			out[ns.Cookie()] = path
			ns.Close()
		}
	}
	return out
}
