package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// The pods' network. The excluded ranges hold the gateway, which is the node
// itself, and none of the pods.
const (
	subnet4, firstPod4, gateway4, excluded4 = "10.42.0.0/24", "10.42.0.130", "10.42.0.1", "10.42.0.0/25"
	subnet6, firstPod6, gateway6, excluded6 = "fd42::/64", "fd42::1:82", "fd42::1", "fd42::/112"
)

// plugins are those that the chain needs.
var plugins = [...]string{"bridge", "host-local", "loopback"}

// pod is a network namespace that the CNI chain has wired.
type pod struct {
	name string
	ns   *netns.NetNS
	v4   netip.Addr
	v6   netip.Addr // zero without IPv6
}

func (p *pod) addr(v6 bool) netip.Addr {
	if v6 {
		return p.v6
	}
	return p.v4
}

// conflist is what an administrator would have put into /etc/cni/net.d. Version
// 0.4.0 is what the plugins of Ubuntu 22.04 know, too. Without ipMasq no plugin
// touches iptables.
func (n *node) conflist() ([]byte, error) {
	type object = map[string]any
	ranges := []any{[]any{object{"subnet": subnet4, "rangeStart": firstPod4, "gateway": gateway4}}}
	routes := []any{object{"dst": "0.0.0.0/0"}}
	if n.ipv6 {
		ranges = append(ranges, []any{object{"subnet": subnet6, "rangeStart": firstPod6, "gateway": gateway6}})
		routes = append(routes, object{"dst": "::/0"})
	}
	ipam := object{"type": "host-local", "dataDir": filepath.Join(n.cfg.Dir, "ipam"), "ranges": ranges, "routes": routes}
	return json.Marshal(object{
		"cniVersion": "0.4.0",
		"name":       "sluice-demo",
		"plugins": []any{
			object{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "ipam": ipam},
			object{"type": "loopback"},
		},
	})
}

// newPod does what a container runtime does: a namespace, kept by a bind mount,
// and CNI's ADD for it. All in the node's own namespaces, which the plugins
// inherit.
func (n *node) newPod(ctx context.Context, name string) (*pod, error) {
	path := filepath.Join(n.cfg.Dir, "netns-"+name)
	if err := makeNetns(path); err != nil {
		return nil, fmt.Errorf("make the network namespace of pod %s: %w", name, err)
	}
	p := &pod{name: name}
	var err error
	if p.ns, err = netns.Open(path); err != nil {
		return nil, err
	}
	n.later(func() { p.ns.Close() })
	conf, err := n.conflist()
	if err != nil {
		return nil, err
	}
	list, err := libcni.NetworkConfFromBytes(conf)
	if err != nil {
		return nil, fmt.Errorf("read the CNI configuration: %w", err)
	}
	var complaints bytes.Buffer
	cni := libcni.NewCNIConfigWithCacheDir([]string{n.cfg.Tools.CNI}, filepath.Join(n.cfg.Dir, "cni-cache"),
		&invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: &complaints}, PluginDecoder: version.PluginDecoder{}})
	rt := &libcni.RuntimeConf{ContainerID: "sluice-demo-" + name, NetNS: path, IfName: "eth0"}
	result, err := cni.AddNetworkList(ctx, list, rt)
	if err != nil {
		return nil, fmt.Errorf("CNI ADD for pod %s: %w %s", name, err, bytes.TrimSpace(complaints.Bytes()))
	}
	n.later(func() {
		// A context that was cancelled would leave it half undone.
		if err := cni.DelNetworkList(context.WithoutCancel(ctx), list, rt); err != nil {
			n.tell(message{Note: fmt.Sprintf("CNI DEL for pod %s: %v", name, err)})
		}
	})
	current, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, fmt.Errorf("read the CNI result of pod %s: %w", name, err)
	}
	for _, ip := range current.IPs {
		addr, _ := netip.AddrFromSlice(ip.Address.IP)
		if addr = addr.Unmap(); addr.Is4() {
			p.v4 = addr
		} else {
			p.v6 = addr
		}
	}
	if !p.v4.IsValid() || n.ipv6 && !p.v6.IsValid() {
		return nil, fmt.Errorf("the CNI plugins gave pod %s the addresses %v, not one of each family", name, current.IPs)
	}
	return p, nil
}

// makeNetns makes a network namespace that the mount at path keeps.
func makeNetns(path string) error {
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return err
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		result <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("keep it at %s: %w", path, err)
			}
			return readyForIPv6()
		}()
	}()
	return <-result
}

// readyForIPv6 makes IPv6 addresses usable at once on interfaces that come into
// this thread's network namespace. Duplicate address detection would take
// seconds and find nothing; a machine that has IPv6 switched off may hand that
// on to new namespaces.
func readyForIPv6() error {
	for _, knob := range [...]struct{ name, value string }{
		{"all/disable_ipv6", "0"}, {"default/disable_ipv6", "0"}, {"default/accept_dad", "0"},
	} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+knob.name, []byte(knob.value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // no IPv6 at all
			return err
		}
	}
	return nil
}

// haveIPv6 asks the kernel for an IPv6 socket.
func haveIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	return unix.Close(fd) == nil
}

func addAddress(ns *netns.NetNS, link string, prefix netip.Prefix) error {
	handle, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer handle.Close()
	l, err := handle.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find %s: %w", link, err)
	}
	ip := &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
	if err := handle.AddrReplace(l, &netlink.Addr{IPNet: ip}); err != nil {
		return fmt.Errorf("add %s to %s: %w", prefix, link, err)
	}
	return nil
}
