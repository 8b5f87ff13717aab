package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// Every backend has the same two namespaces with the same addresses.
var (
	podPrefix = netip.MustParsePrefix("192.0.2.2/24")
	farPrefix = netip.MustParsePrefix("192.0.2.1/24")
)

// site is a pod's namespace, a far one, and a veth pair between them.
type site struct {
	pod, far *netns.NetNS
}

func newSite() (*site, error) {
	pod, err := newNetNS()
	if err != nil {
		return nil, err
	}
	far, err := newNetNS()
	if err != nil {
		return nil, errors.Join(err, pod.Close())
	}
	s := &site{pod: pod, far: far}
	if err := s.wire(); err != nil {
		return nil, errors.Join(fmt.Errorf("wire two namespaces: %w", err), s.Close())
	}
	return s, nil
}

// Close is idempotent; the namespaces end with the last process in them.
func (s *site) Close() error { return errors.Join(s.pod.Close(), s.far.Close()) }

// newNetNS makes a namespace that only this process's descriptor keeps: nothing
// of it is left behind, however the process ends.
func newNetNS() (*netns.NetNS, error) {
	type result struct {
		ns  *netns.NetNS
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends in its namespace
		ns, err := unshareNet()
		made <- result{ns, err}
	}()
	r := <-made
	return r.ns, r.err
}

func unshareNet() (*netns.NetNS, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open a network namespace: %w", err)
	}
	defer here.Close()
	// No neighbour discovery in the background, and ports come back after a
	// second: no backend waits for TIME_WAIT.
	for path, value := range map[string]string{
		"/proc/sys/net/ipv6/conf/all/disable_ipv6":     "1",
		"/proc/sys/net/ipv6/conf/default/disable_ipv6": "1",
		"/proc/sys/net/ipv4/tcp_tw_reuse":              "1",
	} {
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("set %s: %w", path, err)
		}
	}
	return netns.Open(fmt.Sprintf("/proc/self/fd/%d", here.Fd()))
}

func (s *site) wire() error {
	pod, err := s.pod.Netlink()
	if err != nil {
		return err
	}
	defer pod.Close()
	far, err := s.far.Netlink()
	if err != nil {
		return err
	}
	defer far.Close()
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: "eth0"},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsFd(s.far.Fd()),
	}
	if err := pod.LinkAdd(veth); err != nil {
		return fmt.Errorf("add a veth pair: %w", err)
	}
	if err := address(pod, podPrefix); err != nil {
		return err
	}
	if err := address(far, farPrefix); err != nil {
		return err
	}
	err = pod.RouteAdd(&netlink.Route{Gw: net.IP(farPrefix.Addr().AsSlice())})
	if err != nil {
		return fmt.Errorf("add the default route: %w", err)
	}
	return nil
}

// address brings up lo and eth0 and gives eth0 an address.
func address(handle *netlink.Handle, prefix netip.Prefix) error {
	for _, name := range []string{"lo", "eth0"} {
		link, err := handle.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := handle.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up %s: %w", name, err)
		}
		if name == "lo" {
			continue
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), 32)}}
		if err := handle.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %s: %w", prefix, err)
		}
	}
	return nil
}
