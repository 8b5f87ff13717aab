package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Reboot does to the node's pods what a power cut and a boot do: all processes,
// namespaces, mounts, pins and everything in /run are gone and no DEL has run; what
// is on disk is there. The control plane, which on most clusters is elsewhere, goes
// on. It returns when the node is ready again.
func (c *Cluster) Reboot(ctx context.Context) error {
	c.Stop(Kubelet)
	c.Stop(Containerd)
	c.Stop(KubeProxy)
	if err := errors.Join(killPods(), c.removePodCgroups()); err != nil {
		return err
	}
	if err := unmountBelow("/run/containerd", "/run/netns", "/var/lib/kubelet/pods"); err != nil {
		return err
	}
	for _, dir := range []string{"/run/containerd", "/run/netns", "/run/sluice"} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if err := errors.Join(os.MkdirAll("/run/netns", 0o755), unix.Unmount("/sys/fs/bpf", unix.MNT_DETACH), mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700")); err != nil {
		return err
	}
	if bridge, err := netlink.LinkByName("cni0"); err == nil {
		if err := netlink.LinkDel(bridge); err != nil {
			return err
		}
	}
	if err := errors.Join(c.Start(Containerd), c.Start(Kubelet), c.Start(KubeProxy)); err != nil {
		return err
	}
	return c.AwaitNode(ctx)
}

// killPods ends every process of a pod, and the runtime's shims.
func killPods() error {
	for {
		all, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		left := 0
		for _, dir := range all {
			exe, _ := os.Readlink(filepath.Join(dir, "exe"))
			cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
			if exe == "" || !strings.Contains(string(cgroup), "/kubepods") && !strings.HasPrefix(filepath.Base(exe), "containerd-shim") {
				continue // a dead process has no program
			}
			left++
			pid, err := strconv.Atoi(filepath.Base(dir))
			if err != nil {
				return err
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("end %s: %w", exe, err)
			}
		}
		if left == 0 {
			return nil
		}
	}
}

// removePodCgroups: for each that is there the kubelet would wait for its container.
func (c *Cluster) removePodCgroups() error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	var pods cgroups
	for _, root := range roots {
		dir := filepath.Join(root, filepath.Base(c.dir), "kubepods")
		if _, err := os.Stat(dir); err == nil {
			pods = append(pods, dir)
		}
	}
	return pods.remove()
}

func unmountBelow(dirs ...string) error {
	for _, dir := range dirs {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil {
			return err
		}
		slices.Reverse(mounts)
		for _, m := range mounts {
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
			}
		}
	}
	return nil
}
