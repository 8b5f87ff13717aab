package bench

import (
	"fmt"
	"math"

	"github.com/sluice-mesh/sluice/pkg/report"
)

// goal is what is worked towards, unlike a band, which nothing may fall behind.
type goal struct {
	what, ratio string
	least, most float64
}

// anything is no limit.
var anything = math.Inf(-1)

var goals = []goal{
	{"outbound connection: added, over what iptables adds", "outbound_connect_added_vs_iptables", anything, 0.15},
	{"inbound connection: added, over what iptables adds", "inbound_connect_added_vs_iptables", anything, 0.05},
	{"echo on an open connection, outbound, over none", "outbound_echo_vs_none", 0.99, 1.01},
	{"echo on an open connection, inbound, over none", "inbound_echo_vs_none", 0.99, 1.01},
	{"a connection with 10,000 rules, over one with 1", "rules_10000_vs_1", 0.95, 1.05},
	{"a connection with 1,000 pods on the node, over one with 1", "pods_1000_vs_1", 0.95, 1.05},
	{"connections of one pod at once (IPv4)", "ceiling4_held", target, math.Inf(1)},
	{"setting up a pod, over one iptables-restore", "enroll_vs_iptables_restore", anything, 0.1},
	{"connect() of a process outside the mesh, ns more", "bystander_connect_ns", anything, 100},
	{"getsockopt() of a process outside the mesh, ns more", "bystander_getsockopt_ns", anything, 0},
	{"kernel memory for each of 1,000 pods, bytes (/proc/meminfo)", "pod_memory_sluice_1000_bytes", anything, 16 << 10},
	{"kernel memory for each of 1,000 pods, bytes (memory cgroup)", "pod_memory_sluice_1000_charged_bytes", anything, 16 << 10},
}

// verdict is by the whole interval: where it reaches over the goal's edge, nothing
// has been shown.
func (g goal) verdict(interval [2]float64) string {
	switch {
	case interval[0] >= g.least && interval[1] <= g.most:
		return "met"
	case interval[1] < g.least || interval[0] > g.most:
		return "missed"
	}
	return "undecided"
}

func (g goal) String() string {
	number := func(v float64) string { return fmt.Sprintf("%g", v) }
	switch {
	case math.IsInf(g.least, 0):
		return "at most " + number(g.most)
	case math.IsInf(g.most, 0):
		return "at least " + fmt.Sprintf("%.0f", g.least)
	}
	return number(g.least) + " to " + number(g.most)
}

// GoalTable is the goals, and how far the run is from each, for people.
func (r *Result) GoalTable() report.Rows {
	out := report.Rows{Head: []string{"GOAL", "IS", "MEDIAN", "95 % INTERVAL", ""}, Empty: "there are no goals"}
	for _, g := range goals {
		value, measured := r.Ratios[g.ratio]
		if !measured {
			out.Lines = append(out.Lines, []string{g.what, g.String(), "-", "-", "not measured"})
			continue
		}
		format, i := ratioFormat(g.ratio), r.Intervals[g.ratio]
		out.Lines = append(out.Lines, []string{g.what, g.String(), fmt.Sprintf(format, value), fmt.Sprintf(format+" - "+format, i[0], i[1]), g.verdict(i)})
	}
	return out
}
