package bench

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/report"
)

func keys[V any](m map[string]V) iter.Seq[string] { return maps.Keys(m) }

// Table is the rows for people.
func (r *Result) Table() report.Rows {
	out := report.Rows{Head: []string{"WORKLOAD", "BACKEND", "P50", "95 % INTERVAL", "P90", "P99", "P99.9", "UNIT", "P"}, Empty: "nothing was measured"}
	for _, row := range r.Rows {
		scale, unit := row.Metric.unit()
		number := func(v float64) string { return significant(v / scale) }
		maybe := func(v float64) string {
			if v == 0 {
				return "-"
			}
			return number(v)
		}
		name, p := row.Workload, "-"
		if row.Metric != total {
			name += " (" + string(row.Metric) + ")"
		}
		if row.P != nil {
			p = fmt.Sprintf("%.3f", *row.P)
		}
		tail := "-"
		if row.Samples > row.Rounds {
			tail = number(row.P90)
		}
		out.Lines = append(out.Lines, []string{
			name, row.Backend, number(row.P50.Value), number(row.P50.Low) + " - " + number(row.P50.High),
			tail, maybe(row.P99), maybe(row.P999), unit, p,
		})
	}
	return out
}

// significant prints a number with the digits that a person reads.
func significant(v float64) string {
	switch {
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// RatioTable is the comparisons for people.
func (r *Result) RatioTable() report.Rows {
	out := report.Rows{Head: []string{"COMPARED WITHIN ROUNDS", "MEDIAN", "95 % INTERVAL"}, Empty: "nothing was compared"}
	for _, name := range r.Order {
		format := ratioFormat(name)
		i := r.Intervals[name]
		out.Lines = append(out.Lines, []string{name, fmt.Sprintf(format, r.Ratios[name]), fmt.Sprintf(format+" - "+format, i[0], i[1])})
	}
	return out
}

// PartTable is what the run took for people.
func (r *Result) PartTable() report.Rows {
	out := report.Rows{Head: []string{"PART", "TIMES", "SECONDS", "CPU SECONDS"}, Empty: "nothing was run"}
	for _, p := range r.Parts {
		out.Lines = append(out.Lines, []string{p.Name, fmt.Sprint(p.Times), fmt.Sprintf("%.1f", p.Seconds), fmt.Sprintf("%.1f", p.CPU)})
	}
	return out
}

// markdown is the whole result as a page.
func (r *Result) markdown(charts []chart) string {
	var out strings.Builder
	m, source := r.Machine, ""
	if m.Sluice != "" {
		source = ", revision " + m.Sluice
	}
	fmt.Fprintf(&out, "# Benchmark of %s\n\n", r.Started.Format("2006-01-02 15:04 MST"))
	fmt.Fprintf(&out, "%s, %d CPUs, kernel %s, %s%s; %d incarnations of %d rounds, %.0f s; %s.\n\n",
		m.CPU, m.CPUs, m.Kernel, m.Go, source, r.Settings.Incarnations, r.Settings.Rounds, r.Seconds, r.Settings.Placement)
	if r.Settings.DelayNS > 0 {
		fmt.Fprintf(&out, "**Sluice's stand-in was delayed by %d ns on purpose.**\n\n", r.Settings.DelayNS)
	}
	out.WriteString("## In short\n\n")
	table(&out, r.ShortTable())
	out.WriteString("\n## Goals\n\n\"Undecided\": the interval reaches over the goal's edge.\n\n")
	table(&out, r.GoalTable())
	out.WriteString("\n## Charts\n\n")
	for _, c := range charts {
		fmt.Fprintf(&out, "![%s](%s.svg)\n\n", c.title, c.name)
	}
	out.WriteString("## Compared within rounds\n\n")
	table(&out, r.RatioTable())
	out.WriteString("\n## Figures\n\nP is the probability of such figures if the backend and the workload's first were alike.\n\n")
	table(&out, r.Table())
	out.WriteString("\n## What the run took\n\n")
	table(&out, r.PartTable())
	list(&out, "Left out", r.LeftOut)
	list(&out, "Notes", r.Notes)
	list(&out, "Sysctls", m.Sysctls)
	list(&out, "Versions", m.Versions)
	return out.String()
}

func table(out *strings.Builder, rows report.Rows) {
	line := func(cells []string) { fmt.Fprintf(out, "| %s |\n", strings.Join(cells, " | ")) }
	line(rows.Head)
	line(slices.Repeat([]string{"---"}, len(rows.Head)))
	for _, cells := range rows.Lines {
		line(cells)
	}
}

func list(out *strings.Builder, title string, entries map[string]string) {
	if len(entries) == 0 {
		return
	}
	fmt.Fprintf(out, "\n## %s\n\n", title)
	for _, key := range slices.Sorted(keys(entries)) {
		fmt.Fprintf(out, "* %s: %s\n", key, entries[key])
	}
}
