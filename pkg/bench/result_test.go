package bench

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// madeUp is a result with figures for every workload that the promised ratios come
// from. What scales is how much longer everything of Sluice takes.
func madeUp(t *testing.T, scale float64) *Result {
	t.Helper()
	base := map[string]float64{none: 100, "iptables-legacy": 120, "iptables-nft": 122, "nftables": 121, sluice: 102 * scale, noGuard: 101, bystander: 100.5, without: 1000, withHooks: 1100 * scale}
	all := series{}
	add := func(name string, backends []string, ratios func(*Result, *measured), of func(string) float64) {
		w := workload{name: name, backends: backends, ratios: ratios}
		for incarnation := range 10 {
			for round := range 3 {
				for _, b := range backends {
					v := of(b) + float64(incarnation)/100 + float64(round)/1000
					all.of(w).add(b, sample{total: {v, v, v}, connect: {v / 2}}, incarnation)
				}
			}
		}
	}
	of := func(b string) float64 { return base[b] }
	plain := []string{none, "iptables-legacy", "iptables-nft", "nftables", sluice, noGuard}
	for _, name := range []string{"outbound_connect", "inbound_connect", "outbound_echo", "inbound_echo"} {
		add(name, plain, standardRatios, of)
	}
	add("rules", []string{level(sluice, 1), level(sluice, 10000)}, rulesRatios, func(string) float64 { return 100 })
	add("pods", []string{level(sluice, 1), level(sluice, 1000)}, podsRatios, func(string) float64 { return 100 })
	add("enroll", plain[1:], enrollRatios, of)
	for _, c := range allCalls {
		add(bystanderName(c), []string{without, withHooks}, func(r *Result, m *measured) {
			r.set(m.workload.name+"_ns", minus(m.p50(withHooks, total), m.p50(without, total)))
		}, of)
	}
	r := newResult(Options{}, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	r.summarise(all)
	return r
}

// The names that issue and documentation promise to whoever reads bench.json.
var promised = []string{
	"outbound_connect_added_vs_iptables", "inbound_connect_added_vs_iptables", "outbound_echo_vs_none", "inbound_echo_vs_none",
	"rules_10000_vs_1", "pods_1000_vs_1", "enroll_vs_iptables_restore", "bystander_connect_ns", "bystander_getsockopt_ns",
}

func TestTheRatiosThatArePromisedAreThere(t *testing.T) {
	r := madeUp(t, 1)
	for _, name := range promised {
		if _, ok := r.Ratios[name]; !ok {
			t.Errorf("there is no ratio %s", name)
		}
	}
	if got := r.Ratios["outbound_connect_added_vs_iptables"]; got < 0.0999 || got > 0.1001 {
		t.Errorf("(102-100)/(120-100) is %v, beside the cheaper iptables", got)
	}
	if got := r.Ratios["bystander_connect_ns"]; got != 100 {
		t.Errorf("1100-1000 is %v", got)
	}
}

// bench.json holds what docs/benchmark.md documents, no more and no less.
func TestTheSchemaIsDocumented(t *testing.T) {
	text, err := json.Marshal(madeUp(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/benchmark.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(page), "## bench.json")
	section, _, _ = strings.Cut(section, "\n## ")
	if !found {
		t.Fatal("docs/benchmark.md has no section bench.json")
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-zA-Z]+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, m[1])
	}
	slices.Sort(documented)
	if got := slices.Sorted(keys(object)); !slices.Equal(got, documented) {
		t.Errorf("bench.json has %v, docs/benchmark.md documents %v", got, documented)
	}
	for _, name := range promised {
		if !strings.Contains(section, "`"+name+"`") {
			t.Errorf("the section does not name the ratio %s", name)
		}
	}
}

func TestAResultIsReadAsItWasWritten(t *testing.T) {
	dir, r := t.TempDir(), madeUp(t, 1)
	if err := r.WriteFiles(dir); err != nil {
		t.Fatal(err)
	}
	back, err := Read(filepath.Join(dir, "bench.json"))
	if err != nil {
		t.Fatal(err)
	}
	was, _ := json.Marshal(r)
	is, _ := json.Marshal(back)
	if !bytes.Equal(was, is) {
		t.Errorf("wrote %s\nread %s", was, is)
	}
	for name, begins := range map[string]string{"latency.svg": "<?xml", "latency.png": "\x89PNG", "rules.svg": "<?xml", "pods.png": "\x89PNG", "bench.md": "# Benchmark"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.HasPrefix(text, []byte(begins)) {
			t.Errorf("%s: %v, begins with %.10q, want %q", name, err, text, begins)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "ceiling.svg")); err == nil {
		t.Error("there is a chart of what was not measured")
	}
}

