package bench

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/report"
)

// Difference is a ratio in two runs.
type Difference struct {
	Name  string     `json:"name"`
	A     float64    `json:"a"`
	B     float64    `json:"b"`
	AIn   [2]float64 `json:"aInterval"`
	BIn   [2]float64 `json:"bInterval"`
	P     *float64   `json:"p,omitempty"` // probability if the two were alike; absent where there are too few incarnations
	Alike bool       `json:"alike"`       // no difference was shown: P is 0.05 or more, or absent
}

// alpha is benchstat's: a difference with a smaller P is one.
const alpha = 0.05

// Compare compares the ratios that two runs have in common, by benchstat's test
// over their incarnations.
func Compare(a, b *Result) []Difference {
	var out []Difference
	for _, name := range a.Order {
		if _, both := b.Ratios[name]; !both {
			continue
		}
		d := Difference{Name: name, A: a.Ratios[name], B: b.Ratios[name], AIn: a.Intervals[name], BIn: b.Intervals[name], Alike: true}
		if p := alike(a.Units[name], b.Units[name]); !math.IsNaN(p) {
			d.P, d.Alike = &p, p >= alpha
		}
		out = append(out, d)
	}
	return out
}

// DifferenceTable is differences for people.
func DifferenceTable(all []Difference) report.Rows {
	out := report.Rows{Head: []string{"RATIO", "A", "B", "CHANGE", "P"}, Empty: "the two results have no ratio in common"}
	for _, d := range all {
		format := ratioFormat(d.Name)
		side := func(v float64, in [2]float64) string {
			return fmt.Sprintf(format+" ("+format+" to "+format+")", v, in[0], in[1])
		}
		change, p := "~", "-"
		if !d.Alike {
			change = fmt.Sprintf("%+.1f %%", 100*(d.B/d.A-1))
		}
		if d.P != nil {
			p = fmt.Sprintf("%.3f", *d.P)
		}
		out.Lines = append(out.Lines, []string{d.Name, side(d.A, d.AIn), side(d.B, d.BIn), change, p})
	}
	return out
}

// Unlike says what of the machines or settings differs, which makes a comparison
// of two runs doubtful.
func Unlike(a, b *Result) []string {
	var out []string
	note := func(what, x, y string) {
		if x != y {
			out = append(out, fmt.Sprintf("%s differs: %s, and %s", what, x, y))
		}
	}
	note("the kernel", a.Machine.Kernel, b.Machine.Kernel)
	note("the CPU", a.Machine.CPU, b.Machine.CPU)
	note("the number of CPUs", fmt.Sprint(a.Machine.CPUs), fmt.Sprint(b.Machine.CPUs))
	note("the number of incarnations", fmt.Sprint(a.Settings.Incarnations), fmt.Sprint(b.Settings.Incarnations))
	for _, name := range slices.Sorted(keys(a.Machine.Sysctls)) {
		note(name, a.Machine.Sysctls[name], b.Machine.Sysctls[name])
	}
	return out
}

func ratioFormat(name string) string {
	for _, suffix := range []string{"_ns", "_bytes", "_held"} {
		if strings.HasSuffix(name, suffix) {
			return "%.0f"
		}
	}
	return "%.3f"
}
