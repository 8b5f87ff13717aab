package ctl

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/bench"
	"github.com/sluice-mesh/sluice/pkg/report"
)

func newBench(c *common) *cobra.Command {
	opts := bench.Options{CPU: bench.LastCPU()}
	var out string
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure Sluice beside Istio's iptables rules and no mesh at all",
		Long: `bench makes namespaces, a cgroup and a bpffs of its own, measures in them, and
removes them. It needs neither Kubernetes nor a Sluice that is up, and leaves
one that is up alone. What is measured, and what it does not show, is in
docs/benchmark.md.

Client and server share one CPU, and the backends take short turns in random
order: compare within one run, by the ratios.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.bench(cmd, opts, out) },
	}
	addOutput(cmd, c)
	f := cmd.Flags()
	f.BoolVar(&opts.Quick, "quick", false, "fewer rounds: under 90 seconds, wider intervals")
	f.IntVar(&opts.Rounds, "rounds", 0, "rounds of each workload in each incarnation (default: by --quick)")
	f.StringSliceVar(&opts.Only, "only", nil, "workloads to run (default: all)")
	f.IntVar(&opts.CPU, "cpu", opts.CPU, "CPU that clients and servers share")
	f.StringVar(&out, "out", "", "directory for bench.json")
	cmd.AddCommand(newBenchWorker(c))
	return cmd
}

func (c *common) bench(cmd *cobra.Command, opts bench.Options, out string) error {
	format, err := c.format()
	if err != nil {
		return err
	}
	if err := needRoot(); err != nil {
		return err
	}
	if opts.Rounds < 0 || opts.CPU < 0 {
		return errors.New("--rounds and --cpu cannot be negative")
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	opts.Progress = c.benchProgress()
	result, err := bench.Run(ctx, opts)
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("interrupted; what the benchmark had made is removed: %w", err)
	}
	if err != nil {
		return err
	}
	if out != "" {
		if err := result.WriteFile(out); err != nil {
			return err
		}
	}
	if err := report.Write(c.env.Out, format, result, result.Table()); err != nil {
		return err
	}
	if format != report.Table {
		return nil
	}
	fmt.Fprintln(c.env.Out)
	if err := report.Write(c.env.Out, format, nil, result.RatioTable()); err != nil {
		return err
	}
	for name, why := range result.LeftOut {
		fmt.Fprintf(c.env.Out, "\nLeft out: %s: %s\n", name, why)
	}
	fmt.Fprintf(c.env.Out, "\n%d incarnations of %d rounds in %.0f s on %s, kernel %s; %s.\n", result.Settings.Incarnations, result.Settings.Rounds, result.Seconds, result.Machine.CPU, result.Machine.Kernel, result.Settings.Placement)
	return nil
}

// benchProgress says a few times per workload how far it is.
func (c *common) benchProgress() func(bench.Progress) {
	var last time.Time
	return func(p bench.Progress) {
		if time.Since(last) < time.Second && (p.Done < p.Of || p.Incarnation < p.Incarnations) {
			return
		}
		last = time.Now()
		fmt.Fprintf(c.env.Err, "bench: incarnation %d of %d: %s, round %d of %d\n", p.Incarnation, p.Incarnations, p.Workload, p.Done, p.Of)
	}
}

// newBenchWorker is this program as a load generator; bench starts it.
func newBenchWorker(c *common) *cobra.Command {
	var id bench.Identity
	cmd := &cobra.Command{
		Use:    "worker",
		Short:  "A load generator of the benchmark",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bench.Worker(id, cmd.InOrStdin(), c.env.Out)
		},
	}
	f := cmd.Flags()
	f.IntVar(&id.UID, "uid", 0, "user to become")
	f.IntVar(&id.GID, "gid", 0, "group to become")
	f.IntVar(&id.CPU, "cpu", 0, "CPU to keep to")
	return cmd
}
