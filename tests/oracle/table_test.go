package oracle

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// table is every rule, and what several of them do together.
var table = []struct {
	name   string
	slow   bool
	config config
}{
	{"default", true, defaults()},
	{"IPv4 only", true, config{rules.Default(), podKind{Families: only4}}},
	{"IPv6 only", true, config{rules.Default(), podKind{Families: only6}}},
	{"inbound by TC", true, config{rules.Default(), podKind{Inbound: datapath.InboundTC}}},

	{"a UID alone", false, with(func(r *rules.Rules) { r.ProxyGIDs = nil })},
	{"a GID alone", false, with(func(r *rules.Rules) { r.ProxyUIDs = nil })},
	{"other IDs", false, with(func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = ids(1338), ids(1339) })},
	{"two UIDs", false, with(func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = ids(1338, 1337), nil })},
	{"two GIDs", false, with(func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = nil, ids(1339, 1337) })},
	{"two of each", false, with(func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = ids(1337, 1338), ids(1337, 1339) })},
	{"root is the proxy", false, with(func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = ids(0), ids(1337) })},
	{"other ports", false, with(func(r *rules.Rules) { r.OutboundPort, r.InboundPort, r.DNSPort = 16001, 16006, 16053 })},

	{"an excluded outbound port", true, with(func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{80, 15008} })},
	{"port 53 excluded", false, with(func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{53}; r.DNS = true })},
	{"the proxy's ports excluded", false, with(func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{15001, 15006} })},
	{"an included outbound port", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{}
		r.IncludeOutboundPorts = []uint16{81, 15008}
	})},
	{"a port included and excluded", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{}
		r.IncludeOutboundPorts = []uint16{80, 81}
		r.ExcludeOutboundPorts = []uint16{81}
	})},
	{"an included port to an excluded range", false, with(func(r *rules.Rules) {
		r.IncludeOutboundPorts = []uint16{80}
		r.ExcludeOutboundCIDRs = prefixes("10.99.0.0/24", "fd99::/64")
	})},
	{"an included port, and loopback included", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.2/32")}
		r.IncludeOutboundPorts = []uint16{80}
	})},

	{"no range", false, with(func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} })},
	{"ranges", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs.All = false
		r.IncludeOutboundCIDRs.List = prefixes("10.96.0.0/16", "fd96::/64")
	})},
	{"excluded ranges", false, with(func(r *rules.Rules) { r.ExcludeOutboundCIDRs = prefixes("10.96.0.0/16", "fd99::1/128") })},
	{"a long include in a short exclude", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("10.99.0.1/32", "fd99::1/128", "10.96.0.0/16")}
		r.ExcludeOutboundCIDRs = prefixes("10.99.0.0/16", "fd99::/16")
	})},
	{"a long exclude in a short include", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("0.0.0.0/0", "::/0")}
		r.ExcludeOutboundCIDRs = prefixes("10.99.0.1/32", "fd99::1/128")
	})},
	{"own addresses in ranges", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("10.99.0.2/31", "fd99::2/127", "127.0.0.0/8")}
	})},
	{"loopback included", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.2/32", "10.99.0.0/24", "fd99::/64")}
	})},
	{"loopback included, DNS", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.2/32", "10.99.0.0/24", "fd99::/64")}
		r.DNS = true
	})},
	{"loopback included, two of each", false, with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.2/32", "10.0.0.0/8", "fd00::/8")}
		r.ProxyUIDs, r.ProxyGIDs = ids(1337, 1338), ids(1337, 1339)
	})},
	{"loopback of IPv6 included", false, with(func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("::1/128", "fd99::/64")} })},
	{"a wide loopback", false, with(func(r *rules.Rules) { r.Loopback = netip.MustParsePrefix("127.0.0.0/8") })},
	{"another loopback", false, with(func(r *rules.Rules) {
		r.Loopback = netip.MustParsePrefix("127.0.0.2/32")
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.0/8")}
	})},

	{"an owner group", false, with(func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: ids(2000)} })},
	{"two owner groups", false, with(func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: ids(2000, 1000)} })},
	{"no owner group", false, with(func(r *rules.Rules) { r.OwnerGroups = rules.Groups{} })},
	{"an owner group excluded", false, with(func(r *rules.Rules) { r.ExcludeOwnerGroups = ids(2000, 0) })},
	{"owner groups and DNS", false, with(func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: ids(2000)}; r.DNS = true })},
	{"the proxy's group is an owner group", false, with(func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: ids(1337)} })},

	{"DNS", true, with(func(r *rules.Rules) { r.DNS = true })},
	{"DNS, two UIDs", false, with(func(r *rules.Rules) { r.DNS = true; r.ProxyUIDs, r.ProxyGIDs = ids(1337, 1338), nil })},
	{"DNS, a GID alone", false, with(func(r *rules.Rules) { r.DNS = true; r.ProxyUIDs = nil })},
	{"DNS, two GIDs", false, with(func(r *rules.Rules) { r.DNS = true; r.ProxyUIDs, r.ProxyGIDs = nil, ids(1337, 1339) })},
	{"DNS, nothing else", false, with(func(r *rules.Rules) { r.DNS = true; r.IncludeOutboundCIDRs = rules.CIDRs{} })},
	{"DNS, everything excluded", false, with(func(r *rules.Rules) { r.DNS = true; r.ExcludeOutboundCIDRs = prefixes("0.0.0.0/0", "::/0") })},
	{"DNS and a wide loopback", false, with(func(r *rules.Rules) { r.DNS = true; r.Loopback = netip.MustParsePrefix("127.0.0.0/8") })},

	{"excluded inbound ports", false, with(func(r *rules.Rules) { r.ExcludeInboundPorts = []uint16{80, 15006} })},
	{"included inbound ports", false, with(func(r *rules.Rules) {
		r.IncludeInboundPorts = rules.Ports{List: []uint16{80, 15008, 15021}}
		r.ExcludeInboundPorts = []uint16{80}
	})},
	{"no inbound port", false, with(func(r *rules.Rules) { r.IncludeInboundPorts = rules.Ports{} })},

	{"an excluded interface", true, with(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"net1"} })},
	{"the first interface excluded", true, with(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"eth0"} })},
	{"lo excluded", false, with(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"lo"} })},
	{"an excluded interface and DNS", false, with(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"net1", "nosuch"}; r.DNS = true })},

	{"a rerouted interface", true, reroutes(func(*rules.Rules) {})},
	{"a rerouted interface, IPv4 only", false, config{reroutes(func(*rules.Rules) {}).Rules, podKind{Families: only4}}},
	{"a rerouted interface, IPv6 only", false, config{reroutes(func(*rules.Rules) {}).Rules, podKind{Families: only6}}},
	{"a rerouted interface, inbound by TC", false, config{reroutes(func(*rules.Rules) {}).Rules, podKind{Inbound: datapath.InboundTC}}},
	{"a rerouted interface, ranges", false, reroutes(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("10.96.0.0/16", "10.99.0.2/32", "fd96::/64", "fd99::2/128")}
	})},
	{"a rerouted interface, no range", false, reroutes(func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} })},
	{"a rerouted interface, excludes that do not matter to it", false, reroutes(func(r *rules.Rules) {
		r.ExcludeOutboundCIDRs = prefixes("10.96.0.0/16", "fd99::/64")
		r.ExcludeOutboundPorts = []uint16{81, 15008}
		r.ExcludeInboundPorts = []uint16{80}
		r.ExcludeOwnerGroups = ids(1000)
	})},
	{"a rerouted interface, excludes within ranges", false, reroutes(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("10.99.0.0/16", "fd99::/64")}
		r.ExcludeOutboundCIDRs = prefixes("10.99.0.1/32", "fd99::1/128")
		r.IncludeOutboundPorts = []uint16{80}
	})},
	{"a rerouted interface and an excluded one", false, reroutes(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"net1"} })},
	{"a rerouted interface, other ports, DNS", false, reroutes(func(r *rules.Rules) {
		r.OutboundPort, r.InboundPort, r.DNSPort = 16001, 16006, 16053
		r.DNS = true
	})},
	{"the second interface rerouted", false, with(func(r *rules.Rules) { r.RerouteInterfaces = []string{"net1", "nosuch"} })},
	{"the machine's interface excluded", false, with(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"vm0"} })},

	{"TPROXY", true, byTProxy(func(*rules.Rules) {})},
	{"TPROXY, IPv4 only", false, config{byTProxy(func(*rules.Rules) {}).Rules, podKind{Families: only4}}},
	{"TPROXY, IPv6 only", false, config{byTProxy(func(*rules.Rules) {}).Rules, podKind{Families: only6}}},
	{"TPROXY, inbound by TC", false, config{byTProxy(func(*rules.Rules) {}).Rules, podKind{Inbound: datapath.InboundTC}}},
	{"TPROXY, two of each", false, byTProxy(func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = ids(1338, 1337), ids(1337, 1339) })},
	{"TPROXY, included inbound ports", false, byTProxy(func(r *rules.Rules) { r.IncludeInboundPorts = rules.Ports{List: []uint16{80, 15008, 15021}} })},
	{"TPROXY, no inbound port", false, byTProxy(func(r *rules.Rules) { r.IncludeInboundPorts = rules.Ports{} })},
	{"TPROXY, an excluded interface", false, byTProxy(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"net1"} })},
	{"TPROXY, lo excluded", false, byTProxy(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"lo"} })},
	{"TPROXY, a UID alone", false, byTProxy(func(r *rules.Rules) { r.ProxyGIDs = nil })},
	{"TPROXY, a GID alone", false, byTProxy(func(r *rules.Rules) { r.ProxyUIDs = nil })},
	{"TPROXY, a GID alone and an excluded interface", false, byTProxy(func(r *rules.Rules) { r.ProxyUIDs, r.ExcludeInterfaces = nil, []string{"eth0"} })},
	{"TPROXY, root is the proxy", false, byTProxy(func(r *rules.Rules) { r.ProxyUIDs = ids(0) })},
	{"TPROXY, excluded ports", false, byTProxy(func(r *rules.Rules) {
		r.ExcludeOutboundPorts = []uint16{80, 15006, 15008}
		r.ExcludeInboundPorts = []uint16{81, 15001}
	})},
	{"TPROXY, ports and ranges", false, byTProxy(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("10.96.0.0/16", "fd96::/64")}
		r.IncludeOutboundPorts = []uint16{81}
		r.ExcludeOutboundCIDRs = prefixes("10.98.0.0/16", "fd98::/64")
	})},
	{"TPROXY, loopback included", false, byTProxy(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.2/32", "10.99.0.0/24", "fd99::/64")}
	})},
	{"TPROXY, DNS", false, byTProxy(func(r *rules.Rules) { r.DNS = true })},
	{"TPROXY, a rerouted interface", false, byTProxy(func(r *rules.Rules) { r.RerouteInterfaces = []string{"vm0"} })},
	{"TPROXY, a rerouted interface, ranges", false, byTProxy(func(r *rules.Rules) {
		r.RerouteInterfaces = []string{"vm0"}
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("10.96.0.0/16", "fd96::/64")}
	})},
	{"TPROXY, a wide loopback", false, byTProxy(func(r *rules.Rules) { r.Loopback = netip.MustParsePrefix("127.0.0.0/8") })},
}

