// Package iptables writes, as text, the rules that Istio's CNI plugin would write
// into a pod: what Sluice is compared with, by the oracle and by the benchmark. It
// loads nothing.
package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// The marks of TPROXY mode: of the proxy's calls for clients, and of those to its
// own pod.
const (
	clientMark   = 1337
	selfCallMark = 1338
)

type text struct {
	rules.Rules
	v6    bool
	omit  string // leave the lines of this name out
	lines []string
}

// Istio returns what Istio's CNI plugin writes into a pod with these normalised
// rules, for one family, as iptables-restore reads it. Each line bears the name
// that docs/rules.md gives to what it does; those of the name omit are left out.
func Istio(r rules.Rules, v6 bool, omit string) string {
	i := &text{Rules: r, v6: v6, omit: omit}
	i.table("nat", "ISTIO_INBOUND", "ISTIO_REDIRECT", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT", "ISTIO_OUTPUT_DNS")
	i.add("", "-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports %d", r.OutboundPort)
	i.add("", "-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports %d", r.InboundPort)
	i.rerouted()
	i.inbound()
	for _, name := range r.ExcludeInterfaces {
		i.add("O0", "-A OUTPUT -o %s -j RETURN", name)
	}
	i.add("", "-A OUTPUT -j ISTIO_OUTPUT")
	i.output()
	i.commit()
	i.table("raw")
	if r.DNS {
		i.zones()
	}
	i.commit()
	i.table("mangle", "ISTIO_INBOUND", "ISTIO_DIVERT", "ISTIO_TPROXY")
	if r.Mode == rules.TProxy {
		i.mangle()
	}
	i.commit()
	return strings.Join(i.lines, "\n") + "\n"
}

func (i *text) add(name, format string, args ...any) {
	if name == "" || name != i.omit {
		i.lines = append(i.lines, fmt.Sprintf(format, args...))
	}
}

func (i *text) table(name string, chains ...string) {
	builtin := map[string][]string{
		"raw":    {"PREROUTING", "OUTPUT"},
		"nat":    {"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"},
		"mangle": {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"},
	}[name]
	i.add("", "*%s", name)
	for _, chain := range builtin {
		i.add("", ":%s ACCEPT [0:0]", chain)
	}
	for _, chain := range chains {
		i.add("", ":%s - [0:0]", chain)
	}
}

func (i *text) commit() { i.add("", "COMMIT") }

// rerouted are the lines that Istio inserts above all others, the redirects last.
func (i *text) rerouted() {
	to := []string{""}
	if !i.IncludeOutboundCIDRs.All {
		to = nil
	}
	for _, prefix := range i.ofFamily(i.IncludeOutboundCIDRs.List) {
		to = append(to, fmt.Sprintf(" -d %s", prefix))
	}
	for _, dst := range to {
		for _, name := range i.RerouteInterfaces {
			i.add("P0", "-A PREROUTING -i %s%s -j ISTIO_REDIRECT", name, dst)
		}
	}
	for _, name := range i.RerouteInterfaces {
		i.add("P0 RETURN", "-A PREROUTING -i %s -j RETURN", name)
	}
}

func (i *text) inbound() {
	for _, name := range i.ExcludeInterfaces {
		i.add("I0", "-A PREROUTING -i %s -j RETURN", name)
	}
	if i.Mode == rules.TProxy {
		return
	}
	i.add("I1", "-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN")
	if !i.capturesInbound() {
		return
	}
	i.add("", "-A PREROUTING -p tcp -j ISTIO_INBOUND")
	if !i.IncludeInboundPorts.All {
		for _, port := range i.IncludeInboundPorts.List {
			i.add("I3", "-A ISTIO_INBOUND -p tcp --dport %d -j ISTIO_IN_REDIRECT", port)
		}
		return
	}
	for _, port := range i.ExcludeInboundPorts {
		i.add("I2", "-A ISTIO_INBOUND -p tcp --dport %d -j RETURN", port)
	}
	i.add("I3", "-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT")
}

func (i *text) capturesInbound() bool {
	return i.IncludeInboundPorts.All || len(i.IncludeInboundPorts.List) > 0
}

// loopback and source are the addresses that the family has for these.
func (i *text) loopback() string {
	if i.v6 {
		return "::1/128"
	}
	return i.Loopback.String()
}

func (i *text) source() string {
	if i.v6 {
		return "::6/128"
	}
	return "127.0.0.6/32"
}

func (i *text) output() {
	for _, port := range i.ExcludeOutboundPorts {
		i.add("O1", "-A ISTIO_OUTPUT -p tcp --dport %d -j RETURN", port)
		i.add("O1", "-A ISTIO_OUTPUT -p udp --dport %d -j RETURN", port)
	}
	i.add("O2", "-A ISTIO_OUTPUT -o lo -s %s -j RETURN", i.source())
	self := "! --dport 15008"
	if i.DNS {
		self = "-m multiport ! --dports 53,15008"
	}
	for _, uid := range i.ProxyUIDs {
		i.identity([3]string{"O3", "O4", "O5"}, fmt.Sprintf("--uid-owner %d", uid), self)
	}
	for _, gid := range i.ProxyGIDs {
		i.identity([3]string{"O6", "O7", "O8"}, fmt.Sprintf("--gid-owner %d", gid), "! --dport 15008")
	}
	i.owners()
	if i.DNS {
		i.add("O10", "-A ISTIO_OUTPUT -j ISTIO_OUTPUT_DNS")
		i.add("", "-A ISTIO_OUTPUT_DNS -p tcp --dport 53 -j REDIRECT --to-ports %d", i.DNSPort)
		i.add("", "-A ISTIO_OUTPUT_DNS -p udp --dport 53 -j REDIRECT --to-ports %d", i.DNSPort)
	}
	i.add("O11", "-A ISTIO_OUTPUT -d %s -j RETURN", i.loopback())
	for _, prefix := range i.ofFamily(i.ExcludeOutboundCIDRs) {
		i.add("O12", "-A ISTIO_OUTPUT -d %s -j RETURN", prefix)
	}
	for _, port := range i.IncludeOutboundPorts {
		i.add("O13", "-A ISTIO_OUTPUT -p tcp --dport %d -j ISTIO_REDIRECT", port)
	}
	if i.IncludeOutboundCIDRs.All {
		i.add("O14", "-A ISTIO_OUTPUT -j ISTIO_REDIRECT")
	}
	for _, prefix := range i.ofFamily(i.IncludeOutboundCIDRs.List) {
		i.add("O14", "-A ISTIO_OUTPUT -d %s -j ISTIO_REDIRECT", prefix)
	}
}

// identity adds the three lines of a UID or GID of the proxy.
func (i *text) identity(names [3]string, owner, self string) {
	i.add(names[0], "-A ISTIO_OUTPUT -o lo ! -d %s -p tcp %s -m owner %s -j ISTIO_IN_REDIRECT", i.loopback(), self, owner)
	if !slices.ContainsFunc(i.IncludeOutboundCIDRs.List, func(p netip.Prefix) bool { return p.Addr().IsLoopback() }) {
		tcp := ""
		if i.DNS {
			tcp = "-p tcp ! --dport 53 "
		}
		i.add(names[1], "-A ISTIO_OUTPUT -o lo %s-m owner ! %s -j RETURN", tcp, owner)
	}
	i.add(names[2], "-A ISTIO_OUTPUT -m owner %s -j RETURN", owner)
}

func (i *text) owners() {
	if i.OwnerGroups.All {
		for _, gid := range i.ExcludeOwnerGroups {
			i.add("O9", "-A ISTIO_OUTPUT -m owner --gid-owner %d -j RETURN", gid)
		}
		return
	}
	var none string
	for _, gid := range i.OwnerGroups.List {
		none += fmt.Sprintf(" -m owner ! --gid-owner %d", gid)
	}
	i.add("O9", "-A ISTIO_OUTPUT%s -j RETURN", none)
}

// zones keep the two halves of a captured UDP query apart in conntrack.
func (i *text) zones() {
	for _, owner := range i.identities() {
		i.add("", "-A OUTPUT -p udp --dport 53 -m owner %s -j CT --zone 1", owner)
		i.add("", "-A OUTPUT -p udp --sport %d -m owner %s -j CT --zone 2", i.DNSPort, owner)
	}
	i.add("", "-A OUTPUT -p udp --dport 53 -j CT --zone 2")
	i.add("", "-A PREROUTING -p udp --sport 53 -j CT --zone 1")
}

func (i *text) identities() (out []string) {
	for _, uid := range i.ProxyUIDs {
		out = append(out, fmt.Sprintf("--uid-owner %d", uid))
	}
	for _, gid := range i.ProxyGIDs {
		out = append(out, fmt.Sprintf("--gid-owner %d", gid))
	}
	return out
}

func (i *text) ofFamily(prefixes []netip.Prefix) (out []netip.Prefix) {
	for _, p := range prefixes {
		if p.Addr().Is6() == i.v6 {
			out = append(out, p)
		}
	}
	return out
}

// mangle is the table that TPROXY mode adds; PREROUTING of nat then has no
// ISTIO_INBOUND. T1: the proxy's calls for clients, which are marked, are left alone;
// T2: the answers to them come back to the proxy; T3: its calls to its own pod come
// back in; T4: nothing else does over lo.
func (i *text) mangle() {
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

func (i *text) toTProxy(ports string) {
	i.add("I3", "-A ISTIO_INBOUND -p tcp%s -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT", ports)
	i.add("I3", "-A ISTIO_INBOUND -p tcp%s -j ISTIO_TPROXY", ports)
}
