package oracle

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// redirection is what redirects in a site.
type redirection struct {
	iptables string // "legacy", "nft", or empty
	sluice   bool
}

var (
	nothing = redirection{}
	legacy  = redirection{iptables: "legacy"}
	nft     = redirection{iptables: "nft"}
	sluice  = redirection{sluice: true}
)

// and is both at once, as on a node that is being migrated.
func (r redirection) and() redirection { return redirection{iptables: r.iptables, sluice: true} }

func (r redirection) String() string {
	switch {
	case r.iptables != "" && r.sluice:
		return "sluice on top of iptables-" + r.iptables
	case r.iptables != "":
		return "iptables-" + r.iptables
	case r.sluice:
		return "sluice"
	}
	return "no redirection"
}

// site is a pod with two hosts around it, which every site has alike: the same
// addresses, and servers on every port.
//
//	far  10.99.0.1, fd99::1, and as a service's address 10.96.0.10, fd96::10
//	pod  eth0: 10.99.0.2, .3, fd99::2, ::3   net1: 10.98.0.2, fd98::2
//	far2 10.98.0.1, fd98::1
//	vm   10.88.0.2, fd88::2, behind the pod's vm0: 10.88.0.1, fd88::1
type site struct {
	redirection
	t                  testing.TB
	pod, far, far2, vm *kit.NS
	servers            *servers
	datapath           *datapath.Datapath
	rewrites           func() // if not nil, adds the pod's own rules, behind Istio's
}

func newSite(t testing.TB, r redirection, f families) *site {
	t.Helper()
	s := &site{redirection: r, t: t, servers: serve(t),
		pod: kit.NewNS(t, "pod"), far: kit.NewNS(t, "far"), far2: kit.NewNS(t, "far2"), vm: kit.NewNS(t, "vm")}
	for _, ns := range []*kit.NS{s.pod, s.far, s.far2, s.vm} {
		ns.Sysctl("ipv6/conf/default/accept_dad", "0") // link-local addresses too are usable at once
	}
	if r.sluice {
		s.datapath = kit.Datapath(t)
	}
	s.wire("eth0", s.far, f, "10.99.0.2/24", "10.99.0.1/24", "fd99::2/64", "fd99::1/64")
	s.wire("net1", s.far2, f, "10.98.0.2/24", "10.98.0.1/24", "fd98::2/64", "fd98::1/64")
	s.wire("vm0", s.vm, f, "10.88.0.1/24", "10.88.0.2/24", "fd88::1/64", "fd88::2/64")
	s.pod.Sysctl("ipv4/ip_forward", "1")
	s.pod.Sysctl("ipv6/conf/all/forwarding", "1")
	if f != only6 {
		s.pod.AddAddr("eth0", netip.MustParsePrefix("10.99.0.3/24"))
		s.pod.AddRoute("10.0.0.0/8", kit.Far4)
		s.far.AddAddr("lo", netip.MustParsePrefix("10.96.0.10/32"))
		s.vm.AddRoute("10.0.0.0/8", inner[0])
		s.far.AddRoute("10.88.0.0/24", kit.Pod4)
		s.far2.AddRoute("10.88.0.0/24", own[2])
		s.swallow("10.95.0.0/24")
	}
	if f != only4 {
		s.pod.AddAddr("eth0", netip.MustParsePrefix("fd99::3/64"))
		s.pod.AddRoute("fd00::/8", kit.Far6)
		s.far.AddAddr("lo", netip.MustParsePrefix("fd96::10/128"))
		s.vm.AddRoute("fd00::/8", inner[1])
		s.far.AddRoute("fd88::/64", kit.Pod6)
		s.far2.AddRoute("fd88::/64", own[5])
		s.swallow("fd95::/64")
		s.pod.AddAddr("lo", netip.MustParsePrefix("::6/128")) // Istio does, and Sluice
	}
	for name, ns := range map[string]*kit.NS{"pod": s.pod, "far": s.far, "far2": s.far2, "vm": s.vm} {
		for _, port := range ports {
			if name == "pod" && (port == rules.DefaultOutboundPort || port == rules.DefaultInboundPort || port == rules.DefaultDNSPort) {
				continue // the proxy's
			}
			s.serveAt(ns, kit.Root, fmt.Sprint(name, ":", port), "0.0.0.0", "::", port)
		}
	}
	s.serveAt(s.pod, kit.Root, fmt.Sprint("pod-lo:", loPort), "127.0.0.1", "::1", loPort)
	return s
}

