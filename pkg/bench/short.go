package bench

import (
	"fmt"
	"slices"

	"github.com/sluice-mesh/sluice/pkg/report"
)

// ShortTable is what a reader wants first: what redirection adds to each operation,
// by the cheaper of the two iptables, by Sluice, and by Sluice without the guard.
func (r *Result) ShortTable() report.Rows {
	out := report.Rows{Head: []string{"MEDIAN", "IPTABLES", "SLUICE", "WITHOUT THE GUARD"}, Empty: "nothing was measured"}
	line := func(what string, of func(definition) (float64, bool), format string) {
		var theirs []float64
		cells := []string{what, "-", "-", "-"}
		for _, d := range definitions() {
			v, measured := of(d)
			switch {
			case !measured:
			case d.iptables:
				theirs = append(theirs, v)
				cells[1] = fmt.Sprintf(format, slices.Min(theirs))
			case d.name == sluice:
				cells[2] = fmt.Sprintf(format, v)
			case d.name == noGuard:
				cells[3] = fmt.Sprintf(format, v)
			}
		}
		out.Lines = append(out.Lines, cells)
	}
	ratio := func(name, suffix string, f func(float64) float64) func(definition) (float64, bool) {
		return func(d definition) (float64, bool) {
			v, measured := r.Ratios[stem(name, d)+suffix]
			return f(v), measured
		}
	}
	us := func(ns float64) float64 { return ns / 1e3 }
	percent := func(v float64) float64 { return 100 * (v - 1) }
	line("outbound connect + echo + close: added", ratio("outbound_connect", "_added_ns", us), "%.1f us")
	line("inbound connect + echo + close: added", ratio("inbound_connect", "_added_ns", us), "%.1f us")
	line("echo on an open connection, outbound: added", ratio("outbound_echo", "_vs_none", percent), "%.1f %%")
	line("echo on an open connection, inbound: added", ratio("inbound_echo", "_vs_none", percent), "%.1f %%")
	line("setting up one pod", func(d definition) (float64, bool) {
		row, measured := r.row("enroll", d.name, total)
		return row.P50.Value / 1e6, measured
	}, "%.2f ms")
	return out
}
