package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
)

// workload is something to measure, for each of several contestants.
type workload struct {
	name     string
	unit     string // "us" or "ns" in tables; samples are always nanoseconds
	backends []string
	rounds   int
	// slice is one contestant's turn in one round: samples by metric.
	slice func(name string) (map[string][]float64, error)
}

const (
	metricTotal   = "total"
	metricConnect = "connect" // connect() alone
)

func single(samples []float64) map[string][]float64 {
	return map[string][]float64{metricTotal: samples}
}

// measure plays one incarnation's rounds: in each, every contestant has one
// short turn, in a random order, so that a machine that changes its speed
// changes it for all.
func (w workload) measure(ctx context.Context, out *measured, incarnation int, progress func(done, of int)) error {
	order := slices.Clone(w.backends)
	const warmRounds = 2
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
		progress(round+1, warmRounds+w.rounds)
	}
	return nil
}

// sizes of a slice, small enough for all contestants to share one moment
const (
	sliceConns  = 100
	sliceWarm   = 10
	sliceEchoes = 300
	warmEchoes  = 60 // past TCP's quick acknowledgements
	sliceCalls  = 20 // batches
	echoBytes   = 64
	bulkBytes   = 16 << 10
)

// workloads of the connections' kind.
func (b *stage) connections() []workload {
	dial := job{Kind: jobDial, Warm: sliceWarm, Count: sliceConns, Size: echoBytes}
	echo := job{Kind: jobEcho, Warm: warmEchoes, Count: sliceEchoes, Size: echoBytes}
	bulk := job{Kind: jobEcho, Warm: warmEchoes, Count: sliceEchoes / 3, Size: bulkBytes}
	n := b.opts.rounds()
	all := []string{none, legacy, nft, sluice}
	guards := append(slices.Clone(all), sluiceNoTC)
	return []workload{
		b.overLeg("outbound_connect", n, dial, (*backend).outbound, append(slices.Clone(all), bystander)),
		b.overLeg("inbound_connect", n, dial, (*backend).inbound, append(slices.Clone(guards), sluiceTC, bystander)),
		b.overLeg("outbound_echo", n, echo, (*backend).outbound, all),
		b.overLeg("inbound_echo", n, echo, (*backend).inbound, append(slices.Clone(guards), sluiceTC)),
		b.overLeg("direct_connect", n, dial, (*backend).direct, guards),
		b.overLeg("direct_echo", n, echo, (*backend).direct, guards),
		b.overLeg("direct_echo_16k", n, bulk, (*backend).direct, guards),
	}
}

// overLeg is a workload of connections; backends that are missing are left out.
func (b *stage) overLeg(name string, rounds int, j job, legOf func(*backend) leg, names []string) workload {
	w := workload{name: name, unit: "us", rounds: rounds}
	for _, n := range names {
		if b.backends[n] != nil {
			w.backends = append(w.backends, n)
		}
	}
	w.slice = func(name string) (map[string][]float64, error) {
		r, err := legOf(b.backends[name]).run(j)
		if err != nil {
			return nil, err
		}
		if j.Kind == jobDial {
			return map[string][]float64{metricTotal: r.Total, metricConnect: r.Connect}, nil
		}
		return single(r.Total), nil
	}
	return w
}

// workloads of the bystander's kind: what a process outside the mesh pays.
func (b *stage) bystanders() []workload {
	var out []workload
	for _, c := range []call{callConnectTCP, callConnectUDP, callGetsockopt, callGetsockname, callGetpeername} {
		out = append(out, workload{
			name: "bystander_" + string(c), unit: "ns", rounds: b.opts.rounds(),
			backends: []string{withoutHooks, withHooks},
			slice: func(name string) (map[string][]float64, error) {
				r, err := b.callers[name].call(job{Kind: jobCalls, Call: c, Warm: 2, Count: sliceCalls, Addr: netip.MustParseAddrPort("198.18.0.1:80")})
				return single(r.Total), err
			},
		})
	}
	return out
}
