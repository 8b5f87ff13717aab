package bench

import "slices"

// series are all samples of a run, by workload and in the order of the run.
type series map[string]*measured

// measured is one workload's figures, by contestant.
type measured struct {
	workload workload
	order    int
	by       map[string]map[metric]*figures
}

// figures has one entry per round, and all samples of each incarnation: tails
// need more samples than a round has.
type figures struct {
	p50, p90 rounds
	all      map[int][]float64
}

// rounds is one figure of every round, with the incarnation it belongs to.
type rounds struct {
	values      []float64
	incarnation []int
}

func (r *rounds) add(value float64, incarnation int) {
	r.values = append(r.values, value)
	r.incarnation = append(r.incarnation, incarnation)
}

func (s series) of(w workload) *measured {
	m := s[w.name]
	if m == nil {
		m = &measured{order: len(s), by: map[string]map[metric]*figures{}}
		s[w.name] = m
	}
	m.workload = w
	return m
}

// sorted are the workloads as they were measured.
func (s series) sorted() []*measured {
	out := make([]*measured, len(s))
	for _, m := range s {
		out[m.order] = m
	}
	return out
}

func (m *measured) add(name string, samples sample, incarnation int) {
	metrics := m.by[name]
	if metrics == nil {
		metrics = map[metric]*figures{}
		m.by[name] = metrics
	}
	for what, values := range samples {
		if len(values) == 0 {
			continue
		}
		f := metrics[what]
		if f == nil {
			f = &figures{all: map[int][]float64{}}
			metrics[what] = f
		}
		slices.Sort(values)
		f.p50.add(quantile(values, 0.5), incarnation)
		f.p90.add(quantile(values, 0.9), incarnation)
		f.all[incarnation] = append(f.all[incarnation], values...)
	}
}

// tail is a quantile that takes so many samples: the median of the incarnations',
// or that of all samples where an incarnation has too few. 0 if all have too few.
func (f *figures) tail(q float64, least int) float64 {
	var together, each []float64
	enough := true
	for _, values := range f.all {
		together = append(together, values...)
		each = append(each, quantile(slices.Sorted(slices.Values(values)), q))
		enough = enough && len(values) >= least
	}
	switch {
	case enough:
		return median(each)
	case len(together) >= least:
		return quantile(slices.Sorted(slices.Values(together)), q)
	}
	return 0
}

func (f *figures) least() float64 {
	var least []float64
	for _, values := range f.all {
		least = append(least, slices.Min(values))
	}
	return slices.Min(least)
}

// samples is how many there are.
func (f *figures) samples() (n int) {
	for _, values := range f.all {
		n += len(values)
	}
	return n
}

// p50 of every round; none for what was not measured.
func (m *measured) p50(name string, what metric) rounds {
	if f := m.by[name][what]; f != nil {
		return f.p50
	}
	return rounds{}
}

// combine makes one value of each round's values. Without one of the series
// there is nothing to combine.
func combine(f func(v []float64) float64, all ...rounds) rounds {
	var out rounds
	for i := range all[0].values {
		v := make([]float64, len(all))
		for k, r := range all {
			if len(r.values) != len(all[0].values) {
				return rounds{}
			}
			v[k] = r.values[i]
		}
		out.add(f(v), all[0].incarnation[i])
	}
	return out
}

func minus(a, b rounds) rounds {
	return combine(func(v []float64) float64 { return v[0] - v[1] }, a, b)
}

func over(a, b rounds) rounds {
	return combine(func(v []float64) float64 { return v[0] / v[1] }, a, b)
}

// added is what ours adds to the floor, over what theirs does.
func added(ours, theirs, floor rounds) rounds {
	return combine(func(v []float64) float64 { return (v[0] - v[2]) / (v[1] - v[2]) }, ours, theirs, floor)
}