func (s *site) wire(name string, to *kit.NS, f families, pairs ...string) {
	s.t.Helper()
	var use []netip.Prefix
	for _, pair := range pairs {
		p := netip.MustParsePrefix(pair)
		if f == dualStack || p.Addr().Is4() == (f == only4) {
			use = append(use, p)
		}
	}
	(&kit.Pod{NS: s.pod, Far: to}).Wire(name, use...)
}

// swallow makes the far host drop what is sent there, without an answer.
func (s *site) swallow(prefix string) {
	s.t.Helper()
	dst, err := netlink.ParseIPNet(prefix)
	if err != nil {
		s.t.Fatal(err)
	}
	s.far.Netlink(func(h *netlink.Handle) error {
		return h.RouteAdd(&netlink.Route{Dst: dst, Type: unix.RTN_BLACKHOLE})
	})
	s.far.Sysctl("ipv4/ip_forward", "1")
	s.far.Sysctl("ipv6/conf/all/forwarding", "1")
}

func (s *site) serveAt(ns *kit.NS, id kit.ID, by, v4, v6 string, port uint16) {
	s.t.Helper()
	for _, addr := range []string{v4, v6} {
		if _, err := s.servers.listen(ns, id, netip.AddrPortFrom(netip.MustParseAddr(addr), port), by); err != nil {
			s.t.Fatalf("%s: %v", by, err)
		}
	}
}

func (s *site) at(p place) *kit.NS {
	switch p {
	case inFar:
		return s.far
	case inOther:
		return s.far2
	case inVM:
		return s.vm
	}
	return s.pod
}

// proxyID is as whom the proxy runs.
func proxyID(r rules.Rules) kit.ID {
	id := kit.App
	if len(r.ProxyUIDs) > 0 {
		id.UID = int(r.ProxyUIDs[0])
	}
	if len(r.ProxyGIDs) > 0 {
		id.GID = int(r.ProxyGIDs[0])
	}
	return id
}

// try sets the site up for a configuration, runs the probes, and takes away what
// was set up. Omit is the name of a rule that iptables is to lack.
func (s *site) try(c config, omit string, probes []probe) (out map[probe]outcome, err error) {
	r, err := c.Rules.Normalise()
	if err != nil {
		return nil, err
	}
	if s.iptables != "" {
		if err := restore(s.pod, s.iptables, r, omit); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.forgetConnections()) }()
		if c.byTProxy() {
			remove, err := wayBack(s.pod)
			if err != nil {
				return nil, err
			}
			defer func() { err = errors.Join(err, remove()) }()
		}
	}
	if s.rewrites != nil {
		s.rewrites()
	}
	if s.sluice {
		if _, err := s.datapath.Enroll(s.pod.NetNS, datapath.Pod{Namespace: "oracle", Name: s.String(), Rules: r, Inbound: c.Inbound}); err != nil {
			return nil, err
		}
		defer func() {
			_, e := s.datapath.Unenroll(s.pod.Cookie(), s.pod.NetNS)
			err = errors.Join(err, e)
		}()
	}
	var proxy []int
	defer func() { s.servers.close(proxy) }()
	for by, port := range map[string]uint16{"proxy:out": r.OutboundPort, "proxy:in": r.InboundPort, "proxy:dns": r.DNSPort} {
		for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			fds, err := s.servers.listen(s.pod, proxyID(r), netip.AddrPortFrom(any, port), by)
			proxy = append(proxy, fds...)
			if err != nil {
				return nil, err
			}
			if c.byTProxy() && port == r.InboundPort {
				if err := makeTransparent(fds[0], family(any)); err != nil {
					return nil, err
				}
			}
		}
	}
	return s.run(probes)
}

// forgetConnections empties conntrack, so that a tuple which comes again is not
// translated by the rules of before.
func (s *site) forgetConnections() error {
	return s.pod.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer h.Close()
		return h.ConntrackTableFlush(netlink.ConntrackTable)
	})
}
