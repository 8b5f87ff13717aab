package kit

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// holdEnv makes the test binary a process that only holds what it is given.
const holdEnv = "SLUICE_TEST_HOLD"

// HoldAndExit ends this process, if it was started by Hold, with its standard
// input; a proxy that StartTProxy started, it runs. Main calls it; call it first
// in a TestMain that does more.
func HoldAndExit() {
	proxyAndExit()
	if os.Getenv(insideEnv) != "" {
		serveInside()
	}
	if os.Getenv(holdEnv) == "" {
		return
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// Hold starts a process that lives in the namespace, as somebody, and has the
// sockets open as well: the tests' own process lives elsewhere, and enrolment
// looks for sockets in the processes of the namespace. The process ends with
// the returned function, or with the test.
func (n *NS) Hold(id ID, sockets ...*Sock) (release func()) {
	n.t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), holdEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(id.UID), Gid: uint32(id.GID)}}
	for _, s := range sockets {
		fd, err := syscall.Dup(s.FD)
		if err != nil {
			n.t.Fatal("duplicate a socket:", err)
		}
		file := os.NewFile(uintptr(fd), "socket")
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = n.Do(cmd.Start) // a child is in the namespace of the thread that makes it
	}
	if err != nil {
		n.t.Fatal("start a process in the namespace:", err)
	}
	ended := false
	release = func() {
		if !ended {
			ended = true
			stdin.Close()
			_ = cmd.Wait()
		}
	}
	n.t.Cleanup(release)
	return release
}

// Bare runs fn in the namespace as somebody without any capability. Its thread
// cannot come back and ends.
func (n *NS) Bare(id ID, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good
		result <- n.bare(id, fn)
	}()
	return <-result
}

func (n *NS) bare(id ID, fn func() error) error {
	if err := unix.Setns(n.Fd(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the namespace: %w", err)
	}
	// The raw calls are per thread.
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return fmt.Errorf("leave all groups: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(id.GID), uintptr(id.GID), uintptr(id.GID)); e != 0 {
		return fmt.Errorf("become GID %d: %w", id.GID, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(id.UID), uintptr(id.UID), uintptr(id.UID)); e != 0 {
		return fmt.Errorf("become UID %d: %w", id.UID, e)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return fn()
}
