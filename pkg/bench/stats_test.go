package bench

import (
	"math"
	"net/netip"
	"strings"
	"testing"
)

func series2(values ...float64) rounds {
	var r rounds
	for i, v := range values {
		r.add(v, i%2)
	}
	return r
}

func TestQuantile(t *testing.T) {
	sorted := []float64{1, 2, 3, 4}
	for q, want := range map[float64]float64{0: 1, 0.5: 2.5, 1: 4} {
		if got := quantile(sorted, q); got != want {
			t.Errorf("quantile %v of %v is %v, want %v", q, sorted, got, want)
		}
	}
	if got := quantile([]float64{7}, 0.9); got != 7 {
		t.Errorf("the quantile of one value is %v, want it", got)
	}
}

func TestEstimate(t *testing.T) {
	e := estimate(series2(5, 1, 4, 2, 3, math.NaN(), math.Inf(1)))
	if e.Value != 3 || e.Low > e.Value || e.High < e.Value || e.Low < 1 || e.High > 5 {
		t.Errorf("estimate is %+v, want 3 in an interval within 1 to 5", e)
	}
	if again := estimate(series2(5, 1, 4, 2, 3, math.NaN(), math.Inf(1))); again != e {
		t.Errorf("the same samples gave %+v, then %+v", e, again)
	}
	if got := estimate(rounds{}); got != (Estimate{}) {
		t.Errorf("estimate of nothing is %+v", got)
	}
}

// Incarnations that differ widen the interval, however many rounds each has.
func TestEstimateSeesIncarnations(t *testing.T) {
	var r rounds
	for i := range 400 {
		r.add(float64(i%4), i%4)
	}
	if e := estimate(r); e.High-e.Low < 1 {
		t.Errorf("four incarnations at 0, 1, 2 and 3 have the interval %+v, want a wide one", e)
	}
}

func TestAdded(t *testing.T) {
	got := added(series2(12, 24), series2(20, 40), series2(10, 20))
	if len(got.values) != 2 || got.values[0] != 0.2 || got.values[1] != 0.2 {
		t.Errorf("(12-10)/(20-10) and (24-20)/(40-20) gave %v", got.values)
	}
	if got := added(series2(1), rounds{}, series2(1)); len(got.values) != 0 {
		t.Errorf("a missing backend gave %v", got.values)
	}
}

func TestCheck(t *testing.T) {
	dial := netip.MustParseAddrPort("198.18.0.1:80")
	answer := func(n int, a string) reply { return reply{Answered: n, Original: netip.MustParseAddrPort(a)} }
	for name, c := range map[string]struct {
		redirected bool
		served     reply
		complaint  string
	}{
		"redirected":                   {true, answer(3, "198.18.0.64:80"), ""},
		"not redirected":               {false, reply{}, ""},
		"redirected though it is none": {false, answer(1, "198.18.0.1:80"), "nothing should redirect"},
		"one escaped":                  {true, answer(2, "198.18.0.1:80"), "only 2 of 3"},
		"another's destination":        {true, answer(3, "198.18.0.65:80"), "said 198.18.0.65:80"},
		"another port":                 {true, answer(3, "198.18.0.1:15001"), "said 198.18.0.1:15001"},
	} {
		t.Run(name, func(t *testing.T) {
			err := leg{dial: dial, addrs: 64, redirected: c.redirected}.check(c.served, 3)
			if (err == nil) != (c.complaint == "") || err != nil && !strings.Contains(err.Error(), c.complaint) {
				t.Errorf("got %v, want %q", err, c.complaint)
			}
		})
	}
}

func TestAlikeIsMannWhitneysTest(t *testing.T) {
	low, high := []float64{1, 2, 3, 4, 5}, []float64{11, 12, 13, 14, 15}
	if p := alike(low, high); p > 0.01 {
		t.Errorf("samples without overlap have P %v, want less than 0.01", p)
	}
	if p := alike(low, low); p < 0.5 {
		t.Errorf("the same samples have P %v", p)
	}
	for n := range 4 {
		if p := alike(low[:n], high); !math.IsNaN(p) {
			t.Errorf("%d samples have P %v, want none: too few", n, p)
		}
	}
	if p := alike(low[:4], high[:4]); p >= alpha {
		t.Errorf("four samples without overlap have P %v, want less than %v", p, alpha)
	}
}

// Rounds of one incarnation resemble each other: they are not as many samples.
func TestUnitsAreIncarnations(t *testing.T) {
	if got := series2(1, 10, 2, 20, 3, 30).units(); len(got) != 2 || got[0] != 2 || got[1] != 20 {
		t.Errorf("two incarnations of three rounds are the units %v, want 2 and 20", got)
	}
	var one rounds
	one.add(1, 0)
	one.add(2, 0)
	if got := one.units(); len(got) != 2 {
		t.Errorf("the rounds of the only incarnation are the units %v", got)
	}
}

// A tail takes many samples: those of an incarnation, or else of all together.
func TestTail(t *testing.T) {
	f := &figures{all: map[int][]float64{}}
	for i := range 3 {
		for v := range 100 {
			f.all[i] = append(f.all[i], float64(1000*i+v))
		}
	}
	for least, want := range map[int]float64{100: 1049.5, 101: 1049.5, 300: 1049.5, 301: 0} {
		if got := f.tail(0.5, least); got != want {
			t.Errorf("the middle, if it takes %d samples, is %v, want %v", least, got, want)
		}
	}
	if got := f.tail(0.99, 100); got != 1098.01 {
		t.Errorf("99 %% of the middle incarnation are below %v, want 1098.01", got)
	}
	if got := f.tail(0.99, 300); got < 2090 {
		t.Errorf("99 %% of all samples are below %v, want more than 2090", got)
	}
}
