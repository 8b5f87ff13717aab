// Package rules owns what a pod's redirection is: ports, address ranges and the
// proxy's identity. It parses, validates and normalises them; it knows neither
// Kubernetes nor the kernel, and refuses anything it would have to guess about.
package rules

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Defaults of Istio's sidecar, from its istio-cni plugin.
const (
	DefaultOutboundPort = 15001
	DefaultInboundPort  = 15006
	DefaultDNSPort      = 15053
	DefaultProxyID      = 1337
)

// maxOwnerGroups is how many groups Istio takes in a list.
const maxOwnerGroups = 64

// DefaultLoopback is what counts as the loopback address of IPv4: just that
// one. 127.0.0.2 is local, but not it.
var DefaultLoopback = netip.MustParsePrefix("127.0.0.1/32")

// Mode is the way in which inbound connections reach the proxy.
type Mode string

// The modes. In TPROXY mode the proxy calls the app from the client's address,
// and the app's replies come back to the proxy.
const (
	Redirect Mode = "REDIRECT"
	TProxy   Mode = "TPROXY"
)

// From says since when outbound connections are captured.
type From string

// Always captures from the enrolment on: without a proxy a connection is
// refused. ProxyReady lets the connections of others than the proxy go direct
// until the proxy listens, for init containers that need a network.
const (
	Always     From = "always"
	ProxyReady From = "proxy-ready"
)

// AlwaysExcludedInbound are Istio's telemetry and health ports, which are never
// captured while inbound capture means "all but".
var alwaysExcludedInbound = []uint16{15020, 15021, 15090}

// Ports is a set of ports, or all of them.
type Ports struct {
	All  bool     `json:"all,omitempty"`
	List []uint16 `json:"list,omitempty"`
}

// CIDRs is a set of prefixes, or every address.
type CIDRs struct {
	All  bool           `json:"all,omitempty"`
	List []netip.Prefix `json:"list,omitempty"`
}

// Groups is a set of group IDs, or all of them.
type Groups struct {
	All  bool     `json:"all,omitempty"`
	List []uint32 `json:"list,omitempty"`
}

// Rules says which connections of a pod go to its proxy. The fields mean what
// Istio's annotations of the same names mean.
type Rules struct {
	// ProxyUIDs and ProxyGIDs identify the proxy, as the pod sees them until
	// Translate. Their order matters as in Istio: the first UID (or,
	// without UIDs, the first GID) is the one whose calls to its own pod come
	// back through the inbound port.
	ProxyUIDs []uint32 `json:"proxyUIDs"`
	ProxyGIDs []uint32 `json:"proxyGIDs"`

	OutboundPort uint16 `json:"outboundPort"`
	InboundPort  uint16 `json:"inboundPort"`

	IncludeInboundPorts  Ports    `json:"includeInboundPorts"`
	ExcludeInboundPorts  []uint16 `json:"excludeInboundPorts"` // without effect unless IncludeInboundPorts.All
	ExcludeOutboundPorts []uint16 `json:"excludeOutboundPorts"`

	IncludeOutboundPorts []uint16 `json:"includeOutboundPorts"` // captured whatever the address, unless it is excluded

	IncludeOutboundCIDRs CIDRs          `json:"includeOutboundCIDRs"`
	ExcludeOutboundCIDRs []netip.Prefix `json:"excludeOutboundCIDRs"`

	// ExcludeInterfaces are those through which nothing is captured, neither
	// in nor out. What enters from RerouteInterfaces (a VM's tap) is outbound
	// traffic, to be captured as such.
	ExcludeInterfaces []string `json:"excludeInterfaces"`
	RerouteInterfaces []string `json:"rerouteInterfaces"`

	// OwnerGroups are the groups whose outbound traffic is captured.
	OwnerGroups        Groups   `json:"ownerGroups"`
	ExcludeOwnerGroups []uint32 `json:"excludeOwnerGroups"` // without effect unless OwnerGroups.All

	// Loopback is the IPv4 prefix that counts as "the loopback address".
	Loopback netip.Prefix `json:"loopback"`

	// DNS captures UDP and TCP port 53 to DNSPort.
	DNS     bool   `json:"dns"`
	DNSPort uint16 `json:"dnsPort"`

	Mode Mode `json:"mode"`
	From From `json:"from"`
}

