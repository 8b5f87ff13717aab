package iptables

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

var update = flag.Bool("update", false, "write the golden files")

// The oracle compares these rules with what Istio's own program writes (make
// oracle). Here a change of the text that the benchmark loads has to be meant.
func TestDefaultRules(t *testing.T) {
	r, err := rules.Default().Normalise()
	if err != nil {
		t.Fatal(err)
	}
	got := Lean(Istio(r, false, ""))
	const golden = "testdata/default.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("default rules (- golden, + now):\n%s", diff)
	}
}

func TestOmitLeavesOutTheLinesOfOneNameOnly(t *testing.T) {
	r, err := rules.Default().Normalise()
	if err != nil {
		t.Fatal(err)
	}
	whole, without := Istio(r, false, ""), Istio(r, false, "O14")
	if lost := strings.Count(whole, "\n") - strings.Count(without, "\n"); lost != 1 {
		t.Errorf("without O14 there are %d lines fewer, want 1", lost)
	}
	if strings.Contains(without, "-A ISTIO_OUTPUT -j ISTIO_REDIRECT") {
		t.Error("O14 is there though it was to be left out")
	}
}

func TestLeanKeepsEveryRule(t *testing.T) {
	r := rules.Default()
	r.DNS = true
	r, err := r.Normalise()
	if err != nil {
		t.Fatal(err)
	}
	whole := Istio(r, false, "")
	lean := Lean(whole)
	if strings.Contains(lean, "*mangle") || !strings.Contains(lean, "*raw") || !strings.Contains(lean, ":ISTIO_OUTPUT_DNS") {
		t.Errorf("want nat and raw, without mangle:\n%s", lean)
	}
	if was, is := strings.Count(whole, "-A "), strings.Count(lean, "-A "); was != is {
		t.Errorf("%d of %d rules are left", is, was)
	}
}
