package bench

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// podCounts are how many pods are enrolled on a node.
var podCounts = []int{1, 10, 100, 1000}

const (
	// weighable is from how many pods on their memory is told: readings are off by
	// some hundred KiB.
	weighable = 100
	// rivalPods is how many pods a firewall's memory is taken over: it has nothing
	// that pods share.
	rivalPods = 100
)

func podsSections() []section {
	return []section{{name: "pods", workloads: []string{"pods", "pods_enroll", "pod_memory"}, quick: 1, full: 4, open: openPods}}
}

// crowd is nodes with ever more pods, side by side, so that what one pod does with
// one and with a thousand beside it is compared within a round.
type crowd struct {
	names []string // of the nodes, by how many pods they have
	pod   fleet    // the one pod of each that has processes
	spare map[string]*backend
	used  map[string]sample // memory for each pod, by node or rival
	heavy []string          // those that used has
}

// openPods makes the nodes. A quick run has the fewest pods and the most, and no
// firewalls.
func openPods(s *stage) ([]workload, error) {
	m, err := s.newMeter()
	if err != nil {
		return nil, err
	}
	counts, rivals := podCounts, of(definitions(), rival)
	if s.opts.Quick {
		counts, rivals = []int{1, 1000}, nil
		s.leaveOut("pods: 10 and 100, and the memory of firewalls", errLong)
	}
	c := crowd{pod: fleet{}, spare: map[string]*backend{}, used: map[string]sample{}}
	for _, count := range counts {
		if err := s.crowded(&c, m, count); err != nil {
			return nil, err
		}
	}
	for _, def := range rivals {
		pods, err := s.fillers(rivalPods)
		if err == nil {
			err = s.weigh(&c, m, level(def.name, rivalPods), s.node, def, pods)
		}
		if s.ctx.Err() != nil {
			return nil, s.ctx.Err()
		}
		if err != nil {
			s.leaveOut("pod_memory, "+def.name, err)
		}
	}
	return c.workloads(s), nil
}

// crowded makes a node with so many pods, or leaves it out.
func (s *stage) crowded(c *crowd, m *meter, count int) error {
	on, name, def := *s, level(sluice, count), named(definitions(), sluice)
	if count > 1 { // the pod that is alone is on the run's own node
		var err error
		if on.node, err = newNode(); err != nil {
			return err
		}
		s.closing(on.node.Close)
		pods, err := s.fillers(count - 1)
		if errors.Is(err, errTooSlow) {
			s.leaveOut(name, err)
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.weigh(c, m, name, on.node, def[0], pods); err != nil {
			return err
		}
	}
	f, err := on.fleet(def, world{rules: rules.Default(), noFar: true}, (*backend).prove)
	if err != nil {
		return err
	}
	s.closing(f.Close)
	spare, err := on.start(def[0], world{rules: rules.Default(), noWork: true})
	if err != nil {
		return err
	}
	s.closing(spare.Close)
	c.names, c.pod[name], c.spare[name] = append(c.names, name), f[sluice], spare
	return nil
}

// weigh redirects pods, and notes how much kernel memory that took for each.
func (s *stage) weigh(c *crowd, m *meter, name string, n *node, def definition, pods []*netns.NetNS) error {
	before, err := m.read()
	if err != nil {
		return err
	}
	for _, pod := range pods {
		if err := def.redirect(n, pod, rules.Default()); err != nil {
			return err
		}
	}
	after, err := m.read()
	if err == nil && len(pods) >= weighable-1 {
		c.used[name], c.heavy = after.since(before, len(pods)), append(c.heavy, name)
	}
	return err
}

func (c *crowd) workloads(s *stage) []workload {
	return []workload{
		{name: "pods", backends: c.names, rounds: 4 * s.opts.rounds(), ratios: podsRatios, slice: func(name string) (sample, error) {
			r, err := c.pod[name].outbound().run(job{Kind: jobDial, Warm: warmConns, Count: turnConns, Size: echoBytes})
			return sample{total: r.Total, connect: r.Connect}, err
		}},
		{name: "pods_enroll", backends: c.names, ratios: podsRatios, slice: func(name string) (sample, error) {
			took, err := c.spare[name].setUpAgain()
			return sample{total: {took}}, err
		}},
		{
			name: "pod_memory", backends: c.heavy, rounds: 1, cold: true,
			slice: func(name string) (sample, error) { return c.used[name], nil },
			ratios: func(r *Result, m *measured) {
				for _, name := range m.workload.backends {
					r.set(snake("pod_memory_"+name)+"_bytes", m.p50(name, memory))
					r.set(snake("pod_memory_"+name)+"_charged_bytes", m.p50(name, charged))
				}
			},
		},
	}
}

// errTooSlow is for a machine on which others make namespaces too: the kernel has
// one lock for all.
var errTooSlow = errors.New("namespaces are made too slowly here")

// patience is how long a run waits for the namespaces of many pods.
func (s *stage) patience() time.Duration {
	if s.opts.Quick {
		return 30 * time.Second
	}
	return 3 * time.Minute
}

// fillers are namespaces that look like pods, for want of processes. The far ends
// of their interfaces share a namespace: half as many are made.
func (s *stage) fillers(count int) (pods []*netns.NetNS, err error) {
	far, err := newNetNS(world{})
	if err != nil {
		return nil, err
	}
	s.closing(func() error {
		errs := far.Close()
		for _, pod := range pods {
			errs = errors.Join(errs, pod.Close())
		}
		return errs
	})
	deadline := time.Now().Add(s.patience())
	for i := range count {
		if s.ctx.Err() != nil {
			return nil, s.ctx.Err()
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%w: %d of %d in %s", errTooSlow, i, count, s.patience())
		}
		pod, err := newNetNS(world{})
		if err != nil {
			return nil, fmt.Errorf("make pod %d of %d: %w", i+1, count, err)
		}
		pods = append(pods, pod)
		handle, err := pod.Handle()
		if err != nil {
			return nil, err
		}
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: fmt.Sprint("far", i), PeerNamespace: netlink.NsFd(far.Fd())}
		if err := handle.LinkAdd(veth); err != nil {
			return nil, fmt.Errorf("wire pod %d of %d: %w", i+1, count, err)
		}
		if err := address(handle, podPrefix); err != nil {
			return nil, err
		}
	}
	return pods, nil
}

func podsRatios(r *Result, m *measured) {
	for _, count := range podCounts[1:] {
		name := level(sluice, count)
		if slices.Contains(m.workload.backends, name) {
			r.set(fmt.Sprintf("%s_%d_vs_1", m.workload.name, count), over(m.p50(name, total), m.p50(level(sluice, 1), total)))
		}
	}
}
