package bench

import (
	"context"
	"fmt"
	"io"
	"time"
)

// band is what CI demands of a ratio.
type band struct {
	ratio string
	most  float64
	delay bool // the self-check's delay is in what it measures
}

var bands = []band{
	{"outbound_connect_added_vs_iptables", 0.25, true},
	{"inbound_connect_sluice_noguard_added_vs_iptables", 0.15, true},
	{"inbound_connect_added_vs_iptables", 0.30, true}, // the goal is 0.15 too: docs/benchmark.md
	{"outbound_echo_vs_none", 1.02, true},
	{"inbound_echo_vs_none", 1.02, true},
	{"rules_10000_vs_1", 1.15, false},
}

// banded are the workloads that the bands are about.
var banded = []string{"outbound_connect", "inbound_connect", "outbound_echo", "inbound_echo", "rules"}

// Delay is what the self-check puts into the path.
const Delay = 5 * time.Microsecond

// judge prints each band and what was measured, and returns those that were left:
// the whole 95 % interval is beyond. A ratio that was not measured is beyond too.
func (r *Result) judge(w io.Writer) (beyond []band) {
	for _, b := range bands {
		interval, measured := r.Intervals[b.ratio]
		verdict := "ok"
		switch {
		case !measured:
			verdict = "NOT MEASURED"
		case interval[0] > b.most:
			verdict = "BEYOND"
		case r.Ratios[b.ratio] > b.most:
			verdict = "ok (the median is beyond, its interval is not)"
		}
		if !measured || interval[0] > b.most {
			beyond = append(beyond, b)
		}
		fmt.Fprintf(w, "  %-48s %.3f (%.3f to %.3f), at most %.2f: %s\n", b.ratio, r.Ratios[b.ratio], interval[0], interval[1], b.most, verdict)
	}
	return beyond
}

// selfTests is how often the check tests itself at most: where a machine is so
// busy that the intervals are wide, a delay may not show at once.
const selfTests = 3

// Check judges a run by the bands. What is beyond is measured once more, and has to
// be beyond again. Then it tests itself: with a delay in Sluice's path the bands
// must be left. What it does goes to w.
func Check(ctx context.Context, first *Result, opts Options, w io.Writer) error {
	opts.Out, opts.Only = "", banded
	fmt.Fprintln(w, "Bands:")
	beyond := first.judge(w)
	if len(beyond) > 0 {
		fmt.Fprintln(w, "Measured once more, for that may have been the machine:")
		again, err := Run(ctx, opts)
		if err != nil {
			return err
		}
		beyond = again.judge(w)
	}
	if len(beyond) > 0 {
		return fmt.Errorf("%s is beyond its band, twice: see above", beyond[0].ratio)
	}
	return selfTest(ctx, opts, w)
}

// selfTest sees whether the bands are left when Sluice is slowed down.
func selfTest(ctx context.Context, opts Options, w io.Writer) error {
	opts.Delay = Delay
	left := map[string]bool{}
	for i := range selfTests {
		fmt.Fprintf(w, "The check's test of itself, %s of delay at each accept and echo (%d of at most %d):\n", Delay, i+1, selfTests)
		slowed, err := Run(ctx, opts)
		if err != nil {
			return err
		}
		for _, b := range slowed.judge(w) {
			left[b.ratio] = true
		}
		if noticed(left) == nil {
			break
		}
	}
	return noticed(left)
}

// noticed says whether every band that a delay is in has been left.
func noticed(left map[string]bool) error {
	for _, b := range bands {
		if b.delay && !left[b.ratio] {
			return fmt.Errorf("the check cannot be trusted: %s stays in its band although %s of delay were put in", b.ratio, Delay)
		}
	}
	return nil
}
