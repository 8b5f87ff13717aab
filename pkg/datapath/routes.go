package datapath

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// cookieBits is what every prefix of routes4 and routes6 begins with.
const cookieBits = 64

func routeKey(cookie uint64, p netip.Prefix) (table string, key any) {
	low, high := uint32(cookie), uint32(cookie>>32)
	if p.Addr().Is4() {
		return "routes4", connectRoute4Key{Prefixlen: uint32(cookieBits + p.Bits()), CookieLow: low, CookieHigh: high, Addr: p.Addr().As4()}
	}
	return "routes6", connectRoute6Key{Prefixlen: uint32(cookieBits + p.Bits()), CookieLow: low, CookieHigh: high, Addr: p.Addr().As16()}
}

// compileRoutes turns routing tables into what the connect programs look up: by
// a destination's longest prefix, is it the pod's own, out through an excluded
// interface, or neither? Where it is in doubt it is neither, and so captured.
// Prefixes that say the same as the next shorter one are left out: of a pod's
// thousand routes through eth0 none is needed. Without any named interface just
// the local prefixes count.
func compileRoutes(network netns.Network, interfaces map[uint32]connectInterfaceKind, named bool) map[netip.Prefix]connectRouteKind {
	all := map[netip.Prefix]connectRouteKind{}
	if named {
		all = mainRoutes(network.Routes, interfaces)
	}
	for _, p := range network.Local {
		if !p.IsSingleIP() { // own_addrs has those
			all[p] = connectRouteKindROUTE_LOCAL
		}
	}
	prefixes := make([]netip.Prefix, 0, len(all))
	for p := range all {
		prefixes = append(prefixes, p)
	}
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int { return cmp.Compare(a.Bits(), b.Bits()) })
	out := map[netip.Prefix]connectRouteKind{}
	for _, p := range prefixes {
		above := kindAbove(out, p)
		// The local table is asked before the main one. Not so of IPv4: without
		// routing rules of its own a namespace has both in one, where the longest
		// prefix of either counts.
		hidden := above == connectRouteKindROUTE_LOCAL && p.Addr().Is6()
		if above != all[p] && !hidden {
			out[p] = all[p]
		}
	}
	return out
}

// kindAbove is what a table says of a prefix by a shorter one.
func kindAbove(table map[netip.Prefix]connectRouteKind, p netip.Prefix) connectRouteKind {
	for bits := p.Bits() - 1; bits >= 0; bits-- {
		if kind, ok := table[netip.PrefixFrom(p.Addr(), bits).Masked()]; ok {
			return kind
		}
	}
	return connectRouteKindROUTE_OTHER
}

// mainRoutes judges each prefix by its routes with the lowest metric: excluded
// if every next hop that lives is behind an excluded interface.
func mainRoutes(routes []netns.Route, interfaces map[uint32]connectInterfaceKind) map[netip.Prefix]connectRouteKind {
	type best struct {
		metric   uint32
		excluded bool
		partial  bool
	}
	found := map[netip.Prefix]best{}
	for _, r := range routes {
		excluded := len(r.Links) > 0
		for _, index := range r.Links {
			excluded = excluded && interfaces[uint32(index)] == connectInterfaceKindINTERFACE_EXCLUDED
		}
		b, ok := found[r.Dst]
		switch {
		case r.Partial: // who takes it, a connect hook cannot tell
			b.partial = true
		case !ok || r.Metric < b.metric:
			b.metric, b.excluded = r.Metric, excluded
		case r.Metric == b.metric:
			b.excluded = b.excluded && excluded
		}
		found[r.Dst] = b
	}
	out := make(map[netip.Prefix]connectRouteKind, len(found))
	for p, b := range found {
		out[p] = connectRouteKindROUTE_OTHER
		if b.excluded && !b.partial {
			out[p] = connectRouteKindROUTE_EXCLUDED
		}
	}
	return out
}

// routeStep is one change of a table of routes; a nil kind removes.
type routeStep struct {
	prefix netip.Prefix
	kind   any
}

// routeSteps orders the changes from one table to another. The longest prefix
// counts: written longest first, then removed shortest first, at each moment
// each destination is judged as one of the two tables judges it. (Otherwise a
// route could be seen without the longer one that qualifies it.)
func routeSteps(old, new map[netip.Prefix]connectRouteKind) []routeStep {
	var put, remove []routeStep
	difference(old, new, func(p netip.Prefix, kind any) {
		if kind == nil {
			remove = append(remove, routeStep{p, nil})
		} else {
			put = append(put, routeStep{p, kind})
		}
	})
	slices.SortFunc(put, func(a, b routeStep) int { return cmp.Compare(b.prefix.Bits(), a.prefix.Bits()) })
	slices.SortFunc(remove, func(a, b routeStep) int { return cmp.Compare(a.prefix.Bits(), b.prefix.Bits()) })
	return append(put, remove...)
}
