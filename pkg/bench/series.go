package bench

import "slices"

// series are all samples of a run, by workload and in the order of the run.
type series map[string]*measured

// measured is one workload's figures: contestant -> metric -> figures.
type measured struct {
	workload workload
	order    int
	by       map[string]map[string]*figures
}

// figures has one entry per round.
type figures struct{ p50, p90, min rounds }

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
		m = &measured{workload: w, order: len(s), by: map[string]map[string]*figures{}}
		s[w.name] = m
	}
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

func (m *measured) add(name string, samples map[string][]float64, incarnation int) {
	metrics := m.by[name]
	if metrics == nil {
		metrics = map[string]*figures{}
		m.by[name] = metrics
	}
	for metric, values := range samples {
		f := metrics[metric]
		if f == nil {
			f = &figures{}
			metrics[metric] = f
		}
		slices.Sort(values)
		f.p50.add(quantile(values, 0.5), incarnation)
		f.p90.add(quantile(values, 0.9), incarnation)
		f.min.add(values[0], incarnation)
	}
}

// p50 of every round; none for what was not measured.
func (m *measured) p50(name, metric string) rounds {
	if f := m.by[name][metric]; f != nil {
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