// reroutes adds a rerouted interface.
func reroutes(change func(*rules.Rules)) config {
	return with(func(r *rules.Rules) { r.RerouteInterfaces = []string{"vm0"}; change(r) })
}

// byTProxy is with, in TPROXY mode.
func byTProxy(change func(*rules.Rules)) config {
	return with(func(r *rules.Rules) { r.Mode = rules.TProxy; change(r) })
}

func ids(list ...uint32) []uint32 { return list }

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

// TestTable compares each line of the table, by both backends of iptables.
func TestTable(t *testing.T) {
	l := newLab(t)
	ran := 0
	for _, row := range table {
		t.Run(row.name, func(t *testing.T) {
			ran++
			r, err := l.compare(request{config: row.config, iptables: []redirection{legacy, nft}, slow: row.slow})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.differences) > 0 {
				t.Error(r)
			}
		})
	}
	if t.Failed() || ran < len(table) {
		return
	}
	for _, d := range listed {
		if l.used[d.id] == 0 && d.id != "port-taken" { // that one is chance
			t.Errorf("no probe of the table has the listed difference %q: take it off the list", d.id)
		}
	}
}

func TestOneConfiguration(t *testing.T) {
	if *oneConfig == "" {
		t.Skip("say which: -oracle.config='{}' is the default one")
	}
	c, err := parseConfig(*oneConfig)
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	r, err := l.compare(request{config: c, iptables: []redirection{legacy, nft}, slow: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d probes; with listed differences: %v", r.probes, l.used)
	if len(r.differences) > 0 {
		t.Error(r)
	}
}

// TestWithoutRedirection shows that every probe gets where it is sent by itself,
// so that its going elsewhere is the rules' doing.
func TestWithoutRedirection(t *testing.T) {
	for _, f := range []families{dualStack, only4, only6} {
		c := config{rules.Default(), podKind{Families: f}}
		all := probes(c, true)
		got, err := newSite(t, nothing, f).try(c, "", all)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			o := got[p]
			if o.First != nil {
				checkPlain(t, f, p, p.To, *o.First)
				p.To = p.Then
			}
			if o.Result != "not tried" {
				checkPlain(t, f, p, p.To, o)
			}
		}
	}
}

func checkPlain(t *testing.T, f families, p probe, to netip.AddrPort, o outcome) {
	t.Helper()
	results, by := plainly(f, p, to)
	if !slices.Contains(results, o.Result) || o.By != by {
		t.Errorf("%q: %s: %s, want %v by %q", f, p, o, results, by)
	}
	if o.By != "" && (!strings.Contains(o.Peer, to.String()) && !to.Addr().IsUnspecified() || o.ByPeer != o.Name) {
		if !p.UDP || o.ByPeer == "" {
			t.Errorf("%q: %s: the ends do not agree: %s", f, p, o)
		}
	}
}

// plainly is what becomes of a probe by routes and servers alone.
func plainly(f families, p probe, to netip.AddrPort) (results []string, by string) {
	a, port := to.Addr(), to.Port()
	loopback := a.IsLoopback() || a.IsUnspecified()
	local := isLocal(a)
	switch {
	case slices.Contains(lost, a), f != dualStack && a.Is4() != (f == only4) && !loopback:
		return []string{"ENETUNREACH", "EADDRNOTAVAIL", "EHOSTUNREACH"}, ""
	case p.Source.IsValid() && p.Source.IsLoopback() && a.Is4() && !local:
		return []string{"EINVAL"}, ""
	case slices.Contains(hole, a), p.MayVanish && p.Source.IsValid(), p.Device != "" && (loopback || slices.Contains(other, a)):
		return []string{"timed out", "EHOSTUNREACH", "ENETUNREACH"}, ""
	case port == nobodyPort:
		return []string{"ECONNREFUSED"}, ""
	case port == loPort && p.From != inPod, port == loPort && a != lo[0] && a != lo[3] && !a.IsUnspecified():
		return []string{"ECONNREFUSED"}, ""
	}
	results = []string{"connected"}
	if p.UDP {
		results = []string{"answered"}
	}
	name := map[uint16]string{15001: "proxy:out", 15006: "proxy:in", 15053: "proxy:dns", loPort: "pod-lo:9080"}[port]
	switch {
	case slices.Contains(other, a):
		name = fmt.Sprint("far2:", port)
	case slices.Contains(far, a):
		name = fmt.Sprint("far:", port)
	case slices.Contains(machine, a):
		name = fmt.Sprint("vm:", port)
	case name == "":
		name = fmt.Sprint("pod:", port)
	}
	return results, name
}
