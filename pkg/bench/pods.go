package bench

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// podCounts are how many pods are enrolled on a node.
var podCounts = []int{1, 10, 100, 1000}

func podsSections() []section {
	return []section{{name: "pods", workloads: []string{"pods", "pod_memory"}, quick: 1, full: 2, open: openPods}}
}

// openPods makes one node for each count, side by side, so that connections with
// one pod and with a thousand are compared within a round. In each a single pod
// has processes. A quick run has the fewest and the most.
func openPods(s *stage) ([]workload, error) {
	counts := podCounts
	if s.opts.Quick {
		counts = []int{1, 1000}
	}
	pods := workload{name: "pods", rounds: 4 * s.opts.rounds(), ratios: podsRatios}
	used := workload{name: "pod_memory", rounds: 1, cold: true}
	all, bytes := fleet{}, map[string]float64{}
	def := named(definitions(), sluice)
	for _, count := range counts {
		on := *s // the pod that is alone is on the run's own node
		if count > 1 {
			var err error
			if on.node, err = newNode(); err != nil {
				return nil, err
			}
			s.closing(on.node.Close)
		}
		f, err := on.fleet(def, world{rules: rules.Default(), noFar: true}, (*backend).prove)
		if err != nil {
			return nil, err
		}
		s.closing(f.Close)
		name := level(sluice, count)
		all[name] = f[sluice]
		pods.backends = append(pods.backends, name)
		if count > 1 {
			bytes[name], err = s.fill(on.node, count-1)
			if errors.Is(err, errTooSlow) {
				s.leaveOut(name, err)
				delete(all, name)
				pods.backends = pods.backends[:len(pods.backends)-1]
				continue
			}
			if err != nil {
				return nil, err
			}
			used.backends = append(used.backends, name)
		}
	}
	pods.slice = func(name string) (sample, error) {
		r, err := all[name].outbound().run(job{Kind: jobDial, Warm: warmConns, Count: turnConns, Size: echoBytes})
		return sample{total: r.Total, connect: r.Connect}, err
	}
	used.slice = func(name string) (sample, error) { return sample{memory: {bytes[name]}}, nil }
	used.ratios = func(r *Result, m *measured) {
		for _, name := range m.workload.backends {
			r.set(snake("pod_memory_"+name)+"_bytes", m.p50(name, memory))
		}
	}
	return []workload{pods, used}, nil
}

// fill enrolls n more pods on a node and returns how many bytes of kernel memory
// each took. Their namespaces are there before the first reading.
func (s *stage) fill(n *node, count int) (bytes float64, err error) {
	pods, err := s.fillers(count)
	if err != nil {
		return 0, err
	}
	before, err := kernelMemory()
	if err != nil {
		return 0, err
	}
	for _, pod := range pods {
		if _, err := n.datapath.Enroll(pod, datapath.Pod{Rules: rules.Default()}); err != nil {
			return 0, err
		}
	}
	time.Sleep(100 * time.Millisecond) // what the kernel frees meanwhile it frees by RCU
	after, err := kernelMemory()
	return (after - before) / float64(count), err
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
			r.set(fmt.Sprintf("pods_%d_vs_1", count), over(m.p50(name, total), m.p50(level(sluice, 1), total)))
		}
	}
}
