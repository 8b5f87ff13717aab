package bench

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// ruleCounts are how many CIDRs a pod excludes.
var ruleCounts = []int{1, 10, 100, 1000, 10000}

func rulesSections() []section {
	return []section{{name: "rules", workloads: []string{"rules"}, open: openRules}}
}

// level is a contestant that is a backend at some count: "sluice/1000".
func level(name string, count int) string { return fmt.Sprintf("%s/%d", name, count) }

// manyRules exclude n networks, none of which is a destination of the benchmark.
func manyRules(n int) rules.Rules {
	r := rules.Default()
	for i := range n {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], 10<<24|uint32(i)<<8)
		r.ExcludeOutboundCIDRs = append(r.ExcludeOutboundCIDRs, netip.PrefixFrom(netip.AddrFrom4(a), 24))
	}
	return r
}

// openRules: an outbound connection that matches none of ever more rules. A quick
// run has Sluice alone, with the fewest and the most.
func openRules(s *stage) ([]workload, error) {
	defs, counts := append(of(definitions(), ours), of(definitions(), rival)...), ruleCounts
	if s.opts.Quick {
		defs, counts = of(defs, ours), []int{1, 10000}
		s.leaveOut("rules: 10, 100 and 1000 CIDRs, and firewalls", errLong)
	}
	all := fleet{}
	w := workload{name: "rules", rounds: 2 * s.opts.rounds(), ratios: rulesRatios}
	if !s.opts.Quick {
		w.rounds = s.opts.rounds()/3 + 2
	}
	for _, def := range defs {
		for _, count := range counts {
			f, err := s.fleet([]definition{def}, world{rules: manyRules(count), noFar: true}, (*backend).prove)
			if err != nil {
				return nil, err
			}
			s.closing(f.Close)
			if b := f[def.name]; b != nil {
				all[level(def.name, count)] = b
				w.backends = append(w.backends, level(def.name, count))
			}
		}
	}
	w.slice = func(name string) (sample, error) {
		r, err := all[name].outbound().run(job{Kind: jobDial, Warm: warmConns, Count: turnConns, Size: echoBytes})
		return sample{total: r.Total, connect: r.Connect}, err
	}
	return []workload{w}, nil
}

func rulesRatios(r *Result, m *measured) {
	for _, def := range of(definitions(), ours, rival) {
		for _, count := range ruleCounts[1:] {
			r.set(fmt.Sprintf("%s_%d_vs_1", stem("rules", def), count), over(m.p50(level(def.name, count), total), m.p50(level(def.name, 1), total)))
		}
	}
}
