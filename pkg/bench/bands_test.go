package bench

import (
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// inBands is a result in which every band holds.
func inBands() *Result {
	r := &Result{Ratios: map[string]float64{}, Intervals: map[string][2]float64{}}
	for _, b := range bands {
		r.Ratios[b.ratio], r.Intervals[b.ratio] = b.most-0.01, [2]float64{b.most - 0.02, b.most + 0.01}
	}
	return r
}

func TestABandIsLeftOnlyByTheWholeInterval(t *testing.T) {
	for _, b := range bands {
		r := inBands()
		if got := r.judge(io.Discard); len(got) > 0 {
			t.Fatalf("%v is beyond though all hold", got)
		}
		r.Ratios[b.ratio], r.Intervals[b.ratio] = b.most+0.01, [2]float64{b.most - 0.001, b.most + 0.02}
		if got := r.judge(io.Discard); len(got) > 0 {
			t.Errorf("%s: the interval reaches into the band, and %v is beyond", b.ratio, got)
		}
		r.Intervals[b.ratio] = [2]float64{b.most + 0.001, b.most + 0.02}
		if got := r.judge(io.Discard); !slices.Equal(got, []band{b}) {
			t.Errorf("%s: the whole interval is beyond, and the verdict is %v", b.ratio, got)
		}
	}
}

func TestWhatWasNotMeasuredIsBeyond(t *testing.T) {
	for _, b := range bands {
		r := inBands()
		delete(r.Ratios, b.ratio)
		delete(r.Intervals, b.ratio)
		var out strings.Builder
		if got := r.judge(&out); !slices.Equal(got, []band{b}) || !strings.Contains(out.String(), "NOT MEASURED") {
			t.Errorf("without %s the verdict is %v:\n%s", b.ratio, got, out.String())
		}
	}
}

func TestADelayMustBeNoticedInEveryBandItIsIn(t *testing.T) {
	left := map[string]bool{}
	for _, b := range bands {
		if b.delay {
			left[b.ratio] = true
		}
	}
	if err := noticed(left); err != nil || len(left) < 5 {
		t.Errorf("all of %d left: %v", len(left), err)
	}
	for ratio := range left {
		rest := maps.Clone(left)
		delete(rest, ratio)
		if err := noticed(rest); err == nil || !strings.Contains(err.Error(), ratio) {
			t.Errorf("%s did not leave its band, and the check says %v", ratio, err)
		}
	}
}

// What a band is about has to be slower when the check tests itself, and nothing else.
func TestTheDelayIsInEveryWayOfSluiceAndInNothingElse(t *testing.T) {
	s := &stage{opts: Options{Delay: Delay}}
	for _, d := range definitions() {
		want := time.Duration(0)
		if d.redirects() && d.role != rival {
			want = Delay
		}
		for name, legOf := range map[string]func(*backend) leg{"outbound": (*backend).outbound, "inbound": (*backend).inbound} {
			if got := s.leg(&backend{definition: d}, legOf).delay; got != want {
				t.Errorf("%s, %s: slower by %s, want %s", d.name, name, got, want)
			}
		}
	}
}
