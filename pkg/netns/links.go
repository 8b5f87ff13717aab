package netns

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Link is a network interface of a namespace.
type Link struct {
	Index int
	Name  string
	Lo    bool
	Up    bool
}

// Network is what a namespace looks like at one moment.
type Network struct {
	Links     []Link
	Addresses []netip.Addr // all but multicast, link-local included, without zone
	Primary4  netip.Addr   // the first global address of a family; zero if none
	Primary6  netip.Addr
}

// Inspect reads interfaces and addresses.
func (n *NetNS) Inspect() (Network, error) {
	handle, err := n.Netlink()
	if err != nil {
		return Network{}, err
	}
	defer handle.Close()
	var out Network
	links, err := dump(handle.LinkList)
	if err != nil {
		return Network{}, fmt.Errorf("list the interfaces of %s: %w", n.path, err)
	}
	names := map[int]Link{}
	for _, l := range links {
		a := l.Attrs()
		link := Link{Index: a.Index, Name: a.Name, Lo: a.RawFlags&unix.IFF_LOOPBACK != 0, Up: a.RawFlags&unix.IFF_UP != 0}
		names[a.Index] = link
		out.Links = append(out.Links, link)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return Network{}, fmt.Errorf("list the addresses of %s: %w", n.path, err)
	}
	for _, a := range addrs {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		out.Addresses = append(out.Addresses, addr)
		if names[a.LinkIndex].Lo || addr.IsLoopback() || addr.IsLinkLocalUnicast() || a.Scope != int(netlink.SCOPE_UNIVERSE) {
			continue
		}
		if addr.Is4() && !out.Primary4.IsValid() {
			out.Primary4 = addr
		}
		if addr.Is6() && !out.Primary6.IsValid() {
			out.Primary6 = addr
		}
	}
	return out, nil
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
	return out, err
}
