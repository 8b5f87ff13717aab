package bench

import (
	"net/netip"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// allCalls are what a process outside the mesh is watched at.
var allCalls = []call{callConnectTCP, callConnectUDP, callGetsockopt, callGetsockname, callGetpeername}

// bystanderName: the TCP connect() is the one that a bystander is asked about.
func bystanderName(c call) string {
	if c == callConnectTCP {
		return "bystander_connect"
	}
	return "bystander_" + string(c)
}

func bystanderSections() []section {
	sec := section{name: "bystander", quick: 3, open: openBystander}
	for _, c := range allCalls {
		sec.workloads = append(sec.workloads, bystanderName(c))
	}
	return []section{sec}
}

// openBystander: what a process outside the mesh pays for one system call, in a
// cgroup with Sluice's programs, and in one beside it.
func openBystander(s *stage) ([]workload, error) {
	bare, err := netns.New() // without any route
	if err != nil {
		return nil, err
	}
	s.closing(bare.Close)
	callers := map[string]*process{}
	for name, cgroup := range map[string]string{without: s.node.plain, withHooks: s.node.mesh} {
		p, err := s.worker("bystander/"+name, bare, cgroup, appID)
		if err != nil {
			return nil, err
		}
		s.closing(p.Close)
		callers[name] = p
	}
	var out []workload
	for _, c := range allCalls {
		out = append(out, workload{
			name: bystanderName(c), backends: []string{without, withHooks},
			slice: func(name string) (sample, error) {
				r, err := callers[name].call(job{Kind: jobCalls, Call: c, Warm: 2, Count: turnCalls, Addr: netip.MustParseAddrPort("198.18.0.1:80")})
				return sample{total: r.Total}, err
			},
			ratios: func(r *Result, m *measured) {
				r.set(m.workload.name+"_ns", minus(m.p50(withHooks, total), m.p50(without, total)))
			},
		})
	}
	return out, nil
}
