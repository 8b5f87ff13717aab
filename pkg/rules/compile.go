package rules

import (
	"net/netip"
	"slices"
)

// Verdict of a compiled port or prefix.
type Verdict uint32

// The verdicts, with the values that the programs read.
const (
	Direct  Verdict = 1
	Capture Verdict = 2
)

// Exemption of a proxy identity: a set of the flags below.
type Exemption uint32

// The flags, with the values that the programs read.
const (
	Exempt  Exemption = 1 << 0 // its traffic is direct
	Self    Exemption = 1 << 1 // its calls to its own pod go to the inbound port
	SelfDNS Exemption = 1 << 2 // the same for port 53, where DNS is captured
)

// Compiled is a rule set as the kernel looks it up: one lookup per question,
// whatever the number of rules.
type Compiled struct {
	UIDs, GIDs        map[uint32]Exemption
	OutPorts, InPorts map[uint16]Verdict
	CIDRs             map[netip.Prefix]Verdict // one longest-prefix match decides
	Rerouted          map[netip.Prefix]bool    // of CIDRs, those that an include range holds
	OutDefaultCapture bool                     // verdict of an address that no prefix holds
	InDefaultCapture  bool                     // verdict of a port that InPorts does not hold
	LocalCapturable   bool                     // an include range is itself loopback
	Owners            map[uint32]Verdict       // groups of callers
	OwnersDefault     Verdict                  // verdict of a group that Owners does not hold
}

// Compile turns normalised rules into what the kernel looks up.
func (r Rules) Compile() Compiled {
	c := Compiled{
		UIDs:              map[uint32]Exemption{},
		GIDs:              map[uint32]Exemption{},
		OutPorts:          map[uint16]Verdict{},
		InPorts:           map[uint16]Verdict{},
		OutDefaultCapture: r.IncludeOutboundCIDRs.All,
		InDefaultCapture:  r.IncludeInboundPorts.All,
		LocalCapturable:   slices.ContainsFunc(r.IncludeOutboundCIDRs.List, isLoopback),
	}
	c.identities(r)
	c.owners(r)
	for _, port := range r.IncludeOutboundPorts {
		c.OutPorts[port] = Capture
	}
	for _, port := range r.ExcludeOutboundPorts { // beats an include
		c.OutPorts[port] = Direct
	}
	for _, port := range r.ExcludeInboundPorts {
		c.InPorts[port] = Direct
	}
	for _, port := range r.IncludeInboundPorts.List {
		c.InPorts[port] = Capture
	}
	c.CIDRs = compileCIDRs(r.IncludeOutboundCIDRs.List, r.ExcludeOutboundCIDRs)
	c.Rerouted = held(c.CIDRs, r.IncludeOutboundCIDRs.List)
	return c
}

// identities reproduces what several UIDs and GIDs do together in Istio's
// chain: the lines of the first identity return every other caller's local
// traffic, so that only the first one's self-calls are ever captured. Where
// that return is left out (LocalCapturable), each one's are. With DNS capture
// it returns no port 53, which the lines of UIDs leave alone too, but those of
// GIDs capture.
func (c *Compiled) identities(r Rules) {
	first := true
	exemption := func() Exemption {
		if first || c.LocalCapturable {
			first = false
			return Exempt | Self
		}
		return Exempt
	}
	for _, uid := range r.ProxyUIDs {
		c.UIDs[uid] = exemption()
	}
	for _, gid := range r.ProxyGIDs {
		c.GIDs[gid] = exemption()
		if r.DNS {
			c.GIDs[gid] |= SelfDNS
		}
	}
}

func (c *Compiled) owners(r Rules) {
	c.Owners = map[uint32]Verdict{}
	c.OwnersDefault = Direct
	for _, gid := range r.OwnerGroups.List {
		c.Owners[gid] = Capture
	}
	if r.OwnerGroups.All {
		c.OwnersDefault = Capture
		for _, gid := range r.ExcludeOwnerGroups {
			c.Owners[gid] = Direct
		}
	}
}

// compileCIDRs folds "an exclude beats every include, whatever the prefix
// lengths" into each prefix: an include inside an exclude is direct.
func compileCIDRs(include, exclude []netip.Prefix) map[netip.Prefix]Verdict {
	out := make(map[netip.Prefix]Verdict, len(include)+len(exclude))
	excluded := make(map[netip.Prefix]bool, len(exclude))
	for _, p := range exclude {
		out[p] = Direct
		excluded[p] = true
	}
	for _, p := range include {
		out[p] = Capture
		if isHeld(p, excluded) {
			out[p] = Direct
		}
	}
	return out
}

// held are the prefixes that lie in one of the ranges. What a prefix that has no
// longer one says of it, holds for every address of it.
func held(prefixes map[netip.Prefix]Verdict, ranges []netip.Prefix) map[netip.Prefix]bool {
	in := make(map[netip.Prefix]bool, len(ranges))
	for _, p := range ranges {
		in[p] = true
	}
	out := map[netip.Prefix]bool{}
	for p := range prefixes {
		if isHeld(p, in) {
			out[p] = true
		}
	}
	return out
}

// isHeld walks up: at most 129 steps, so that thousands of ranges stay cheap.
func isHeld(p netip.Prefix, ranges map[netip.Prefix]bool) bool {
	for bits := p.Bits(); bits >= 0; bits-- {
		if ranges[netip.PrefixFrom(p.Addr(), bits).Masked()] {
			return true
		}
	}
	return false
}

func isLoopback4(p netip.Prefix) bool {
	return p.IsValid() && p.Addr().Is4() && p.Bits() >= 8 && p.Addr().As4()[0] == 127
}

func isLoopback(p netip.Prefix) bool {
	if p.Addr().Is4() {
		return isLoopback4(p)
	}
	return p == netip.PrefixFrom(netip.IPv6Loopback(), 128)
}
