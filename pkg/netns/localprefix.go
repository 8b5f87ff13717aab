package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// AddLocalPrefix makes every address of a prefix one of the namespace's own. It
// is no error if they are already.
func (n *NetNS) AddLocalPrefix(p netip.Prefix) error {
	handle, route, err := n.localRoute(p)
	if err == nil {
		err = handle.RouteAdd(route)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make %s local in %s: %w", p, n.path, err)
	}
	return nil
}

// RemoveLocalPrefix undoes AddLocalPrefix, where that is needed.
func (n *NetNS) RemoveLocalPrefix(p netip.Prefix) error {
	handle, route, err := n.localRoute(p)
	if err == nil {
		err = handle.RouteDel(route)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("make %s not local in %s: %w", p, n.path, err)
	}
	return nil
}

func (n *NetNS) localRoute(p netip.Prefix) (*netlink.Handle, *netlink.Route, error) {
	handle, err := n.Handle()
	if err != nil {
		return nil, nil, err
	}
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return nil, nil, err
	}
	return handle, &netlink.Route{
		LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL,
		Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
	}, nil
}
