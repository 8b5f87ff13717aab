package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Link is a network interface of a namespace.
type Link struct {
	Index    int
	Name     string
	Lo       bool
	Up       bool
	Ethernet bool   // its packets begin with an Ethernet header, not with IP
	Parent   int    // the interface of this namespace that it stands upon; 0: none
	Master   int    // the bridge, bond or VRF that it is part of; 0: none
	Bridge   string // the bridge that it is a port of
}

// Network is what a namespace looks like at one moment.
type Network struct {
	Links     []Link
	Addresses []netip.Addr // all but multicast, link-local included, without zone
	// Broadcasts are the broadcast addresses of the IPv4 subnets: the kernel
	// connects no TCP socket to them.
	Broadcasts []netip.Addr
	// Primary4 and Primary6 are the first global address of a family, or one on
	// lo or (IPv4) a link-local one if there is no other; zero if none.
	Primary4, Primary6 netip.Addr
	Global             []netip.Addr // those that may be the primary ones
	// Routes are those of the main table.
	Routes []Route
	// Local are the prefixes of the local table, single addresses among them:
	// what is sent there stays in the namespace. Loopback is left out.
	Local []netip.Prefix
}

// Inspect reads interfaces, addresses and routes.
func (n *NetNS) Inspect() (Network, error) {
	handle, err := n.Handle()
	if err != nil {
		return Network{}, err
	}
	var out Network
	links, err := dump(handle.LinkList)
	if err != nil {
		return Network{}, fmt.Errorf("list the interfaces of %s: %w", n.path, err)
	}
	names, bridges := map[int]Link{}, map[int]string{}
	for _, l := range links {
		if l.Type() == "bridge" {
			bridges[l.Attrs().Index] = l.Attrs().Name
		}
	}
	for _, l := range links {
		a := l.Attrs()
		link := Link{Index: a.Index, Name: a.Name, Lo: a.RawFlags&unix.IFF_LOOPBACK != 0, Up: a.RawFlags&unix.IFF_UP != 0, Ethernet: a.EncapType == "ether", Master: a.MasterIndex, Bridge: bridges[a.MasterIndex]}
		if a.NetNsID < 0 { // otherwise the index is one of another namespace
			link.Parent = a.ParentIndex
		}
		names[a.Index] = link
		out.Links = append(out.Links, link)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return Network{}, fmt.Errorf("list the addresses of %s: %w", n.path, err)
	}
	var other Network
	for _, a := range addrs {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		out.Addresses = append(out.Addresses, addr)
		out.Broadcasts = append(out.Broadcasts, broadcasts(a)...)
		switch global := isGlobal(addr); {
		case global && !names[a.LinkIndex].Lo && a.Scope == int(netlink.SCOPE_UNIVERSE):
			out.addPrimary(addr)
			out.Global = append(out.Global, addr)
		case global || addr.Is4() && addr.IsLinkLocalUnicast():
			other.addPrimary(addr)
		}
	}
	out.addPrimary(other.Primary4)
	out.addPrimary(other.Primary6)
	routes, err := n.readTables()
	out.Routes, out.Local = routes.main, routes.local
	return out, err
}

// AddLoopback adds an IPv6 address to lo. It says whether it was not there
// before.
func (n *NetNS) AddLoopback(a netip.Addr) (added bool, err error) {
	handle, err := n.Handle()
	if err != nil {
		return false, err
	}
	lo, addr, err := onLoopback(handle, a)
	if err == nil {
		err = handle.AddrAdd(lo, addr)
	}
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("add %s to lo of %s: %w", a, n.path, err)
	}
	return true, nil
}

// RemoveLoopback removes an address from lo, where it is there.
func (n *NetNS) RemoveLoopback(a netip.Addr) error {
	handle, err := n.Handle()
	if err != nil {
		return err
	}
	lo, addr, err := onLoopback(handle, a)
	if err == nil {
		err = handle.AddrDel(lo, addr)
	}
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("remove %s from lo of %s: %w", a, n.path, err)
	}
	return nil
}

func onLoopback(handle *netlink.Handle, a netip.Addr) (netlink.Link, *netlink.Addr, error) {
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return nil, nil, err
	}
	whole := net.CIDRMask(a.BitLen(), a.BitLen())
	return lo, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: whole}, Flags: unix.IFA_F_NODAD}, nil
}

func (n *Network) addPrimary(a netip.Addr) {
	if a.Is4() && !n.Primary4.IsValid() {
		n.Primary4 = a
	}
	if a.Is6() && !n.Primary6.IsValid() {
		n.Primary6 = a
	}
}

// isGlobal: others can reach it. ::/96 holds ::1 and ::6, which Istio adds to lo
// for the proxy to call the app from.
func isGlobal(a netip.Addr) bool {
	compatible := netip.MustParsePrefix("::/96")
	return !a.IsLoopback() && !a.IsLinkLocalUnicast() && !compatible.Contains(a)
}

// Netlink opens a route netlink handle in the namespace. Close it.
func (n *NetNS) Netlink() (*netlink.Handle, error) {
	var handle *netlink.Handle
	err := n.Do(func() error {
		var err error
		handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink in %s: %w", n.path, err)
	}
	return handle, nil
}

// Handle is a route netlink handle in the namespace that lives until Close.
// Like NetNS itself it is for one goroutine at a time.
func (n *NetNS) Handle() (*netlink.Handle, error) {
	if n.handle == nil {
		handle, err := n.Netlink()
		if err != nil {
			return nil, err
		}
		n.handle = handle
	}
	return n.handle, nil
}

// ErrChanging is returned for a namespace that changes faster than it can be
// read. Try again.
var ErrChanging = errors.New("it changes while it is read")

// dump repeats a listing that changed while it was read.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	var out []T
	var err error
	for range 5 {
		out, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return out, err
		}
	}
	return out, ErrChanging
}

// broadcasts are those of an address: the last one of its subnet (of more than
// two addresses), and the one that was set on it.
func broadcasts(a netlink.Addr) (out []netip.Addr) {
	if b, ok := netip.AddrFromSlice(a.Broadcast.To4()); ok {
		out = append(out, b)
	}
	ip, ones := a.IP.To4(), 0
	if ip != nil {
		ones, _ = a.Mask.Size()
	}
	if ip == nil || ones >= 31 {
		return out
	}
	last := [4]byte(ip)
	for i := range last {
		last[i] |= ^a.Mask[i]
	}
	return append(out, netip.AddrFrom4(last))
}
