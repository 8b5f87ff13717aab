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

// mangle is the table that TPROXY mode adds; PREROUTING of nat then has no
// ISTIO_INBOUND. T1: the proxy's calls for clients, which are marked, are left alone;
// T2: the answers to them come back to the proxy; T3: its calls to its own pod come
// back in; T4: nothing else does over lo.
func (i *iptables) mangle() {
	for _, name := range i.ExcludeInterfaces {
		i.add("I0", "-A PREROUTING -i %s -j RETURN", name)
		i.add("O0", "-A OUTPUT -o %s -j RETURN", name)
	}
	i.add("", "-A ISTIO_DIVERT -j MARK --set-mark %d", clientMark)
	i.add("", "-A ISTIO_DIVERT -j ACCEPT")
	i.add("", "-A ISTIO_TPROXY ! -d %s -p tcp -j TPROXY --tproxy-mark %d/0xffffffff --on-port %d", i.loopback(), clientMark, i.InboundPort)
	i.add("T1", "-A ISTIO_INBOUND -p tcp -m mark --mark %d -j RETURN", clientMark)
	i.add("", "-A ISTIO_INBOUND -p tcp -s %s -i lo -j RETURN", i.source())
	i.add("T4", "-A ISTIO_INBOUND -p tcp -i lo -m mark ! --mark %d -j RETURN", selfCallMark)
	if i.capturesInbound() {
		i.add("", "-A PREROUTING -p tcp -j ISTIO_INBOUND")
	}
	if i.IncludeInboundPorts.All {
		for _, port := range i.ExcludeInboundPorts {
			i.add("I2", "-A ISTIO_INBOUND -p tcp --dport %d -j RETURN", port)
		}
		i.toTProxy("")
	}
	for _, port := range i.IncludeInboundPorts.List {
		i.toTProxy(fmt.Sprintf(" --dport %d", port))
	}
	i.add("T2", "-A PREROUTING -p tcp -m mark --mark %d -j CONNMARK --save-mark", clientMark)
	i.add("T1", "-A OUTPUT -p tcp -o lo -m mark --mark %d -j RETURN", clientMark)
	for _, owner := range i.identities() {
		i.add("T3", "-A OUTPUT ! -d %s -p tcp -o lo -m owner %s -j MARK --set-mark %d", i.loopback(), owner, selfCallMark)
	}
	i.add("T2", "-A OUTPUT -p tcp -m connmark --mark %d -j CONNMARK --restore-mark", clientMark)
}

func (i *iptables) toTProxy(ports string) {
	i.add("I3", "-A ISTIO_INBOUND -p tcp%s -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT", ports)
	i.add("I3", "-A ISTIO_INBOUND -p tcp%s -j ISTIO_TPROXY", ports)
}

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
