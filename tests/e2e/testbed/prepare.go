package testbed

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// overlaid are directories of the machine that the cluster sees, and writes beside.
var overlaid = []string{"/etc", "/opt", "/var"}

// hides names the directory of the machine that would hide dir.
func hides(dir string) string {
	for _, over := range append([]string{"/run"}, overlaid...) {
		if strings.HasPrefix(dir, over+"/") {
			return over
		}
	}
	return ""
}

// ownSysctls are the settings of the whole machine that a kubelet writes. In the
// cluster files lie over them, so it writes those.
var ownSysctls = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// prepare makes the new namespaces a machine: mounts and a network. No pod outlives
// them, so nothing of it is ever undone.
func prepare(dir string) error {
	if err := prepareMounts(dir); err != nil {
		return err
	}
	return prepareNetwork()
}

func prepareMounts(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("part from the machine's mounts: %w", err)
	}
	if err := mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	for i, over := range overlaid {
		upper, work := filepath.Join(dir, fmt.Sprint("upper", i)), filepath.Join(dir, fmt.Sprint("work", i))
		if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
			return err
		}
		if err := mount("overlay", over, "overlay", 0, "lowerdir="+over+",upperdir="+upper+",workdir="+work); err != nil {
			return err
		}
	}
	// Not on an overlay: containerd makes overlays itself, the kubelet looks for a disk.
	for _, of := range []string{"/var/lib/containerd", "/var/lib/kubelet", "/var/lib/etcd"} {
		own := filepath.Join(dir, filepath.Base(of))
		if err := errors.Join(os.Mkdir(own, 0o755), os.MkdirAll(of, 0o755)); err != nil {
			return err
		}
		if err := mount(own, of, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	if err := mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700"); err != nil {
		return err
	}
	if err := coverSysctls(dir); err != nil {
		return err
	}
	// Pods' mounts follow the node's, as on any node.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the cluster's mounts with its pods: %w", err)
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s (%s) on %s: %w", source, kind, target, err)
	}
	return nil
}

func coverSysctls(dir string) error {
	for _, name := range ownSysctls {
		of := "/proc/sys/" + name
		text, err := os.ReadFile(of)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		own := filepath.Join(dir, strings.ReplaceAll(name, "/", "."))
		if err := errors.Join(err, os.WriteFile(own, text, 0o644)); err != nil {
			return err
		}
		if err := mount(own, of, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// The node's addresses. No packet leaves the namespace: the routes are there so that
// services' addresses, which kube-proxy translates on the way out, have a way out.
const (
	nodeIP4, gateway4 = "10.245.0.1", "10.245.0.2"
	nodeIP6, gateway6 = "fd45::1", "fd45::2"
)

func prepareNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	wire := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "nowhere"}
	if err := netlink.LinkAdd(wire); err != nil {
		return fmt.Errorf("make the node's interface: %w", err)
	}
	peer, err := netlink.LinkByName("nowhere")
	if err != nil {
		return err
	}
	for _, link := range []netlink.Link{lo, wire, peer} {
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	for _, of := range [][2]string{{nodeIP4 + "/24", gateway4}, {nodeIP6 + "/64", gateway6}} {
		address, err := netlink.ParseAddr(of[0])
		if err != nil {
			return err
		}
		address.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(wire, address); err != nil {
			return fmt.Errorf("give the node its address %s: %w", of[0], err)
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: wire.Attrs().Index, Gw: net.ParseIP(of[1])}); err != nil {
			return fmt.Errorf("give the node a route by %s: %w", of[1], err)
		}
	}
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/"+name, []byte("1"), 0o644); err != nil {
			return err
		}
	}
	return nil
}
