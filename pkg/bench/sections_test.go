package bench

import (
	"slices"
	"strings"
	"testing"
)

func TestParseWrk(t *testing.T) {
	const text = `Running 1s test @ http://192.0.2.1:80/
  Latency Distribution
     50%  388.00us
     99%    1.50ms
Requests/sec:  39543.26
`
	got, err := parseWrk(text)
	if err != nil || got[rate][0] != 39543.26 || got[p99][0] != 1.5e6 {
		t.Errorf("read %v, %v; want 39543.26 requests and 1.5e6 ns", got, err)
	}
	for name, bad := range map[string]string{
		"errors":       text + "Socket errors: connect 0, read 3, write 0, timeout 0\n",
		"bad answers":  text + "Non-2xx or 3xx responses: 12\n",
		"no latencies": "Requests/sec:  1.0\n",
		"nothing":      "",
	} {
		if _, err := parseWrk(bad); err == nil {
			t.Errorf("%s: no complaint", name)
		}
	}
}

func TestManyRulesAreDifferentAndSpareTheDestinations(t *testing.T) {
	r := manyRules(10000)
	if n := len(slices.Compact(r.ExcludeOutboundCIDRs)); n != 10000 {
		t.Errorf("%d different CIDRs, want 10000", n)
	}
	dialled := (&backend{definition: named(definitions(), sluice)[0]}).outbound().dial
	for _, p := range r.ExcludeOutboundCIDRs {
		if p.Contains(dialled.Addr()) {
			t.Errorf("%s excludes %s, which is measured", p, dialled)
		}
	}
	if _, err := r.Normalise(); err != nil {
		t.Error(err)
	}
}

func TestOnlyKnowsEveryWorkload(t *testing.T) {
	if err := (Options{Only: []string{"outbound_connect", "haproxy_close", "ceiling4", "pods", "cni_add"}}).check(); err != nil {
		t.Error(err)
	}
	err := Options{Only: []string{"outbound_conect"}}.check()
	if err == nil || !strings.Contains(err.Error(), "outbound_conect") || !strings.Contains(err.Error(), "outbound_connect,") {
		t.Errorf("a misspelt workload gave %v, want its name and the choice", err)
	}
}

func TestQuickRunsWhatTheBandsAndPromisesNeed(t *testing.T) {
	quick := Options{Quick: true}
	ran := map[string]bool{}
	for _, sec := range sections() {
		for _, w := range sec.workloads {
			if ran[w] {
				t.Errorf("two sections have the workload %s", w)
			}
			if sec.runs(quick, 0) && sec.has(quick, w) {
				ran[w] = true
			}
			if !sec.runs(Options{}, 0) || !sec.has(Options{}, w) {
				t.Errorf("a full run leaves %s out", w)
			}
		}
	}
	for _, w := range append([]string{"pods", "enroll", "bystander_connect", "bystander_getsockopt"}, banded...) {
		if !ran[w] {
			t.Errorf("a quick run leaves %s out", w)
		}
	}
}

func TestEveryRedirectingBackendIsComparedByOneFloor(t *testing.T) {
	defs := definitions()
	if len(of(defs, floor)) != 1 || len(of(defs, ours)) != 1 {
		t.Fatal("there is one floor, and one Sluice as it is by default")
	}
	for _, d := range defs {
		if d.redirects() != (d.role == rival || d.role == ours || d.role == variant) {
			t.Errorf("%s: its role does not fit what it does", d.name)
		}
	}
}

func TestAQuickRunSaysWhatItLeavesOut(t *testing.T) {
	r := &Result{LeftOut: map[string]string{}}
	r.leaveOutLong(Options{Quick: true})
	said := strings.Join(slices.Collect(keys(r.LeftOut)), ", ")
	for _, sec := range sections() {
		for _, w := range sec.workloads {
			has, says := sec.has(Options{Quick: true}, w), slices.Contains(strings.Split(said, ", "), w)
			if has == says {
				t.Errorf("%s: a quick run has it: %t, and says that it is left out: %t", w, has, says)
			}
		}
	}
	full := &Result{LeftOut: map[string]string{}}
	if full.leaveOutLong(Options{}); len(full.LeftOut) > 0 {
		t.Errorf("a full run leaves out %v", full.LeftOut)
	}
}

func TestOnlyNamesWhatQuickRunsLeaveOut(t *testing.T) {
	o := Options{Quick: true, Only: []string{"direct_echo", "ceiling4"}}
	for _, sec := range sections() {
		want := sec.name == "connections" || sec.name == "ceiling"
		if got := sec.runs(o, 0); got != want {
			t.Errorf("%s runs: %t, want %t", sec.name, got, want)
		}
		for _, w := range sec.workloads {
			if got, want := sec.has(o, w), slices.Contains(o.Only, w); got != want {
				t.Errorf("%s is measured: %t, want %t", w, got, want)
			}
		}
	}
}

func TestABusyMachineIsNoted(t *testing.T) {
	for load, noted := range map[string]bool{"0.00 0.00 0.00 1/99 7": false, "0.50 9.00 9.00 1/99 7": false, "0.51 0.10 0.10 1/99 7": true, "183.2 1 1": true, "": false} {
		if got := otherWork(load, 2); (got != "") != noted {
			t.Errorf("load %q on two CPUs gave the note %q", load, got)
		}
	}
}