func TestOneCountMakesNoChart(t *testing.T) {
	dir, r := t.TempDir(), madeUp(t, 1)
	r.Rows = slices.DeleteFunc(r.Rows, func(row Row) bool { return row.Backend == level(sluice, 1000) })
	if err := r.WriteFiles(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "pods.svg")); err == nil {
		t.Error("there is a chart of a single count")
	}
	if page, err := os.ReadFile(filepath.Join(dir, "bench.md")); err != nil || strings.Contains(string(page), "pods.svg") {
		t.Errorf("bench.md has a chart that is not there: %v", err)
	}
}

func TestReadRefusesWhatIsNoResult(t *testing.T) {
	for name, c := range map[string]struct{ text, complaint string }{
		"no JSON":         {"hello", "not a result"},
		"another schema":  {`{"schema":1}`, "schema 1"},
		"an empty object": {`{}`, "schema 0"},
	} {
		path := filepath.Join(t.TempDir(), "x.json")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(path); err == nil || !strings.Contains(err.Error(), c.complaint) {
			t.Errorf("%s: got %v, want %q", name, err, c.complaint)
		}
	}
	if _, err := Read(filepath.Join(t.TempDir(), "none.json")); err == nil {
		t.Error("a missing file was read")
	}
}

func TestCompareShowsWhatDiffersAndOnlyThat(t *testing.T) {
	find := func(all []Difference, name string) Difference {
		i := slices.IndexFunc(all, func(d Difference) bool { return d.Name == name })
		if i < 0 {
			t.Fatalf("%s is not compared", name)
		}
		return all[i]
	}
	a, slower := madeUp(t, 1), madeUp(t, 1.05)
	same := Compare(a, madeUp(t, 1))
	if d := find(same, "outbound_echo_vs_none"); !d.Alike {
		t.Errorf("two equal runs differ: %+v", d)
	}
	changed := Compare(a, slower)
	if d := find(changed, "outbound_echo_vs_none"); d.Alike || d.P == nil || *d.P >= alpha {
		t.Errorf("5 %% more is not seen: %+v", d)
	}
	if d := find(changed, "rules_10000_vs_1"); !d.Alike {
		t.Errorf("what did not change differs: %+v", d)
	}
	text := DifferenceTable(changed)
	if !slices.ContainsFunc(text.Lines, func(l []string) bool { return l[0] == "outbound_echo_vs_none" && strings.Contains(l[3], "+5.0 %") }) {
		t.Errorf("the table does not say +5.0 %%: %v", text.Lines)
	}
	slower.Machine.Kernel = "0.0.1"
	if got := Unlike(a, slower); len(got) != 1 || !strings.Contains(got[0], "0.0.1") {
		t.Errorf("another kernel gave the warnings %q", got)
	}
}

func TestTheShortTableHasTheCheaperIptables(t *testing.T) {
	for _, want := range [][]string{
		{"outbound connect + echo + close: added", "20.0 us", "2.0 us", "1.0 us"},
		{"echo on an open connection, inbound: added", "20.0 %", "2.0 %", "1.0 %"},
		{"setting up one pod", "0.12 ms", "0.10 ms", "0.10 ms"},
	} {
		lines := inMicroseconds(madeUp(t, 1)).ShortTable().Lines
		if !slices.ContainsFunc(lines, func(l []string) bool { return slices.Equal(l, want) }) {
			t.Errorf("there is no line %v in %v", want, lines)
		}
	}
}

// inMicroseconds makes the durations of a made up result a thousand times longer.
func inMicroseconds(r *Result) *Result {
	for name := range r.Ratios {
		if strings.HasSuffix(name, "_ns") {
			r.Ratios[name] *= 1000
		}
	}
	for i := range r.Rows {
		r.Rows[i].P50.Value *= 1000
	}
	return r
}

func TestAGoalIsMetByTheWholeInterval(t *testing.T) {
	g := goal{"", "x", 0.99, 1.01}
	for _, c := range []struct {
		low, high float64
		want      string
	}{
		{0.99, 1.01, "met"}, {0.98, 1, "undecided"}, {1, 1.02, "undecided"}, {0.9, 1.1, "undecided"}, {1.02, 1.03, "missed"}, {0.9, 0.98, "missed"},
	} {
		if got := g.verdict([2]float64{c.low, c.high}); got != c.want {
			t.Errorf("%v to %v: %s, want %s", c.low, c.high, got, c.want)
		}
	}
}

func TestEveryGoalIsOfARatioThatAFullRunHas(t *testing.T) {
	r := madeUp(t, 1)
	for _, g := range goals {
		_, there := r.Ratios[g.ratio]
		if !there && !strings.HasPrefix(g.ratio, "ceiling4_") && !strings.HasPrefix(g.ratio, "pod_memory_") {
			t.Errorf("no workload gives %s", g.ratio)
		}
	}
	lines := r.GoalTable().Lines
	if i := slices.IndexFunc(lines, func(l []string) bool { return strings.HasPrefix(l[0], "outbound connection") }); i < 0 || lines[i][2] != "0.100" || lines[i][4] != "met" {
		t.Errorf("0.1 where at most 0.15 is the goal gave %v", lines)
	}
}
