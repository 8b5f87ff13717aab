// Package bench measures Sluice beside Istio's rules in iptables and nftables and
// no mesh at all, on one machine, in namespaces of its own. It owns the load
// generators, the interleaving and the arithmetic; it refuses to print a figure of
// a backend that did not do what it should.
package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// Options of a run.
type Options struct {
	Quick    bool          // fewer rounds and the shorter workloads: under 90 s
	Rounds   int           // rounds of each workload in each incarnation; 0 means by Quick
	CPU      int           // the CPU that clients and servers share
	Only     []string      // workloads; empty means all
	Out      string        // directory for the rules that were loaded; empty: nowhere
	Delay    time.Duration // Sluice's proxy stand-in is slower by this: Check's test of itself
	Progress func(Progress)
}

// Progress is where a run is.
type Progress struct {
	Workload string
	Done, Of int // parts of the run
}

// LastCPU is the default for Options.CPU: interrupts usually go to the first.
func LastCPU() int { return runtime.NumCPU() - 1 }

// Two pods that are set up alike differ by some hundred nanoseconds for as long
// as they live, by where their memory happens to be. So a run consists of
// several incarnations, each with new namespaces, processes and programs.
const (
	quickRounds, quickIncarnations = 12, 6
	fullRounds, fullIncarnations   = 24, 10
)

func (o Options) rounds() int {
	switch {
	case o.Rounds > 0:
		return o.Rounds
	case o.Quick:
		return quickRounds
	}
	return fullRounds
}

func (o Options) incarnations() int {
	if o.Quick {
		return quickIncarnations
	}
	return fullIncarnations
}

// section is a set of workloads that share what is made for them.
type section struct {
	name      string
	workloads []string // their names, which Only chooses from
	// quick and full are how many incarnations have this section, in runs of either
	// kind; 0 is all of them, -1 none.
	quick, full int
	long        []string // workloads that quick runs leave out
	// open makes what the workloads need; what it registers with closing is undone
	// after the section.
	open func(s *stage) ([]workload, error)
}

func sections() []section {
	return slices.Concat(connectionSections(), bystanderSections(), rulesSections(), podsSections(), setupSections(),
		dnsSections(), streamSections(), ceilingSections(), haproxySections())
}

func (sec section) runs(o Options, incarnation int) bool {
	times := sec.full
	if o.Quick {
		times = sec.quick
	}
	if times == 0 {
		times = o.incarnations()
	}
	if len(o.Only) > 0 && times < 0 && o.Quick {
		times = 1 // asked for by name
	}
	return incarnation < times && slices.ContainsFunc(sec.workloads, func(name string) bool { return sec.has(o, name) })
}

// has says whether a run has one of a section's workloads.
func (sec section) has(o Options, name string) bool {
	if len(o.Only) > 0 {
		return slices.Contains(o.Only, name)
	}
	return !o.Quick || sec.quick >= 0 && !slices.Contains(sec.long, name)
}

// errLong is why a quick run leaves something out.
var errLong = errors.New("takes long: in full runs only")

func (o Options) check() error {
	var known []string
	for _, sec := range sections() {
		known = append(known, sec.workloads...)
	}
	for _, name := range o.Only {
		if !slices.Contains(known, name) {
			return fmt.Errorf("there is no workload %q: choose from %s", name, strings.Join(known, ", "))
		}
	}
	return nil
}

// stage is where one incarnation of one section plays.
type stage struct {
	ctx     context.Context
	opts    Options
	node    *node
	result  *Result
	closers []func() error
}

// closing registers what is to be undone, last first.
func (s *stage) closing(undo func() error) { s.closers = append(s.closers, undo) }

// Close ends every process and removes what was made. It is idempotent.
func (s *stage) Close() error {
	var errs error
	for _, undo := range slices.Backward(s.closers) {
		errs = errors.Join(errs, undo())
	}
	s.closers = nil
	return errs
}

// leaveOut does without a backend, and remembers why.
func (s *stage) leaveOut(name string, why error) { s.result.LeftOut[name] = why.Error() }

func (s *stage) worker(name string, ns *netns.NetNS, cgroup string, id int) (*process, error) {
	return startWorker(s.ctx, name, ns, cgroup, Identity{UID: id, GID: id, CPU: s.opts.CPU})
}

// Run measures everything and leaves nothing behind, also when ctx ends
// meanwhile.
func Run(ctx context.Context, opts Options) (*Result, error) {
	if opts.Progress == nil {
		opts.Progress = func(Progress) {}
	}
	if err := opts.check(); err != nil {
		return nil, err
	}
	started := time.Now()
	all := series{}
	result := newResult(opts, started)
	load, _ := os.ReadFile("/proc/loadavg") // every kernel has it
	if note := otherWork(string(load), result.Machine.CPUs); note != "" {
		result.Notes["the machine"] = note
	}
	done, of := 0, 0
	for _, sec := range sections() {
		for i := range opts.incarnations() {
			if sec.runs(opts, i) {
				of++
			}
		}
	}
	if len(opts.Only) == 0 {
		result.leaveOutLong(opts)
	}
	for i := range opts.incarnations() {
		err := incarnate(ctx, opts, i, all, result, func(name string) {
			opts.Progress(Progress{name, done, of})
			done++
		})
		if err != nil {
			return nil, err
		}
	}
	opts.Progress(Progress{"done", done, of})
	result.summarise(all)
	result.Seconds = time.Since(started).Seconds()
	return result, nil
}

// leaveOutLong notes what a quick run does not have.
func (r *Result) leaveOutLong(o Options) {
	for _, sec := range sections() {
		missing := slices.DeleteFunc(slices.Clone(sec.workloads), func(name string) bool { return sec.has(o, name) })
		if len(missing) > 0 {
			r.LeftOut[strings.Join(missing, ", ")] = errLong.Error() + ", or named by --only"
		}
	}
}

// incarnate plays each section once, on a node of their own.
func incarnate(ctx context.Context, opts Options, incarnation int, all series, result *Result, starts func(name string)) (err error) {
	spent := result.spends("node")
	node, err := newNode()
	if err != nil {
		return err
	}
	spent()
	defer func() {
		spent := result.spends("node, its end")
		err = errors.Join(err, node.Close())
		spent()
	}()
	for _, sec := range sections() {
		if !sec.runs(opts, incarnation) {
			continue
		}
		starts(sec.name)
		spent := result.spends(sec.name)
		s := &stage{ctx: ctx, opts: opts, node: node, result: result}
		if err := errors.Join(s.play(sec, incarnation, all), s.Close()); err != nil {
			return err
		}
		spent()
	}
	return nil
}

// play is one incarnation of one section.
func (s *stage) play(sec section, incarnation int, all series) error {
	workloads, err := sec.open(s)
	if err != nil {
		return fmt.Errorf("%s: %w", sec.name, err)
	}
	for _, w := range workloads {
		if !sec.has(s.opts, w.name) || len(w.backends) == 0 {
			continue
		}
		if w.rounds == 0 {
			w.rounds = s.opts.rounds()
		}
		if err := w.measure(s.ctx, all.of(w), incarnation); err != nil {
			return err
		}
	}
	return nil
}
