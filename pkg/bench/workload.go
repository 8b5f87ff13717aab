package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
)

// workload is something to measure, for each of several contestants.
type workload struct {
	name     string
	backends []string // the contestants; the first is what others are compared with
	rounds   int      // of an incarnation; 0: as the run has it
	cold     bool     // without rounds that do not count
	// slice is one contestant's turn in one round.
	slice func(name string) (sample, error)
	// ratios derives from the rounds what is compared within them; may be nil.
	ratios func(r *Result, m *measured)
}

// sample is what a turn gave: by metric, one value or many.
type sample map[metric][]float64

// metric is what is measured. Durations are nanoseconds.
type metric string

const (
	total    metric = "total"
	connect  metric = "connect"    // connect() alone
	cpu      metric = "cpu"        // CPU time of both ends, for one operation
	p99      metric = "p99"        // of the requests of a turn
	gbits    metric = "throughput" // Gbit/s
	cpuPerGB metric = "cpu-per-GB" // nanoseconds for 10^9 bytes
	rate     metric = "rate"       // per second
	failures metric = "failures"   // of a turn
	held     metric = "held"       // connections at once
	memory   metric = "memory"     // bytes of kernel memory for one, by /proc/meminfo
	charged  metric = "charged"    // the same, by the memory cgroup
)

// units, for tables.
func (m metric) unit() (scale float64, unit string) {
	switch m {
	case gbits:
		return 1, "Gbit/s"
	case rate:
		return 1, "1/s"
	case failures, held:
		return 1, ""
	case memory, charged:
		return 1 << 10, "KiB"
	case cpuPerGB:
		return 1e6, "ms"
	}
	return 1e3, "us"
}

// measure plays one incarnation's rounds: in each, every contestant has one
// short turn, in a random order, so that a machine that changes its speed
// changes it for all.
func (w workload) measure(ctx context.Context, out *measured, incarnation int) error {
	order := slices.Clone(w.backends)
	warmRounds := 1
	if w.cold {
		warmRounds = 0
	}
	for round := range warmRounds + w.rounds {
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, name := range order {
			if err := ctx.Err(); err != nil {
				return err
			}
			samples, err := w.slice(name)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				return fmt.Errorf("%s, %s: %w", w.name, name, err)
			}
			if round >= warmRounds {
				out.add(name, samples, incarnation)
			}
		}
	}
	return nil
}

// sizes of a turn, small enough for all contestants to share one moment
const (
	turnConns  = 100
	warmConns  = 10
	turnEchoes = 300
	warmEchoes = 60 // past TCP's quick acknowledgements
	turnCalls  = 20 // batches
	echoBytes  = 64
	pageBytes  = 4 << 10
	bulkBytes  = 16 << 10
)

// leg is slower where it is Sluice's, in any way, if the run is to be noticed.
func (s *stage) leg(b *backend, legOf func(*backend) leg) leg {
	l := legOf(b)
	if b.role == ours || b.role == variant {
		l.delay = s.opts.Delay
	}
	return l
}

// overLeg is a workload of connections; backends that are missing are left out.
func (s *stage) overLeg(name string, j job, legOf func(*backend) leg, f fleet, defs []definition) workload {
	return workload{name: name, backends: f.names(defs), ratios: standardRatios, slice: func(name string) (sample, error) {
		r, err := s.leg(f[name], legOf).run(j)
		if err != nil {
			return nil, err
		}
		out := sample{total: r.Total, cpu: {r.CPU / float64(j.Warm+j.Count)}}
		if j.Kind == jobDial {
			out[connect] = r.Connect
		}
		return out, nil
	}}
}
