package bench

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// schema is the version of bench.json, which docs/benchmark.md describes.
const schema = 2

// Result is a whole run. Durations are nanoseconds. Figures of one run compare
// with each other; those of two runs hardly do, but their ratios do.
type Result struct {
	Schema   int       `json:"schema"`
	Started  time.Time `json:"started"`
	Seconds  float64   `json:"seconds"`
	Machine  Machine   `json:"machine"`
	Settings Settings  `json:"settings"`
	// Parts are what each part of the run took, in their order.
	Parts []Part `json:"parts"`
	// LeftOut says of each backend or workload that is missing why.
	LeftOut map[string]string `json:"leftOut"`
	// Notes are what a reader of the figures must know, such as what ended a ceiling.
	Notes map[string]string `json:"notes"`
	Rows  []Row             `json:"rows"`
	// Ratios are medians over rounds, of what is compared within a round;
	// Intervals are their 95 % intervals, low and high; Units are the medians of
	// the incarnations, which two runs are compared by.
	Ratios    map[string]float64    `json:"ratios"`
	Intervals map[string][2]float64 `json:"intervals"`
	Units     map[string][]float64  `json:"units"`
	// Order is that of the ratios, for people.
	Order []string `json:"order"`
}

// Settings are how the run was made.
type Settings struct {
	Incarnations int    `json:"incarnations"`
	Rounds       int    `json:"rounds"` // of each incarnation
	Quick        bool   `json:"quick"`
	CPU          int    `json:"pinnedTo"`
	Placement    string `json:"placement"`
	DelayNS      int64  `json:"delayNs"` // put in on purpose, to see that it is seen
}

// Row is one line of the table.
type Row struct {
	Workload string   `json:"workload"`
	Backend  string   `json:"backend"`
	Metric   metric   `json:"metric"`
	P50      Estimate `json:"p50"` // median over rounds, of their medians
	P90      float64  `json:"p90"` // median over rounds
	// P99 and P999 are medians over incarnations, or of the samples of all of them
	// together where one has too few to have such a tail. They are absent where all
	// have too few.
	P99     float64 `json:"p99,omitempty"`
	P999    float64 `json:"p999,omitempty"`
	Min     float64 `json:"min"` // over all rounds
	Rounds  int     `json:"rounds"`
	Samples int     `json:"samples"`
	// P is the probability of such figures if this backend and the workload's
	// first were alike (Mann-Whitney U over incarnations); absent for the first.
	P *float64 `json:"p,omitempty"`
}

func newResult(opts Options, started time.Time) *Result {
	return &Result{
		Schema: schema, Started: started.UTC().Truncate(time.Second),
		Machine: thisMachine(),
		Settings: Settings{
			Incarnations: opts.incarnations(), Rounds: opts.rounds(), Quick: opts.Quick, CPU: opts.CPU, DelayNS: int64(opts.Delay),
			Placement: "client and server on the same CPU, blocking sockets, SCHED_BATCH, nice -20",
		},
		LeftOut: map[string]string{}, Notes: map[string]string{},
		Ratios: map[string]float64{}, Intervals: map[string][2]float64{}, Units: map[string][]float64{},
	}
}

// Part is a part of the run and what it took, over all incarnations that have it.
type Part struct {
	Name    string  `json:"name"`
	Times   int     `json:"times"` // incarnations that have it
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"cpuSeconds"` // of this process and those that it has started
}

// spends begins to count what a part takes; the function that it returns ends that.
func (r *Result) spends(name string) func() {
	started, busy := time.Now(), cpuSeconds()
	return func() {
		i := slices.IndexFunc(r.Parts, func(p Part) bool { return p.Name == name })
		if i < 0 {
			i, r.Parts = len(r.Parts), append(r.Parts, Part{Name: name})
		}
		p := &r.Parts[i]
		p.Times++
		p.Seconds += time.Since(started).Seconds()
		p.CPU += cpuSeconds() - busy
	}
}

// cpuSeconds is the CPU time of this process and of its children that have ended.
func cpuSeconds() (sum float64) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if unix.Getrusage(who, &u) == nil { // every kernel has it
			sum += float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
		}
	}
	return sum
}

var metrics = []metric{total, connect, cpu, p99, gbits, cpuPerGB, rate, failures, held, memory, charged}

// summarise turns samples into rows and ratios.
func (r *Result) summarise(all series) {
	for _, m := range all.sorted() {
		for _, what := range metrics {
			for i, name := range m.workload.backends {
				f := m.by[name][what]
				if f == nil {
					continue
				}
				row := f.row()
				row.Workload, row.Backend, row.Metric = m.workload.name, name, what
				if i > 0 {
					if p := alike(m.p50(m.workload.backends[0], what).units(), f.p50.units()); !math.IsNaN(p) {
						row.P = &p
					}
				}
				r.Rows = append(r.Rows, row)
			}
		}
		if m.workload.ratios != nil {
			m.workload.ratios(r, m)
		}
	}
}

func (f *figures) row() Row {
	row := Row{P50: estimate(f.p50), P90: median(f.p90.values), Min: f.least(), Rounds: len(f.p50.values), Samples: f.samples()}
	row.P99, row.P999 = f.tail(0.99, 200), f.tail(0.999, 2000)
	return row
}

func (r *Result) set(name string, values rounds) {
	if len(values.clusters()) == 0 {
		return
	}
	e := estimate(values)
	r.Ratios[name], r.Intervals[name], r.Units[name] = e.Value, [2]float64{e.Low, e.High}, values.units()
	r.Order = append(r.Order, name)
}

// row finds a figure.
func (r *Result) row(workload, backend string, what metric) (Row, bool) {
	for _, row := range r.Rows {
		if row.Workload == workload && row.Backend == backend && row.Metric == what {
			return row, true
		}
	}
	return Row{}, false
}

// Read reads a bench.json.
func Read(path string) (*Result, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read a result: %w", err)
	}
	var r Result
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("%s is not a result of the benchmark: %w", path, err)
	}
	if r.Schema != schema {
		return nil, fmt.Errorf("%s has schema %d, and this version reads %d: measure again", path, r.Schema, schema)
	}
	return &r, nil
}

// WriteFiles writes bench.json, bench.md and the charts into a directory.
func (r *Result) WriteFiles(dir string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	if err := writeFile(dir, "bench.json", append(text, '\n')); err != nil {
		return err
	}
	charts, err := r.drawCharts(dir)
	if err != nil {
		return err
	}
	return writeFile(dir, "bench.md", []byte(r.markdown(charts)))
}

func writeFile(dir, name string, text []byte) error {
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