// Default returns the rules of a pod without annotations.
func Default() Rules {
	return Rules{
		ProxyUIDs:            []uint32{DefaultProxyID},
		ProxyGIDs:            []uint32{DefaultProxyID},
		OutboundPort:         DefaultOutboundPort,
		InboundPort:          DefaultInboundPort,
		IncludeInboundPorts:  Ports{All: true},
		IncludeOutboundCIDRs: CIDRs{All: true},
		OwnerGroups:          Groups{All: true},
		Loopback:             DefaultLoopback,
		DNSPort:              DefaultDNSPort,
		Mode:                 Redirect,
		From:                 Always,
	}
}

// Normalise checks the rules and returns them in canonical form, in which equal
// rules are deeply equal: lists sorted and unique, prefixes masked, inbound
// excludes completed with Istio's own ports or dropped where they mean nothing.
func (r Rules) Normalise() (Rules, error) {
	if r.OutboundPort == 0 || r.InboundPort == 0 {
		return Rules{}, fmt.Errorf("the proxy's ports must be 1 to 65535, not %d and %d", r.OutboundPort, r.InboundPort)
	}
	if r.OutboundPort == r.InboundPort {
		return Rules{}, fmt.Errorf("the proxy's outbound and inbound ports must differ, both are %d", r.OutboundPort)
	}
	if len(r.ProxyUIDs)+len(r.ProxyGIDs) == 0 {
		return Rules{}, fmt.Errorf("the proxy needs a UID or a GID: without one its own traffic would be sent back to it")
	}
	if err := r.check(); err != nil {
		return Rules{}, err
	}
	r.ProxyUIDs = uniqueInOrder(r.ProxyUIDs)
	r.ProxyGIDs = uniqueInOrder(r.ProxyGIDs)
	if r.IncludeInboundPorts.All {
		r.IncludeInboundPorts.List = nil
		r.ExcludeInboundPorts = sortedUnique(append(slices.Clone(alwaysExcludedInbound), r.ExcludeInboundPorts...))
	} else {
		r.IncludeInboundPorts.List = sortedUnique(r.IncludeInboundPorts.List)
		r.ExcludeInboundPorts = nil
	}
	r.ExcludeOutboundPorts = sortedUnique(r.ExcludeOutboundPorts)
	r.IncludeOutboundPorts = sortedUnique(r.IncludeOutboundPorts)
	r.ExcludeInterfaces = sortedUnique(r.ExcludeInterfaces)
	r.RerouteInterfaces = sortedUnique(r.RerouteInterfaces)
	if r.OwnerGroups.All {
		r.OwnerGroups.List = nil
		r.ExcludeOwnerGroups = sortedUnique(r.ExcludeOwnerGroups)
	} else {
		r.OwnerGroups.List = sortedUnique(r.OwnerGroups.List)
		r.ExcludeOwnerGroups = nil
	}
	r.Loopback = r.Loopback.Masked()
	if r.IncludeOutboundCIDRs.All {
		r.IncludeOutboundCIDRs.List = nil
	}
	r.IncludeOutboundCIDRs.List = sortedPrefixes(r.IncludeOutboundCIDRs.List)
	r.ExcludeOutboundCIDRs = sortedPrefixes(r.ExcludeOutboundCIDRs)
	return r, nil
}

// check refuses what no rule set can mean.
func (r Rules) check() error {
	for _, name := range slices.Concat(r.ExcludeInterfaces, r.RerouteInterfaces) {
		if err := CheckInterface(name); err != nil {
			return err
		}
	}
	for _, name := range r.ExcludeInterfaces {
		if slices.Contains(r.RerouteInterfaces, name) {
			return fmt.Errorf("interface %q is both excluded and rerouted: take it out of one list", name)
		}
	}
	if n := max(len(r.OwnerGroups.List), len(r.ExcludeOwnerGroups)); n > maxOwnerGroups {
		return fmt.Errorf("%d owner groups: at most %d are possible", n, maxOwnerGroups)
	}
	if !isLoopback4(r.Loopback) {
		return fmt.Errorf("%s is not an IPv4 loopback range: give one inside 127.0.0.0/8", r.Loopback)
	}
	if r.DNSPort == 0 || r.DNSPort == r.OutboundPort || r.DNSPort == r.InboundPort {
		return fmt.Errorf("the DNS proxy's port must be 1 to 65535 and none of the proxy's other two, not %d", r.DNSPort)
	}
	if r.Mode != Redirect && r.Mode != TProxy {
		return fmt.Errorf("%q is not an interception mode: choose %s or %s", r.Mode, Redirect, TProxy)
	}
	_, err := ParseFrom(string(r.From))
	return err
}

