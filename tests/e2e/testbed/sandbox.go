// Package testbed is a real Kubernetes cluster of one node, for tests: API server,
// etcd, controllers, scheduler, kubelet, kube-proxy, containerd, runc and the bridge
// CNI plugin, in namespaces of its own (process, mount, network, IPC). It writes to a
// temporary directory and to cgroups that it makes, and to nothing else of the
// machine: what the kubelet would set for the whole machine it sets in files that
// lie over it. When its first process ends, the kernel ends all the others.
package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The environment that tells a process which of the three it is (see Run) and
// where the data is.
const (
	roleEnv = "SLUICE_E2E_ROLE"
	dirEnv  = "SLUICE_E2E_DIR"

	roleFirst  = "first"  // the first process of the namespaces
	roleInside = "inside" // what they were made for
)

// Inside says whether this process runs where a cluster can be brought up.
func Inside() bool { return os.Getenv(roleEnv) == roleInside }

// Run runs this program again, with the same arguments, in namespaces of its own,
// and returns its exit status. There Inside is true. Afterwards, also when
// interrupted, it removes what is left and returns an error that names whatever of
// the machine is not as it was.
func Run(ctx context.Context) (status int, err error) {
	if os.Getenv(roleEnv) == roleFirst {
		return first()
	}
	if os.Geteuid() != 0 {
		return 1, errors.New("a cluster needs namespaces, mounts and cgroups: run this as root")
	}
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	before, err := look()
	if err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "sluice-e2e-")
	if err != nil {
		return 1, err
	}
	if hidden := hides(dir); hidden != "" {
		return 1, errors.Join(fmt.Errorf("the temporary directory %s is below %s, which the cluster replaces: set TMPDIR to another one", dir, hidden), os.Remove(dir))
	}
	groups, err := makeCgroups(filepath.Base(dir))
	if err == nil {
		status, err = runFirst(ctx, dir)
	}
	err = errors.Join(err, groups.remove(), removeAll(dir))
	if after, lookErr := look(); lookErr != nil {
		err = errors.Join(err, lookErr)
	} else {
		err = errors.Join(err, before.compare(after, dir))
	}
	if ctx.Err() != nil {
		err = errors.Join(errors.New("interrupted"), err)
	}
	if err != nil && status == 0 {
		status = 1
	}
	return status, err
}

// runFirst starts the first process and waits for its end; with the context, or
// with this process, it is killed, and all the others with it.
func runFirst(ctx context.Context, dir string) (status int, err error) {
	runtime.LockOSThread() // Pdeathsig is about this thread
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), roleEnv+"="+roleFirst, dirEnv+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC,
		Setpgid:    true, // an interrupt from the terminal is ours to hear
		Pdeathsig:  unix.SIGKILL,
	}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// first is the first process: it prepares the namespaces, starts the program in
// them, and reaps orphans, as such a process must.
func first() (status int, err error) {
	dir := os.Getenv(dirEnv)
	if err := errors.Join(enterCgroups(filepath.Base(dir)), prepare(dir)); err != nil {
		return 1, fmt.Errorf("prepare the cluster's namespaces: %w", err)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(withoutRole(os.Environ()), roleEnv+"="+roleInside)
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait for the cluster's processes: %w", err)
		case pid == cmd.Process.Pid && ws.Exited():
			return ws.ExitStatus(), nil
		case pid == cmd.Process.Pid && ws.Signaled():
			return 1, fmt.Errorf("the tests were ended by a signal: %v", ws.Signal())
		}
	}
}

func withoutRole(env []string) (out []string) {
	for _, e := range env {
		if !strings.HasPrefix(e, roleEnv+"=") {
			out = append(out, e)
		}
	}
	return out
}
