package datapath

import "github.com/cilium/ebpf"

// DefaultMaxPods is how many pods of a node the tables hold by default, which is
// what they are defined for.
const DefaultMaxPods = 1024 // SLUICE_MAX_PODS

// perPod are the tables that grow with the number of pods: as they are defined,
// they are for DefaultMaxPods.
var perPod = []string{
	"pods", "pod_facts", "pod_names", "attachments", "own_addrs", "proxy_ids", "port_rules", "cidr_rules4", "cidr_rules6",
	"interface_names", "interfaces", "reroutes", "routes4", "routes6", "listeners", "handshake_use", "target_use", "stats", "rule_sets",
}

// sizes are the numbers of entries of the tables whose size an option says. One
// that is pinned already keeps its own.
func (o Options) sizes(maps map[string]*ebpf.MapSpec) map[string]uint32 {
	out := map[string]uint32{"handshakes": o.Handshakes, "targets": o.Targets, "target_index": o.Targets}
	for _, name := range perPod {
		if m := maps[name]; m != nil {
			out[name] = max(uint32(uint64(m.MaxEntries)*uint64(o.MaxPods)/DefaultMaxPods), 1)
		}
	}
	return out
}