// ParseFrom reads since when to capture.
func ParseFrom(text string) (From, error) {
	if from := From(text); from == Always || from == ProxyReady {
		return from, nil
	}
	return "", fmt.Errorf("%q does not say since when to capture: choose %s or %s", text, Always, ProxyReady)
}

// interfaceName is what Istio takes for one; the kernel takes 15 characters.
var interfaceName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.-]{0,14}$`)

// CheckInterface refuses what cannot be the name of an interface.
func CheckInterface(name string) error {
	if !interfaceName.MatchString(name) {
		return fmt.Errorf("%q is not the name of an interface: give at most 15 letters, digits, '_', '.' and '-', of which the first is a letter", name)
	}
	return nil
}

// Translate returns the rules with every user and group ID replaced: of a pod
// with a user namespace of its own, by what they are on the machine. An ID that
// cannot be translated is an error.
func (r Rules) Translate(uid, gid func(uint32) (uint32, error)) (Rules, error) {
	var errs [4]error
	r.ProxyUIDs, errs[0] = translated(r.ProxyUIDs, uid)
	r.ProxyGIDs, errs[1] = translated(r.ProxyGIDs, gid)
	r.OwnerGroups.List, errs[2] = translated(r.OwnerGroups.List, gid)
	r.ExcludeOwnerGroups, errs[3] = translated(r.ExcludeOwnerGroups, gid)
	if err := errors.Join(errs[:]...); err != nil {
		return Rules{}, err
	}
	return r.Normalise() // sorted by the new numbers
}

func translated(ids []uint32, to func(uint32) (uint32, error)) ([]uint32, error) {
	var out []uint32
	for _, id := range ids {
		other, err := to(id)
		if err != nil {
			return nil, err
		}
		out = append(out, other)
	}
	return out, nil
}

// Digest names normalised rules: equal rules have equal digests.
func (r Rules) Digest() [32]byte {
	text, err := json.Marshal(r)
	if err != nil { // only for types json cannot hold, of which Rules has none
		panic(err)
	}
	return sha256.Sum256(text)
}

// ParsePorts reads a comma-separated list of ports (0 to 65535, no ranges), as
// Istio's annotations hold it. "*" means all where star is true.
func ParsePorts(text string, star bool) (Ports, error) {
	text = strings.TrimSpace(text)
	if text == "*" {
		if !star {
			return Ports{}, fmt.Errorf(`"*" is not allowed here: give ports, separated by commas`)
		}
		return Ports{All: true}, nil
	}
	var out Ports
	if text == "" {
		return out, nil
	}
	for item := range strings.SplitSeq(text, ",") {
		item = strings.TrimSpace(item)
		port, err := strconv.ParseUint(item, 10, 16)
		if err != nil {
			return Ports{}, fmt.Errorf("%q is not a port: give numbers from 0 to 65535, separated by commas, no ranges", item)
		}
		out.List = append(out.List, uint16(port))
	}
	return out, nil
}

// ParseCIDRs reads a comma-separated list of prefixes. "*" means every address
// where star is true.
func ParseCIDRs(text string, star bool) (CIDRs, error) {
	if text == "*" {
		if !star {
			return CIDRs{}, fmt.Errorf(`"*" is not allowed here: give address ranges such as 10.0.0.0/8, separated by commas`)
		}
		return CIDRs{All: true}, nil
	}
	var out CIDRs
	if text == "" {
		return out, nil
	}
	for item := range strings.SplitSeq(text, ",") {
		prefix, err := netip.ParsePrefix(item)
		if err != nil || prefix.Addr().Is4In6() {
			return CIDRs{}, fmt.Errorf("%q is not an address range: write it as 10.0.0.0/8 or 2001:db8::/32, separated by commas without spaces", item)
		}
		out.List = append(out.List, prefix)
	}
	return out, nil
}

// ParseID reads a UID or GID. 4294967295 is no ID (it means "unchanged").
func ParseID(text string) (uint32, error) {
	id, err := strconv.ParseUint(text, 10, 32)
	if err != nil || id == 1<<32-1 {
		return 0, fmt.Errorf("%q is not a user or group ID: give a number from 0 to 4294967294", text)
	}
	return uint32(id), nil
}

func uniqueInOrder(ids []uint32) []uint32 {
	var out []uint32
	for _, id := range ids {
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out
}

func sortedUnique[T cmp.Ordered](list []T) []T {
	if len(list) == 0 {
		return nil
	}
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}

func sortedPrefixes(prefixes []netip.Prefix) []netip.Prefix {
	if len(prefixes) == 0 {
		return nil
	}
	out := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		out = append(out, p.Masked())
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return slices.Compact(out)
}
