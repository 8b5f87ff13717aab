package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/report"
)

// Result is a whole run. Durations are nanoseconds. Figures of one run compare
// with each other; those of two runs hardly do, but their ratios do.
type Result struct {
	Schema   int       `json:"schema"`
	Started  time.Time `json:"started"`
	Seconds  float64   `json:"seconds"`
	Machine  Machine   `json:"machine"`
	Settings Settings  `json:"settings"`
	// LeftOut says of each backend that is missing why.
	LeftOut map[string]string `json:"leftOut"`
	Rows    []Row             `json:"rows"`
	// Ratios are medians over rounds, of what is compared within a round;
	// Intervals are their 95 % intervals, low and high.
	Ratios    map[string]float64    `json:"ratios"`
	Intervals map[string][2]float64 `json:"intervals"`

	order []string // of the ratios
}

// Machine is what the figures depend on.
type Machine struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Go     string `json:"go"`
}

// Settings are how the run was made.
type Settings struct {
	Incarnations int    `json:"incarnations"`
	Rounds       int    `json:"rounds"` // of each incarnation
	Quick        bool   `json:"quick"`
	CPU          int    `json:"pinnedTo"`
	Placement    string `json:"placement"`
}

// Row is one line of the table.
type Row struct {
	Workload string   `json:"workload"`
	Backend  string   `json:"backend"`
	Metric   string   `json:"metric"`
	P50      Estimate `json:"p50"`
	P90      float64  `json:"p90"` // median over rounds
	Min      float64  `json:"min"` // over all rounds
	Rounds   int      `json:"rounds"`
	unit     string
}

func newResult(opts Options, started time.Time) *Result {
	return &Result{
		Schema: 1, Started: started.UTC().Truncate(time.Second),
		Machine: thisMachine(),
		Settings: Settings{
			Incarnations: opts.incarnations(), Rounds: opts.rounds(), Quick: opts.Quick, CPU: opts.CPU,
			Placement: "client and server on the same CPU, blocking sockets, SCHED_BATCH, nice -20",
		},
		LeftOut: map[string]string{}, Ratios: map[string]float64{}, Intervals: map[string][2]float64{},
	}
}

func thisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version()}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = string(bytes.TrimRight(uts.Release[:], "\x00"))
	}
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	return m
}

// summarise turns samples into rows and ratios.
func (r *Result) summarise(all series) {
	for _, m := range all.sorted() {
		for _, metric := range []string{metricTotal, metricConnect} {
			for _, name := range m.workload.backends {
				if f := m.by[name][metric]; f != nil {
					r.Rows = append(r.Rows, Row{
						Workload: m.workload.name, Backend: name, Metric: metric, unit: m.workload.unit, Rounds: len(f.p50.values),
						P50: estimate(f.p50), P90: median(f.p90.values), Min: slices.Min(f.min.values),
					})
				}
			}
		}
		r.compare(m)
	}
}

func (r *Result) set(name string, values rounds) {
	if len(values.values) == 0 {
		return
	}
	e := estimate(values)
	r.Ratios[name], r.Intervals[name] = e.Value, [2]float64{e.Low, e.High}
	r.order = append(r.order, name)
}

// WriteFile writes DIR/bench.json.
func (r *Result) WriteFile(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make the output directory: %w", err)
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	path := filepath.Join(dir, "bench.json")
	if err := os.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// Table is the rows for people.
func (r *Result) Table() report.Rows {
	out := report.Rows{Head: []string{"WORKLOAD", "BACKEND", "MIN", "P50", "95 % INTERVAL", "P90", "UNIT"}, Empty: "nothing was measured"}
	for _, row := range r.Rows {
		scale, format := 1000.0, "%.2f"
		if row.unit == "ns" {
			scale, format = 1, "%.0f"
		}
		number := func(v float64) string { return fmt.Sprintf(format, v/scale) }
		name := row.Workload
		if row.Metric != metricTotal {
			name += " (" + row.Metric + "() alone)"
		}
		out.Lines = append(out.Lines, []string{
			name, row.Backend, number(row.Min), number(row.P50.Value),
			number(row.P50.Low) + " - " + number(row.P50.High), number(row.P90), row.unit,
		})
	}
	return out
}

// RatioTable is the comparisons for people.
func (r *Result) RatioTable() report.Rows {
	out := report.Rows{Head: []string{"COMPARED WITHIN ROUNDS", "MEDIAN", "95 % INTERVAL"}, Empty: "nothing was compared"}
	for _, name := range r.order {
		format := "%.3f"
		if strings.HasSuffix(name, "_ns") {
			format = "%.0f"
		}
		i := r.Intervals[name]
		out.Lines = append(out.Lines, []string{name, fmt.Sprintf(format, r.Ratios[name]), fmt.Sprintf(format+" - "+format, i[0], i[1])})
	}
	return out
}
