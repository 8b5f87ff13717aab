package oracle

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// The mark of the proxy's calls for clients, and the table that it leads to.
const (
	clientMark   = 1337
	clientTable  = 133
	selfCallMark = 1338
)

// wayBack adds the routing that Istio adds in TPROXY mode, and returns what takes
// it away again.
func wayBack(ns *kit.NS) (remove func() error, err error) {
	var undo []func(*netlink.Handle) error
	remove = func() error {
		return withNetlink(ns, func(h *netlink.Handle) (err error) {
			for _, fn := range undo {
				err = errors.Join(err, fn(h))
			}
			return err
		})
	}
	err = withNetlink(ns, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		for family, all := range map[int]net.IPNet{
			unix.AF_INET:  {IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
			unix.AF_INET6: {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
		} {
			rule := netlink.NewRule()
			rule.Family, rule.Mark, rule.Table = family, clientMark, clientTable
			if err := h.RuleAdd(rule); err != nil {
				return fmt.Errorf("add a rule for mark %d: %w", clientMark, err)
			}
			undo = append(undo, func(h *netlink.Handle) error { return h.RuleDel(rule) })
			route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &all, Table: clientTable, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}
			if err := h.RouteAdd(route); err != nil {
				return fmt.Errorf("add a route to table %d: %w", clientTable, err)
			}
			undo = append(undo, func(h *netlink.Handle) error { return h.RouteDel(route) })
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	return remove, nil
}

func withNetlink(ns *kit.NS, fn func(*netlink.Handle) error) error {
	return ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return fn(h)
	})
}

// makeTransparent lets a socket have addresses that are not the pod's.
func makeTransparent(fd, family int) error {
	if family == unix.AF_INET6 {
		return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}

// forClients are the proxy's calls of the pod for a client, with the mark and
// without, and with other marks.
func forClients() (out []probe) {
	for i, to := range concat(own, inner[:1], lo[:1], lo[3:4]) {
		client := far[0]
		if to.Is6() {
			client = far[2]
		}
		for _, port := range []uint16{plainPort, nobodyPort, portDNS, 15001, 15006, portHBONE, 15021} {
			if i%3 != 0 && port != plainPort {
				continue
			}
			p := probe{From: inPod, ID: kit.TProxy, To: netip.AddrPortFrom(to, port), MayVanish: true}
			q := p
			q.Source, q.ForClient = client, true
			for _, mark := range []int{0, clientMark, selfCallMark} {
				p.Mark, q.Mark = mark, mark
				out = append(out, p, q)
			}
		}
	}
	return out
}

// byTProxy says that a configuration is of TPROXY mode.
func (c config) byTProxy() bool { return c.Rules.Mode == rules.TProxy }

func (c config) isProxy(id kit.ID) bool {
	return slices.Contains(c.Rules.ProxyUIDs, uint32(id.UID)) || slices.Contains(c.Rules.ProxyGIDs, uint32(id.GID))
}
