package bench

import (
	"slices"
	"strings"
)

// standardRatios are those of a workload of connections: what each backend is of
// the floor, and what it adds to it beside what iptables adds.
func standardRatios(r *Result, m *measured) {
	name := m.workload.name
	p50 := func(backend string) rounds { return m.p50(backend, total) }
	for _, def := range definitions() {
		if def.role != floor {
			r.set(stem(name, def)+"_vs_none", over(p50(def.name), p50(none)))
		}
	}
	r.set(name+"_guard_ns", minus(p50(sluice), p50(noGuard)))
	r.set(name+"_bystander_ns", minus(p50(bystander), p50(none)))
	if strings.HasSuffix(name, "_connect") {
		r.setAdded(m, total, name)
		r.setAdded(m, connect, name+"_call")
	}
}

// setAdded is what Sluice adds over what iptables adds. The plain name is beside
// the cheaper of the two iptables: the harder comparison.
func (r *Result) setAdded(m *measured, what metric, name string) {
	defs := definitions()
	cheapest := m.cheapest(of(defs, rival), func(d definition) bool { return d.iptables })
	for _, d := range of(defs, ours, variant) {
		r.set(stem(name, d)+"_added_vs_iptables", added(m.p50(d.name, what), m.p50(cheapest, what), m.p50(none, what)))
	}
	for _, d := range of(defs, rival) {
		r.set(name+"_added_vs_"+snake(d.name), added(m.p50(sluice, what), m.p50(d.name, what), m.p50(none, what)))
	}
	for _, d := range of(defs, rival, ours, variant) {
		r.set(stem(name, d)+"_added_ns", minus(m.p50(d.name, what), m.p50(none, what)))
	}
}

// stem is the name of a figure: Sluice's own have the plain one.
func stem(name string, d definition) string {
	if d.role == ours {
		return name
	}
	return name + "_" + snake(d.name)
}

// cheapest is the one with the lowest median of those that were measured.
func (m *measured) cheapest(defs []definition, wanted func(definition) bool) string {
	names := []string{}
	for _, d := range defs {
		if wanted(d) && len(m.p50(d.name, total).values) > 0 {
			names = append(names, d.name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return slices.MinFunc(names, func(a, b string) int {
		if median(m.p50(a, total).values) < median(m.p50(b, total).values) {
			return -1
		}
		return 1
	})
}

func snake(name string) string { return strings.NewReplacer("-", "_", "/", "_").Replace(name) }
