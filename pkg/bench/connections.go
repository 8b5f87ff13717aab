package bench

import "github.com/sluice-mesh/sluice/pkg/rules"

func connectionSections() []section {
	return []section{{
		name: "connections",
		workloads: []string{
			"outbound_connect", "inbound_connect", "outbound_echo", "inbound_echo", "outbound_echo_4k", "inbound_echo_4k",
			"direct_connect", "direct_echo", "direct_echo_16k",
		},
		long: []string{"outbound_echo_4k", "inbound_echo_4k", "direct_connect", "direct_echo", "direct_echo_16k"},
		open: openConnections,
	}}
}

func openConnections(s *stage) ([]workload, error) {
	defs := definitions()
	f, err := s.fleet(defs, world{rules: rules.Default()}, (*backend).prove)
	if err != nil {
		return nil, err
	}
	s.closing(f.Close)
	if s.opts.Out != "" {
		for _, b := range f {
			if err := b.saveRules(s.opts.Out); err != nil {
				return nil, err
			}
		}
	}
	dial := job{Kind: jobDial, Warm: warmConns, Count: turnConns, Size: echoBytes}
	echo := job{Kind: jobEcho, Warm: warmEchoes, Count: turnEchoes, Size: echoBytes}
	page, bulk := echo, echo
	page.Size, page.Count = pageBytes, turnEchoes/3
	bulk.Size, bulk.Count = bulkBytes, turnEchoes/3
	plain := of(defs, floor, rival, ours)
	withControl := of(defs, floor, rival, ours, control)
	inbound := of(defs, floor, rival, ours, variant)
	guards := append(of(defs, floor, rival, ours), named(defs, noGuard)...)
	return []workload{
		s.overLeg("outbound_connect", dial, (*backend).outbound, f, withControl),
		s.overLeg("inbound_connect", dial, (*backend).inbound, f, defs),
		s.overLeg("outbound_echo", echo, (*backend).outbound, f, plain),
		s.overLeg("inbound_echo", echo, (*backend).inbound, f, inbound),
		s.overLeg("outbound_echo_4k", page, (*backend).outbound, f, plain),
		s.overLeg("inbound_echo_4k", page, (*backend).inbound, f, inbound),
		s.overLeg("direct_connect", dial, (*backend).direct, f, guards),
		s.overLeg("direct_echo", echo, (*backend).direct, f, guards),
		s.overLeg("direct_echo_16k", bulk, (*backend).direct, f, guards),
	}, nil
}
