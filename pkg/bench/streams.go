package bench

import (
	"fmt"
	"strings"
	"time"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

var (
	streamCounts = []int{1, 8}
	clientCounts = []int{1, 8, 64}
)

const (
	streamTime = 100 * time.Millisecond
	rateTime   = 150 * time.Millisecond
)

// way is one of a workload's two directions of connecting.
type way struct {
	name string
	leg  func(*backend) leg
}

var ways = []way{{"outbound", (*backend).outbound}, {"inbound", (*backend).inbound}}

func streamSections() []section {
	streams := section{name: "streams", quick: -1, full: 5, open: openStreams}
	rates := section{name: "rates", quick: -1, full: 5, open: openRates}
	for _, way := range ways {
		for _, n := range streamCounts {
			for _, to := range []string{"up", "down"} {
				streams.workloads = append(streams.workloads, streamName(way, n, to))
			}
		}
	}
	for _, n := range clientCounts {
		rates.workloads = append(rates.workloads, rateName(n))
	}
	return []section{streams, rates}
}

func streamName(w way, n int, to string) string { return fmt.Sprintf("%s_bulk_%d_%s", w.name, n, to) }
func rateName(n int) string                     { return fmt.Sprintf("outbound_rate_%d", n) }

// openStreams: as much as goes through a few connections for a moment. "up" is
// from who connected.
func openStreams(s *stage) ([]workload, error) {
	defs := append(of(definitions(), floor, rival, ours), named(definitions(), noGuard)...)
	f, err := s.fleet(defs, world{rules: rules.Default()}, (*backend).prove)
	if err != nil {
		return nil, err
	}
	s.closing(f.Close)
	var out []workload
	for _, way := range ways {
		for _, n := range streamCounts {
			for _, to := range []string{"up", "down"} {
				j := job{Kind: jobStream, Clients: n, Time: streamTime, Down: to == "down"}
				out = append(out, workload{
					name: streamName(way, n, to), backends: f.names(defs), rounds: 3, ratios: throughputRatios(gbits),
					slice: func(name string) (sample, error) {
						r, err := way.leg(f[name]).run(j)
						if err != nil {
							return nil, err
						}
						return sample{gbits: {8 * r.Bytes / r.Total[0]}, cpuPerGB: {r.CPU / r.Bytes * 1e9}}, nil
					},
				})
			}
		}
	}
	return out, nil
}

// openRates: short connections by several clients at once, on every CPU, with
// TIME_WAIT as the kernel's defaults have it.
func openRates(s *stage) ([]workload, error) {
	defs := of(definitions(), floor, rival, ours)
	f, err := s.fleet(defs, world{rules: rules.Default(), noFar: true, asIs: true}, (*backend).prove)
	if err != nil {
		return nil, err
	}
	s.closing(f.Close)
	var out []workload
	for _, n := range clientCounts {
		out = append(out, workload{
			name: rateName(n), backends: f.names(defs), rounds: 3, ratios: throughputRatios(rate),
			slice: func(name string) (sample, error) {
				r, err := f[name].outbound().run(job{Kind: jobRate, Clients: n, Time: rateTime})
				if err != nil {
					return nil, err
				}
				if r.Failed > 0 {
					s.result.Notes[rateName(n)+", "+name] = fmt.Sprintf("connections failed, the last with %q", r.Failure)
				}
				return sample{
					rate: {float64(r.Done) / r.Total[0] * 1e9}, failures: {float64(r.Failed)}, cpu: {r.CPU / float64(max(r.Done, 1))},
				}, nil
			},
		})
	}
	return out, nil
}

func throughputRatios(what metric) func(*Result, *measured) {
	return func(r *Result, m *measured) {
		for _, def := range definitions() {
			if def.role != floor {
				r.set(stem(m.workload.name, def)+"_vs_none", over(m.p50(def.name, what), m.p50(none, what)))
			}
		}
		if strings.Contains(m.workload.name, "_bulk_") {
			r.set(m.workload.name+"_cpu_vs_none", over(m.p50(sluice, cpuPerGB), m.p50(none, cpuPerGB)))
		}
	}
}
