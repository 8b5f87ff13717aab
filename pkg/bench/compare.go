package bench

import "strings"

// compare derives a workload's ratios, each within a round.
func (r *Result) compare(m *measured) {
	total := func(name string) rounds { return m.p50(name, metricTotal) }
	name := m.workload.name
	switch {
	case strings.HasPrefix(name, "bystander_"):
		r.set(name+"_ns", minus(total(withHooks), total(withoutHooks)))
	case name == "enroll":
		kinds := m.cheaperFirst(legacy, nft)
		if len(kinds) > 0 {
			r.set("enroll_vs_iptables_restore", over(total(sluice), total(kinds[0])))
		}
		for _, kind := range kinds {
			r.set("enroll_vs_"+snake(kind)+"_restore", over(total(sluice), total(kind)))
		}
	case name == "outbound_connect" || name == "inbound_connect":
		r.compareAdded(m, metricTotal, name)
		r.compareAdded(m, metricConnect, name+"_call")
		r.set(name+"_bystander_ns", minus(total(bystander), total(none)))
	default:
		r.set(name+"_vs_none", over(total(sluice), total(none)))
		for _, other := range []string{sluiceNoTC, sluiceTC, legacy, nft} {
			r.set(name+"_"+snake(other)+"_vs_none", over(total(other), total(none)))
		}
	}
	r.set(name+"_guard_ns", minus(total(sluice), total(sluiceNoTC)))
}

// compareAdded is what Sluice adds over what iptables adds. The plain name is
// beside the cheaper of the two iptables: the harder comparison.
func (r *Result) compareAdded(m *measured, metric, name string) {
	p50 := func(backend string) rounds { return m.p50(backend, metric) }
	kinds := m.cheaperFirst(legacy, nft)
	for _, ours := range []string{sluice, sluiceNoTC, sluiceTC} {
		stem := name + "_added_"
		if ours != sluice {
			stem = name + "_" + snake(ours) + "_added_"
		}
		if len(kinds) > 0 {
			r.set(stem+"vs_iptables", added(p50(ours), p50(kinds[0]), p50(none)))
		}
		if ours == sluice {
			for _, kind := range kinds {
				r.set(stem+"vs_"+snake(kind), added(p50(ours), p50(kind), p50(none)))
			}
		}
		r.set(stem+"ns", minus(p50(ours), p50(none)))
	}
	for _, kind := range kinds {
		r.set(name+"_"+snake(kind)+"_added_ns", minus(p50(kind), p50(none)))
	}
}

// cheaperFirst returns those that were measured, by their median.
func (m *measured) cheaperFirst(a, b string) []string {
	one, two := m.p50(a, metricTotal).values, m.p50(b, metricTotal).values
	switch {
	case len(one) == 0 && len(two) == 0:
		return nil
	case len(one) == 0:
		return []string{b}
	case len(two) == 0:
		return []string{a}
	case median(two) < median(one):
		return []string{b, a}
	}
	return []string{a, b}
}

func snake(name string) string { return strings.ReplaceAll(name, "-", "_") }
