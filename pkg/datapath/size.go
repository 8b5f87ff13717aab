package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"
)

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

// Size is how many entries a table has room for.
func (d *Datapath) Size(table string) uint32 { return d.maps[table].MaxEntries() }

// settleShares decides what one pod may hold of the tables, which may be of other
// sizes than those asked for, and refuses more than they hold.
func (d *Datapath) settleShares() error {
	for table, s := range map[string]struct {
		share   *uint32
		divisor uint32
	}{
		"handshakes": {&d.opts.HandshakeShare, handshakeDivisor},
		"targets":    {&d.opts.TargetShare, targetShareDivisor},
	} {
		if *s.share == 0 {
			*s.share = max(d.Size(table)/s.divisor, 1)
		}
		if *s.share > d.Size(table) {
			return fmt.Errorf("one pod cannot hold %d %s: the table has room for %d, so give a smaller share", *s.share, table, d.Size(table))
		}
	}
	return nil
}
