// SPDX-License-Identifier: Apache-2.0

// Command init is process 1 of the virtual machine that tests/vm/run.sh
// boots. It mounts what a Linux system has mounted, loads the kernel modules
// the initramfs brings, runs one program, tells run.sh how that program ended
// and powers the machine off.
//
// run.sh leaves these files in the initramfs:
//
//	/sluice/modules   paths of kernel modules, one a line, in loading order
//	/sluice/args      the program and its arguments, each ended by a NUL
//	/sluice/env       environment of the program, one NAME=VALUE a line
//	/sluice/token     the word with which the line about the end begins
//
// The program's output goes to the second serial port, so that the kernel's
// messages, which go to the first, never land in the middle of a line.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	files = "/sluice"
	tty   = "/dev/ttyS1"

	// statusFailed is reported when the program could not be run at all.
	statusFailed = 125
)

func main() {
	out, err := openTTY()
	if err != nil {
		// Nobody can be told but whoever reads the kernel's log.
		fmt.Fprintf(os.Stderr, "init: %v\n", err)
		powerOff()
	}
	status, err := run(out)
	if err != nil {
		// The program may have left its last line open.
		fmt.Fprintf(out, "\ninit: %v\n", err)
	}
	token, err := os.ReadFile(filepath.Join(files, "token"))
	if err != nil {
		fmt.Fprintf(out, "init: %v\n", err)
	}
	fmt.Fprintf(out, "%s %d\n", strings.TrimSpace(string(token)), status)
	drain(out)
	powerOff()
}

func run(out *os.File) (int, error) {
	if err := mountAll(); err != nil {
		return statusFailed, err
	}
	if err := loadModules(); err != nil {
		return statusFailed, err
	}
	if err := loopbackUp(); err != nil {
		return statusFailed, err
	}
	return runProgram(out)
}

// openTTY opens the serial port for the program's output, which needs /dev.
func openTTY() (*os.File, error) {
	if err := mount("devtmpfs", "/dev", "mode=0755"); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(tty, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the port for the program's output: %w", err)
	}
	// Bytes are to arrive as they were written, without carriage returns.
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("read the settings of %s: %w", tty, err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("change the settings of %s: %w", tty, err)
	}
	return f, nil
}

func mountAll() error {
	for _, m := range []struct{ fstype, dir, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"cgroup2", "/sys/fs/cgroup", ""},
		{"bpf", "/sys/fs/bpf", "mode=0700"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/run", "mode=0755"},
		{"tmpfs", "/tmp", "mode=1777"},
	} {
		if err := mount(m.fstype, m.dir, m.options); err != nil {
			return err
		}
	}
	return os.MkdirAll("/run/netns", 0o755)
}

func mount(fstype, dir, options string) error {
	// In sysfs and devtmpfs the directories that can be made are there already.
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the mount point: %w", err)
	}
	err := unix.Mount(fstype, dir, fstype, 0, options)
	// A kernel with CONFIG_DEVTMPFS_MOUNT may have mounted /dev before us.
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s on %s: %w", fstype, dir, err)
	}
	return nil
}

func loadModules() error {
	list, err := os.ReadFile(filepath.Join(files, "modules"))
	if err != nil {
		return fmt.Errorf("read which modules to load: %w", err)
	}
	for path := range strings.FieldsSeq(string(list)) {
		if err := loadModule(path); err != nil {
			return fmt.Errorf("load kernel module %s: %w", path, err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// runProgram runs the program and returns its exit status as a shell has it.
func runProgram(out *os.File) (int, error) {
	data, err := os.ReadFile(filepath.Join(files, "args"))
	if err != nil {
		return statusFailed, fmt.Errorf("read what to run: %w", err)
	}
	args := strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")
	env, err := os.ReadFile(filepath.Join(files, "env"))
	if err != nil {
		return statusFailed, fmt.Errorf("read the environment of %s: %w", args[0], err)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = strings.Split(strings.TrimSpace(string(env)), "\n")
	cmd.Dir = "/tmp"
	cmd.Stdout, cmd.Stderr = out, out

	err = cmd.Run()
	if errors.Is(err, unix.ENOENT) {
		return statusFailed, fmt.Errorf("run the program: %w; it must be statically linked (CGO_ENABLED=0)", err)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		if err != nil {
			return statusFailed, fmt.Errorf("run the program: %w", err)
		}
		return 0, nil
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), fmt.Errorf("%s was ended by signal %s", args[0], ws.Signal())
	}
	return exit.ExitCode(), nil
}

// drain waits until the port has sent everything.
func drain(f *os.File) {
	// TCSBRK with an argument other than 0 is tcdrain(3).
	_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
}

func powerOff() {
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// Process 1 must not return; the kernel panics and qemu ends (panic=-1).
	fmt.Fprintf(os.Stderr, "init: power the machine off: %v\n", err)
	os.Exit(1)
}
