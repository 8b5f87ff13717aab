package netns

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What leads the app's answers to a marked connection back to the proxy, in
// TPROXY mode: the mark and the table that Istio uses.
const (
	wayBackMark  = 1337
	wayBackTable = 133
	loIndex      = 1 // of lo, in every namespace
)

// WayBack is a set of the things that make the way back.
type WayBack uint16

// The things. A rule sends what is marked to a table whose only route delivers
// everything locally. The answers are marked because a connection that is
// accepted takes the mark of its SYN, and because a RST without a socket takes
// the mark of what it answers. The first setting is for both families.
const (
	WayBackRule4 WayBack = 1 << iota
	WayBackRule6
	WayBackRoute4
	WayBackRoute6
	WayBackAcceptMark
	WayBackReflect4
	WayBackReflect6
)

// wayBackSettings are the sysctls, which stand at "0" by default.
var wayBackSettings = []struct {
	part WayBack
	path string
}{
	{WayBackAcceptMark, "/proc/sys/net/ipv4/tcp_fwmark_accept"},
	{WayBackReflect4, "/proc/sys/net/ipv4/fwmark_reflect"},
	{WayBackReflect6, "/proc/sys/net/ipv6/fwmark_reflect"},
}

var wayBackFamilies = []struct {
	family               int
	rule, route, reflect WayBack
}{
	{netlink.FAMILY_V4, WayBackRule4, WayBackRoute4, WayBackReflect4},
	{netlink.FAMILY_V6, WayBackRule6, WayBackRoute6, WayBackReflect6},
}

// wayBack6 are the parts that are for IPv6 alone.
const wayBack6 = WayBackRule6 | WayBackRoute6 | WayBackReflect6

// MissingWayBack says what of the way back the namespace lacks, of which ours was added
// before. A rule that is not ours is Istio's, whose iptables rules are then there too.
// These mark what clients send, and lead the answers to the proxy's calls back without
// our settings. With fwmark_reflect a reset that is meant for a client would be led to lo.
func (n *NetNS) MissingWayBack(ipv6 bool, ours WayBack) (WayBack, error) {
	handle, err := n.Handle()
	if err != nil {
		return 0, err
	}
	var missing, unwanted WayBack
	for _, f := range wayBackFamilies {
		if f.rule&wayBack6 != 0 && !ipv6 {
			continue
		}
		rules, err := dump(func() ([]netlink.Rule, error) { return handle.RuleList(f.family) })
		if err != nil {
			return 0, fmt.Errorf("list the routing rules of %s: %w", n.path, err)
		}
		if !hasWayBackRule(rules) {
			missing |= f.rule
		} else if ours&f.rule == 0 {
			unwanted |= f.reflect
		}
		routes, err := dump(func() ([]netlink.Route, error) {
			return handle.RouteListFiltered(f.family, &netlink.Route{Table: wayBackTable}, netlink.RT_FILTER_TABLE)
		})
		if err != nil && !errors.Is(err, unix.ENOENT) { // no such table yet
			return 0, fmt.Errorf("list routing table %d of %s: %w", wayBackTable, n.path, err)
		}
		if !hasWayBackRoute(routes) {
			missing |= f.route
		}
	}
	err = n.Do(func() error {
		for _, s := range wayBackSettings {
			if s.part&wayBack6 != 0 && !ipv6 {
				continue
			}
			value, err := readSetting(s.path)
			if err != nil {
				return err
			}
			if value == "0" {
				missing |= s.part &^ unwanted
			}
		}
		return nil
	})
	return missing, err
}

func hasWayBackRule(rules []netlink.Rule) bool {
	for _, r := range rules {
		whole := r.Mask == nil || *r.Mask == ^uint32(0)
		everything := r.Src == nil && r.Dst == nil && r.IifName == "" && r.OifName == "" && !r.Invert && r.IPProto <= 0
		if r.Mark == wayBackMark && whole && everything && r.Table == wayBackTable {
			return true
		}
	}
	return false
}

