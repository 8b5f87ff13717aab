package bench

import (
	"errors"
	"fmt"
	"time"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

func setupSections() []section {
	return []section{
		{name: "enroll", workloads: []string{"enroll"}, quick: 3, open: openEnroll},
		{name: "pod set-up", workloads: []string{"enroll_100", "cni_add", "cni_add_100"}, quick: -1, full: 4, open: openSetup},
	}
}

// setups are contestants of pod set-up: what writes one pod's redirection into a
// namespace that is ready and empty, as a runtime hands it to a CNI plugin.
func setups() []definition {
	return append(of(definitions(), ours, rival), named(definitions(), noGuard)...)
}

// openEnroll: the rule change alone, one after the other.
func openEnroll(s *stage) ([]workload, error) {
	f, err := s.fleet(setups(), world{rules: rules.Default(), noWork: true}, func(*backend) error { return nil })
	if err != nil {
		return nil, err
	}
	s.closing(f.Close)
	w := workload{name: "enroll", backends: f.names(setups()), ratios: enrollRatios, slice: func(name string) (sample, error) {
		took, err := f[name].setUpAgain()
		return sample{total: {took}}, err
	}}
	return []workload{w}, nil
}

// setUpAgain takes a pod's redirection away, and measures how long writing it takes.
func (b *backend) setUpAgain() (float64, error) {
	if !b.iptables { // iptables-restore replaces what is there
		if err := b.undo(b.node, b.site.pod); err != nil {
			return 0, err
		}
	}
	start := time.Now()
	err := b.redirect(b.node, b.site.pod, rules.Default())
	return float64(time.Since(start)), err
}

func enrollRatios(r *Result, m *measured) {
	defs := setups()
	cheapest := m.cheapest(defs, func(d definition) bool { return d.iptables })
	r.set(m.workload.name+"_vs_iptables_restore", over(m.p50(sluice, total), m.p50(cheapest, total)))
	for _, d := range of(defs, rival) {
		r.set(m.workload.name+"_vs_"+snake(d.name), over(m.p50(sluice, total), m.p50(d.name, total)))
	}
	r.set(m.workload.name+"_guard_ns", minus(m.p50(sluice, total), m.p50(noGuard, total)))
}

// atOnce is how many pods start together.
const atOnce = 100

// openSetup: the rule change of many pods at once, and the whole CNI ADD.
func openSetup(s *stage) ([]workload, error) {
	sites, err := s.sites(atOnce)
	if err != nil {
		return nil, err
	}
	defs := append(of(definitions(), ours), of(definitions(), rival)...)
	usable := map[string]definition{}
	var names []string
	for _, d := range defs {
		if err := d.redirect(s.node, sites[0].pod, rules.Default()); err != nil {
			s.leaveOut(d.name, err)
			continue
		}
		if err := d.undo(s.node, sites[0].pod); err != nil {
			return nil, err
		}
		usable[d.name], names = d, append(names, d.name)
	}
	many := workload{name: "enroll_100", backends: names, rounds: 4, cold: true, ratios: enrollRatios, slice: func(name string) (sample, error) {
		d := usable[name]
		times, err := s.together(sites, func(place *site) error { return d.redirect(s.node, place.pod, rules.Default()) })
		for _, place := range sites {
			err = errors.Join(err, d.undo(s.node, place.pod))
		}
		return sample{total: times}, err
	}}
	plugin, err := s.newPlugin()
	if err != nil {
		s.leaveOut("cni_add", err)
		return []workload{many}, nil
	}
	add := func(which []*site) (sample, error) {
		times, err := s.together(which, plugin.add)
		for _, place := range which {
			err = errors.Join(err, plugin.del(place))
		}
		return sample{total: times}, err
	}
	return []workload{
		many,
		{name: "cni_add", backends: []string{sluice}, rounds: 55, slice: func(string) (sample, error) { return add(sites[:1]) }},
		{name: "cni_add_100", backends: []string{sluice}, rounds: 4, cold: true, slice: func(string) (sample, error) { return add(sites) }},
	}, nil
}

func (s *stage) sites(n int) ([]*site, error) {
	var out []*site
	for range n {
		place, err := newSite(world{})
		if err != nil {
			return nil, fmt.Errorf("make %d namespaces: %w", n, err)
		}
		s.closing(place.Close)
		out = append(out, place)
	}
	return out, nil
}

// undo takes a pod's redirection away.
func (d definition) undo(n *node, pod *netns.NetNS) error {
	switch {
	case d.role != rival:
		_, err := n.datapath.Unenroll(pod.Cookie(), pod)
		return err
	case d.iptables:
		_, err := runIn(pod, "*nat\nCOMMIT\n", d.name+"-restore")
		return err
	}
	_, err := runIn(pod, "flush ruleset\n", "nft", "-f", "-")
	return err
}

// together does something in each namespace at once, and returns how long each took.
func (s *stage) together(sites []*site, do func(*site) error) ([]float64, error) {
	type result struct {
		took float64
		err  error
	}
	results := make(chan result)
	for _, place := range sites {
		go func() {
			start := time.Now()
			err := do(place)
			results <- result{float64(time.Since(start)), err}
		}()
	}
	var times []float64
	var errs error
	for range sites {
		r := <-results
		times, errs = append(times, r.took), errors.Join(errs, r.err)
	}
	return times, errs
}
