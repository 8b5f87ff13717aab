package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Route is a route of the main table.
type Route struct {
	Dst    netip.Prefix
	Metric uint32 // of equal prefixes the lowest is taken
	// Links are the interfaces of the next hops that live. None: nothing gets
	// there (unreachable, blackhole, prohibit).
	Links []int
	// Partial: only some packets for Dst take it, by their source or TOS.
	Partial bool
}

// tables are what the kernel's own routing rules look up, but the default
// table, which nobody uses.
type tables struct {
	main  []Route
	local []netip.Prefix
}

// readTables dumps the routes of both families. It does not use netlink's own
// type for routes, which does not tell those for some sources from the others.
func (n *NetNS) readTables() (tables, error) {
	socket, err := n.dumpSocket()
	if err != nil {
		return tables{}, err
	}
	messages, err := dump(func() ([][]byte, error) {
		request := nl.NewNetlinkRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP)
		request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: socket}
		request.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_UNSPEC}})
		return request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	})
	if err != nil {
		return tables{}, fmt.Errorf("list the routes of %s: %w", n.path, err)
	}
	var out tables
	for _, message := range messages {
		if err := out.add(message); err != nil {
			return tables{}, fmt.Errorf("read a route of %s: %w", n.path, err)
		}
	}
	return out, nil
}

func (n *NetNS) dumpSocket() (*nl.SocketHandle, error) {
	if n.socket == nil {
		err := n.Do(func() error {
			socket, err := nl.Subscribe(unix.NETLINK_ROUTE)
			if err == nil {
				n.socket = &nl.SocketHandle{Socket: socket}
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("open netlink in %s: %w", n.path, err)
		}
	}
	return n.socket, nil
}

var errShortRoute = errors.New("the message ends early")

// add takes one route message, if it is of the local or the main table.
func (t *tables) add(message []byte) error {
	if len(message) < unix.SizeofRtMsg {
		return errShortRoute
	}
	header := nl.DeserializeRtMsg(message)
	if header.Flags&unix.RTM_F_CLONED != 0 || header.Family != unix.AF_INET && header.Family != unix.AF_INET6 {
		return nil
	}
	attributes, err := nl.ParseRouteAttr(message[unix.SizeofRtMsg:])
	if err != nil {
		return err
	}
	address := netip.IPv4Unspecified()
	if header.Family == unix.AF_INET6 {
		address = netip.IPv6Unspecified()
	}
	table := uint32(header.Table)
	route := Route{Partial: header.Src_len > 0 || header.Tos > 0}
	for _, a := range attributes {
		switch a.Attr.Type {
		case unix.RTA_DST:
			address, _ = netip.AddrFromSlice(a.Value)
		case unix.RTA_TABLE:
			table = word(a.Value)
		case unix.RTA_PRIORITY:
			route.Metric = word(a.Value)
		case unix.RTA_OIF:
			if header.Flags&unix.RTNH_F_DEAD == 0 {
				route.Links = append(route.Links, int(word(a.Value)))
			}
		case unix.RTA_MULTIPATH:
			route.Links = append(route.Links, nextHops(a.Value)...)
		}
	}
	route.Dst = netip.PrefixFrom(address, int(header.Dst_len))
	if !route.Dst.IsValid() {
		return errShortRoute
	}
	switch {
	case table == unix.RT_TABLE_LOCAL && header.Type == unix.RTN_LOCAL && !address.IsLoopback():
		t.local = append(t.local, route.Dst)
	case table == unix.RT_TABLE_MAIN:
		if header.Type != unix.RTN_UNICAST {
			route.Links = nil
		}
		t.main = append(t.main, route)
	}
	return nil
}

// nextHops are the interfaces of a list of struct rtnexthop, but the dead ones.
func nextHops(list []byte) (out []int) {
	for len(list) >= unix.SizeofRtNexthop {
		length := int(binary.NativeEndian.Uint16(list))
		if flags := list[2]; flags&unix.RTNH_F_DEAD == 0 {
			out = append(out, int(word(list[4:])))
		}
		length = (length + unix.RTA_ALIGNTO - 1) &^ (unix.RTA_ALIGNTO - 1)
		if length < unix.SizeofRtNexthop || length > len(list) {
			break
		}
		list = list[length:]
	}
	return out
}

func word(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

// PolicyRouted says whether the namespace has routing rules besides the
// kernel's own: then the main table is not all that decides.
func (n *NetNS) PolicyRouted() (bool, error) {
	const kernels = 3 // local, main, default; of IPv6 the first two
	handle, err := n.Handle()
	if err != nil {
		return false, err
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := dump(func() ([]netlink.Rule, error) { return handle.RuleList(family) })
		if err != nil {
			return false, fmt.Errorf("list the routing rules of %s: %w", n.path, err)
		}
		if len(rules) > kernels || family == unix.AF_INET6 && len(rules) > kernels-1 {
			return true, nil
		}
	}
	return false, nil
}
