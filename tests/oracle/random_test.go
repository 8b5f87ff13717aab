package oracle

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// draw makes the configuration of a seed.
func draw(seed uint64) config {
	d := drawer{rand.New(rand.NewPCG(seed, 0))}
	c := defaults()
	r := &c.Rules
	if d.chance(40) {
		for {
			r.ProxyUIDs, r.ProxyGIDs = some(d, 2, ids(1337, 1338, 0)), some(d, 2, ids(1337, 1339, 2000))
			if len(r.ProxyUIDs)+len(r.ProxyGIDs) > 0 {
				break
			}
		}
	}
	if d.chance(10) {
		r.OutboundPort, r.InboundPort, r.DNSPort = 16001, 16006, 16053
	}
	anyPort := slices.Concat(ports, []uint16{nobodyPort, loPort})
	if r.IncludeInboundPorts.All = d.chance(60); !r.IncludeInboundPorts.All {
		r.IncludeInboundPorts.List = some(d, 4, anyPort)
	}
	r.ExcludeInboundPorts = some(d, 2, anyPort)
	if d.chance(40) {
		r.ExcludeOutboundPorts = some(d, 3, anyPort)
	}
	if d.chance(40) {
		r.IncludeOutboundPorts = some(d, 3, anyPort)
	}
	if r.IncludeOutboundCIDRs.All = d.chance(40); !r.IncludeOutboundCIDRs.All {
		r.IncludeOutboundCIDRs.List = d.ranges(4)
	}
	if d.chance(50) {
		r.ExcludeOutboundCIDRs = d.ranges(3)
	}
	groups := ids(0, 1000, 1337, 1339, 2000, 2001)
	if r.OwnerGroups.All = d.chance(70); !r.OwnerGroups.All {
		r.OwnerGroups.List = some(d, 3, groups)
	}
	if d.chance(30) {
		r.ExcludeOwnerGroups = some(d, 2, groups)
	}
	if d.chance(20) {
		r.Loopback = some1(d, prefixes("127.0.0.0/8", "127.0.0.2/32", "127.0.0.0/30", "127.0.0.4/30", "127.128.0.0/9"))
	}
	r.DNS = d.chance(40)
	if d.chance(20) {
		r.ExcludeInterfaces = some(d, 2, []string{"eth0", "net1", "vm0", "lo", "nosuch0"})
	}
	if d.chance(30) {
		r.RerouteInterfaces = slices.DeleteFunc(some(d, 2, []string{"vm0", "vm0", "net1", "nosuch1"}), func(name string) bool {
			return slices.Contains(r.ExcludeInterfaces, name)
		})
	}
	if d.chance(25) {
		c.Inbound = datapath.InboundTC
	}
	c.Families = some1(d, []families{dualStack, dualStack, dualStack, dualStack, only4, only6})
	if d.chance(30) {
		r.Mode = rules.TProxy
	}
	return c
}

type drawer struct{ *rand.Rand }

func (d drawer) chance(percent int) bool { return d.IntN(100) < percent }

func some1[T any](d drawer, of []T) T { return of[d.IntN(len(of))] }

// some draws at most n different ones, in any order.
func some[T any](d drawer, n int, of []T) []T {
	of = slices.Clone(of)
	d.Shuffle(len(of), func(i, j int) { of[i], of[j] = of[j], of[i] })
	return of[:d.IntN(n+1)]
}

// ranges are around the addresses that are probed, or are hit by none.
func (d drawer) ranges(n int) (out []netip.Prefix) {
	for range d.IntN(n + 1) {
		a := some1(d, concat(own, farAll, lo, lost, hole, addrs("10.50.0.1", "fd50::1")))
		bits := some1(d, []int{0, 8, 12, 16, 24, 30, 31, 32, 32, 32})
		if a.Is6() {
			bits = some1(d, []int{0, 8, 16, 64, 126, 127, 128, 128, 128})
		}
		out = append(out, netip.PrefixFrom(a, bits).Masked())
	}
	return out
}

// TestRandomConfigurations draws -oracle.n of them, shrinks the first that
// differs, and says how to run it again.
func TestRandomConfigurations(t *testing.T) {
	l := newLab(t)
	start := time.Now()
	probes, tproxy := 0, 0
	t.Logf("seeds %d to %d", *firstSeed, *firstSeed+uint64(*randomN)-1)
	for i := range *randomN {
		seed := *firstSeed + uint64(i)
		c := draw(seed)
		if c.byTProxy() {
			tproxy++
		}
		q := request{config: c, iptables: []redirection{[]redirection{legacy, nft}[i%2]}}
		r, err := l.compare(q)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		probes += r.probes * 3
		if len(r.differences) > 0 {
			t.Logf("seed %d: %s\nlooking for a smaller one", seed, r)
			t.Fatalf("seed %d: %s", seed, l.shrink(r))
		}
		if (i+1)%20 == 0 {
			t.Logf("%d of %d configurations, %d probes, %v, no unlisted difference", i+1, *randomN, probes, time.Since(start).Round(time.Second))
		}
	}
	t.Logf("%d of them in TPROXY mode; with listed differences: %v", tproxy, l.used)
}

// shrink looks for the smallest configuration that still differs.
func (l *lab) shrink(r report) report {
	if again, err := l.compare(r.request); err != nil || len(again.differences) == 0 {
		r.differences = append([]string{"NOT REPEATED by a second run of the same configuration"}, r.differences...)
		return r
	}
	for tries := 0; tries < 200; {
		smaller := false
		for _, c := range simpler(r.config) {
			q := r.request
			q.config = c
			tries++
			if s, err := l.compare(q); err == nil && len(s.differences) > 0 {
				r, smaller = s, true
				break
			}
		}
		if !smaller {
			break
		}
	}
	return r
}

// simpler are the configurations with one field at its default, or one item of a
// list less.
func simpler(c config) (out []config) {
	if c.Families != dualStack {
		out = append(out, config{c.Rules, podKind{Inbound: c.Inbound}})
	}
	if c.Inbound != "" {
		out = append(out, config{c.Rules, podKind{Families: c.Families}})
	}
	was, is := fields(rules.Default()), fields(c.Rules)
	add := func(name string, value any) {
		changed := fields(c.Rules)
		changed[name] = json.RawMessage(asJSON(value))
		if s, err := parseConfig(asJSON(changed)); err == nil {
			s.podKind = c.podKind
			if _, err := s.Rules.Normalise(); err == nil {
				out = append(out, s)
			}
		}
	}
	for name, value := range is {
		if string(value) != string(was[name]) {
			add(name, was[name])
		}
	}
	for name, value := range is {
		var list []any
		var set struct {
			List []any `json:"list"`
		}
		if json.Unmarshal(value, &list) == nil {
			for i := range list {
				add(name, slices.Delete(slices.Clone(list), i, i+1))
			}
		} else if json.Unmarshal(value, &set) == nil {
			for i := range set.List {
				add(name, map[string]any{"list": slices.Delete(slices.Clone(set.List), i, i+1)})
			}
		}
	}
	return out
}
