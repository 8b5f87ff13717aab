package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// Every backend has the same two namespaces with the same addresses.
var (
	podPrefix = netip.MustParsePrefix("192.0.2.2/24")
	farPrefix = netip.MustParsePrefix("192.0.2.1/24")

	podPrefix6 = netip.MustParsePrefix("2001:db8::2/64")
	farPrefix6 = netip.MustParsePrefix("2001:db8::1/64")
)

// site is a pod's namespace, a far one, and a veth pair between them.
type site struct {
	pod, far *netns.NetNS
}

func newSite(w world) (*site, error) {
	pod, err := newNetNS(w)
	if err != nil {
		return nil, err
	}
	far, err := newNetNS(w)
	if err != nil {
		return nil, errors.Join(err, pod.Close())
	}
	s := &site{pod: pod, far: far}
	if err := s.wire(w); err != nil {
		return nil, errors.Join(fmt.Errorf("wire two namespaces: %w", err), s.Close())
	}
	return s, nil
}

// Close is idempotent; the namespaces end with the last process in them.
func (s *site) Close() error { return errors.Join(s.pod.Close(), s.far.Close()) }

// newNetNS makes a namespace that only this process's descriptor keeps: nothing
// of it is left behind, however the process ends.
func newNetNS(w world) (*netns.NetNS, error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	settings := map[string]string{}
	if !w.ipv6 { // no neighbour discovery in the background
		settings["net/ipv6/conf/all/disable_ipv6"] = "1"
		settings["net/ipv6/conf/default/disable_ipv6"] = "1"
	}
	if !w.asIs { // ports come back after a second: no backend waits for TIME_WAIT
		settings["net/ipv4/tcp_tw_reuse"] = "1"
	}
	err = ns.Do(func() error {
		for name, value := range settings {
			if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("set %s: %w", name, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

func (s *site) wire(w world) error {
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
	if !w.ipv6 {
		return nil
	}
	if err := address(pod, podPrefix6); err != nil {
		return err
	}
	if err := address(far, farPrefix6); err != nil {
		return err
	}
	if err := pod.RouteAdd(&netlink.Route{Gw: net.IP(farPrefix6.Addr().AsSlice())}); err != nil {
		return fmt.Errorf("add the default route of IPv6: %w", err)
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
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}}
		if prefix.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := handle.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add %s: %w", prefix, err)
		}
	}
	return nil
}
