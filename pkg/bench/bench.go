// Package bench measures Sluice beside Istio's iptables rules and no mesh at
// all, on one machine, in namespaces of its own. It owns the load generators,
// the interleaving and the arithmetic; it refuses to print a figure of a
// backend that did not do what it should.
package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// Options of a run.
type Options struct {
	Quick    bool     // fewer rounds: under 90 s
	Rounds   int      // rounds of each workload in each incarnation; 0 means by Quick
	CPU      int      // the CPU that clients and servers share
	Only     []string // workloads; empty means all
	Progress func(Progress)
}

// Progress is where a run is.
type Progress struct {
	Incarnation, Incarnations int // from 1
	Workload                  string
	Done, Of                  int // rounds
}

// Two pods that are set up alike differ by some hundred nanoseconds for as long
// as they live, by where their memory happens to be. So a run consists of
// several incarnations, each with new namespaces, processes and programs.
const (
	quickRounds, quickIncarnations = 30, 4
	fullRounds, fullIncarnations   = 60, 10
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

// stage is one incarnation: everything that is made to be measured.
type stage struct {
	opts     Options
	node     *node
	backends map[string]*backend
	bare     *netns.NetNS // without any route, for callers
	callers  map[string]*process
	leftOut  map[string]string
}

// LastCPU is the default for Options.CPU: interrupts usually go to the first.
func LastCPU() int { return runtime.NumCPU() - 1 }

// Run measures everything and leaves nothing behind, also when ctx ends
// meanwhile.
func Run(ctx context.Context, opts Options) (*Result, error) {
	if opts.Progress == nil {
		opts.Progress = func(Progress) {}
	}
	started := time.Now()
	all := series{}
	result := newResult(opts, started)
	for i := range opts.incarnations() {
		if err := runOnce(ctx, opts, i, all, result.LeftOut); err != nil {
			return nil, err
		}
	}
	result.summarise(all)
	result.Seconds = time.Since(started).Seconds()
	return result, nil
}

func runOnce(ctx context.Context, opts Options, incarnation int, all series, leftOut map[string]string) (err error) {
	b := &stage{opts: opts, backends: map[string]*backend{}, callers: map[string]*process{}, leftOut: leftOut}
	defer func() { err = errors.Join(err, b.Close()) }()
	if err := b.setUp(ctx); err != nil {
		return err
	}
	setups, closeSetups, err := b.setups()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeSetups()) }()
	workloads, err := opts.chosen(append(append(b.connections(), b.bystanders()...), setups))
	if err != nil {
		return err
	}
	for _, w := range workloads {
		err := w.measure(ctx, all.of(w), incarnation, func(done, of int) {
			opts.Progress(Progress{incarnation + 1, opts.incarnations(), w.name, done, of})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *stage) setUp(ctx context.Context) error {
	var err error
	if b.node, err = newNode(); err != nil {
		return err
	}
	for _, def := range definitions() {
		back, err := start(ctx, def, b.node, b.opts.CPU)
		if err == nil {
			b.backends[def.name] = back
			err = back.prove()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			continue
		}
		if def.name == none || def.name == sluice {
			return fmt.Errorf("backend %s: %w", def.name, err)
		}
		b.leaveOut(def.name, err)
	}
	if b.bare, err = newNetNS(); err != nil {
		return err
	}
	if err := loopbackUp(b.bare); err != nil {
		return err
	}
	for name, cgroup := range map[string]string{withoutHooks: b.node.plain, withHooks: b.node.mesh} {
		if b.callers[name], err = startWorker(ctx, "bystander/"+name, b.bare, cgroup, Identity{appID, appID, b.opts.CPU}); err != nil {
			return err
		}
	}
	return nil
}

// leaveOut does without a backend, and remembers why.
func (b *stage) leaveOut(name string, why error) {
	if back := b.backends[name]; back != nil {
		why = errors.Join(why, back.Close())
		delete(b.backends, name)
	}
	b.leftOut[name] = why.Error()
}

// prove makes a few connections each way; run checks where they went.
func (b *backend) prove() error {
	for _, l := range []leg{b.outbound(), b.inbound(), b.direct()} {
		if _, err := l.run(job{Kind: jobDial, Count: 3, Size: echoBytes}); err != nil {
			return err
		}
	}
	return nil
}

// chosen are the workloads of Only.
func (o Options) chosen(all []workload) ([]workload, error) {
	if len(o.Only) == 0 {
		return all, nil
	}
	var out []workload
	var names []string
	for _, w := range all {
		names = append(names, w.name)
		if slices.Contains(o.Only, w.name) {
			out = append(out, w)
		}
	}
	for _, name := range o.Only {
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("there is no workload %q: choose from %s", name, strings.Join(names, ", "))
		}
	}
	return out, nil
}

// Close ends every process and removes what the run made. It is idempotent.
func (b *stage) Close() error {
	var errs error
	for name, back := range b.backends {
		errs = errors.Join(errs, back.Close())
		delete(b.backends, name)
	}
	for name, p := range b.callers {
		if p != nil {
			errs = errors.Join(errs, p.Close())
		}
		delete(b.callers, name)
	}
	if b.bare != nil {
		errs = errors.Join(errs, b.bare.Close())
	}
	if b.node != nil {
		errs = errors.Join(errs, b.node.Close())
	}
	return errs
}

func loopbackUp(ns *netns.NetNS) error {
	handle, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err == nil {
		err = handle.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}
