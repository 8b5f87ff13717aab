package bench

import (
	"maps"
	"math"
	"math/rand/v2"
	"slices"

	"golang.org/x/perf/benchmath"
)

// Estimate is a median over rounds and its 95 % interval.
type Estimate struct {
	Value float64 `json:"value"`
	Low   float64 `json:"low"`
	High  float64 `json:"high"`
}

// quantile of sorted values, between the two nearest.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	lower := int(at)
	if lower+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[lower] + (at-float64(lower))*(sorted[lower+1]-sorted[lower])
}

func median(values []float64) float64 {
	return quantile(slices.Sorted(slices.Values(values)), 0.5)
}

// clusters are the rounds of each incarnation, without those that have no figure.
func (r rounds) clusters() (out [][]float64) {
	groups := map[int][]float64{}
	for i, v := range r.values {
		if !math.IsNaN(v) && !math.IsInf(v, 0) {
			groups[r.incarnation[i]] = append(groups[r.incarnation[i]], v)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(groups)) {
		out = append(out, groups[k])
	}
	return out
}

// units are what is independent of each other: the medians of the incarnations,
// or the rounds where there is but one.
func (r rounds) units() (out []float64) {
	clusters := r.clusters()
	if len(clusters) == 1 {
		return clusters[0]
	}
	for _, c := range clusters {
		out = append(out, median(c))
	}
	return out
}

// alike is the probability of samples that differ as much if the two were the
// same: benchstat's test (Mann-Whitney U). NaN where one has so few samples that no
// difference could be shown.
func alike(a, b []float64) float64 {
	const fewest = 4
	if min(len(a), len(b)) < fewest {
		return math.NaN()
	}
	t := benchmath.DefaultThresholds
	return benchmath.AssumeNothing.Compare(benchmath.NewSample(a, &t), benchmath.NewSample(b, &t)).P
}

// estimate draws incarnations, and rounds within them, again and again (a
// bootstrap in two stages): rounds of one incarnation resemble each other, and
// an interval that ignored it would be too narrow.
func estimate(r rounds) Estimate {
	if len(r.values) == 0 {
		return Estimate{}
	}
	clusters := r.clusters()
	if len(clusters) == 0 {
		return Estimate{}
	}
	const draws = 1000
	random := rand.New(rand.NewPCG(1, 2)) // the same result for the same samples
	medians := make([]float64, draws)
	for i := range medians {
		var sample []float64
		for range clusters {
			c := clusters[random.IntN(len(clusters))]
			for range c {
				sample = append(sample, c[random.IntN(len(c))])
			}
		}
		medians[i] = median(sample)
	}
	slices.Sort(medians)
	return Estimate{median(slices.Concat(clusters...)), quantile(medians, 0.025), quantile(medians, 0.975)}
}