func hasWayBackRoute(routes []netlink.Route) bool {
	for _, r := range routes {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		if ones == 0 && r.Type == unix.RTN_LOCAL && r.LinkIndex == loIndex {
			return true
		}
	}
	return false
}

// AddWayBack adds these parts, which must be missing. If it fails, none of them
// is left.
func (n *NetNS) AddWayBack(parts WayBack) error {
	err := n.addWayBack(parts)
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w: something else uses routing table %d there, which TPROXY mode needs for itself", err, wayBackTable)
	}
	if err != nil {
		return errors.Join(err, n.RemoveWayBack(parts))
	}
	return nil
}

// addWayBack does first what may not be allowed.
func (n *NetNS) addWayBack(parts WayBack) error {
	handle, err := n.Handle()
	if err != nil {
		return err
	}
	if err := n.writeSettings(parts, "1"); err != nil {
		return err
	}
	for _, f := range wayBackFamilies {
		if parts&f.route != 0 {
			if err := handle.RouteAdd(wayBackRoute(f.family)); err != nil {
				return fmt.Errorf("add the route of TPROXY mode to %s: %w", n.path, err)
			}
		}
		if parts&f.rule != 0 {
			if err := handle.RuleAdd(wayBackRule(f.family)); err != nil {
				return fmt.Errorf("add the routing rule of TPROXY mode to %s: %w", n.path, err)
			}
		}
	}
	return nil
}

// RemoveWayBack removes these parts. What is not there is no error.
func (n *NetNS) RemoveWayBack(parts WayBack) error {
	if parts == 0 {
		return nil
	}
	handle, err := n.Handle()
	if err != nil {
		return err
	}
	var errs error
	gone := func(err error) bool { return err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }
	for _, f := range wayBackFamilies {
		if parts&f.rule != 0 {
			if err := handle.RuleDel(wayBackRule(f.family)); !gone(err) {
				errs = errors.Join(errs, fmt.Errorf("remove the routing rule of TPROXY mode from %s: %w", n.path, err))
			}
		}
		if parts&f.route != 0 {
			if err := handle.RouteDel(wayBackRoute(f.family)); !gone(err) {
				errs = errors.Join(errs, fmt.Errorf("remove the route of TPROXY mode from %s: %w", n.path, err))
			}
		}
	}
	return errors.Join(errs, n.writeSettings(parts, "0"))
}

func wayBackRoute(family int) *netlink.Route {
	r := &netlink.Route{LinkIndex: loIndex, Table: wayBackTable, Type: unix.RTN_LOCAL, Dst: anywhere(family), Family: family}
	if family == netlink.FAMILY_V4 {
		r.Scope = netlink.SCOPE_HOST
	}
	return r
}

func anywhere(family int) *net.IPNet {
	if family == netlink.FAMILY_V6 {
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

func wayBackRule(family int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Mark, r.Table = family, wayBackMark, wayBackTable
	return r
}

// writeSettings leaves alone what has the value: it may not be ours to write.
func (n *NetNS) writeSettings(parts WayBack, value string) error {
	return n.Do(func() error { // /proc/sys/net follows the thread
		for _, s := range wayBackSettings {
			if parts&s.part == 0 {
				continue
			}
			there, err := readSetting(s.path)
			if err != nil {
				return err
			}
			if there == value {
				continue
			}
			err = os.WriteFile(s.path, []byte(value), 0o644)
			if errors.Is(err, unix.EROFS) {
				return fmt.Errorf("set a sysctl that TPROXY mode needs: %w; give Sluice a /proc/sys that can be written, as in a privileged container", err)
			}
			if err != nil {
				return fmt.Errorf("set a sysctl that TPROXY mode needs: %w", err)
			}
		}
		return nil
	})
}

func readSetting(path string) (string, error) {
	value, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read a sysctl that TPROXY mode needs: %w", err)
	}
	return strings.TrimSpace(string(value)), nil
}
