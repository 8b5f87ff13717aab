package ctl

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/bench"
	"github.com/sluice-mesh/sluice/pkg/report"
)

func newBench(c *common) *cobra.Command {
	opts := bench.Options{CPU: bench.LastCPU()}
	var check bool
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure Sluice beside Istio's rules in iptables and nftables, and no mesh at all",
		Long: `bench makes namespaces, cgroups and a bpffs of its own, measures in them, and
removes them. It needs neither Kubernetes nor a Sluice that is up, and leaves
one that is up alone. What is measured, and what it does not show, is in
docs/benchmark.md.

Client and server share one CPU, and the backends take short turns in random
order: compare within one run, by the ratios.`,
		Example: `  sluicectl bench --quick
  sluicectl bench --only outbound_connect,rules --out /var/tmp/bench
  sluicectl bench compare before/bench.json after/bench.json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.bench(cmd, opts, check) },
	}
	addOutput(cmd, c)
	f := cmd.Flags()
	f.BoolVar(&opts.Quick, "quick", false, "the shorter workloads and fewer rounds: under 90 seconds, wider intervals")
	f.IntVar(&opts.Rounds, "rounds", 0, "rounds of each workload in each incarnation (default: by --quick)")
	f.StringSliceVar(&opts.Only, "only", nil, "workloads to run (default: all)")
	f.IntVar(&opts.CPU, "cpu", opts.CPU, "CPU that clients and servers share")
	f.StringVar(&opts.Out, "out", "bench-out", "directory for bench.json, bench.md, the charts and the rules that were loaded")
	f.BoolVar(&check, "check", false, "then judge by the bands of docs/benchmark.md: exit status 1 if one is left, or if the check does not notice a delay")
	f.DurationVar(&opts.Delay, "delay", 0, "make Sluice's proxy stand-in slower by this, to see that it is seen")
	cobra.CheckErr(f.MarkHidden("delay"))
	cmd.AddCommand(newBenchWorker(c), newBenchCompare(c))
	return cmd
}

func (c *common) bench(cmd *cobra.Command, opts bench.Options, check bool) error {
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
	if opts.CPU >= runtime.NumCPU() {
		return fmt.Errorf("there is no CPU %d: the last is %d", opts.CPU, bench.LastCPU())
	}
	if err := os.MkdirAll(opts.Out, 0o755); err != nil {
		return fmt.Errorf("make the output directory: %w", err)
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
	if err := result.WriteFiles(opts.Out); err != nil {
		return err
	}
	if err := c.printBench(format, result); err != nil || !check {
		return err
	}
	return bench.Check(ctx, result, opts, c.env.Err)
}

func (c *common) printBench(format report.Format, result *bench.Result) error {
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
	fmt.Fprintln(c.env.Out)
	if err := report.Write(c.env.Out, format, nil, result.PartTable()); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(result.LeftOut)) {
		fmt.Fprintf(c.env.Out, "\nLeft out: %s: %s\n", name, result.LeftOut[name])
	}
	for _, name := range slices.Sorted(maps.Keys(result.Notes)) {
		fmt.Fprintf(c.env.Out, "\nNote: %s: %s\n", name, result.Notes[name])
	}
	fmt.Fprintf(c.env.Out, "\n%d incarnations of %d rounds in %.0f s on %s, kernel %s; %s.\n", result.Settings.Incarnations, result.Settings.Rounds, result.Seconds, result.Machine.CPU, result.Machine.Kernel, result.Settings.Placement)
	return nil
}

// benchProgress draws a bar on a terminal, and elsewhere says every few seconds how
// far it is.
func (c *common) benchProgress() func(bench.Progress) {
	const width = 30
	file, isFile := c.env.Err.(*os.File)
	terminal := false
	if isFile {
		_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
		terminal = err == nil
	}
	var last time.Time
	return func(p bench.Progress) {
		if terminal {
			full := width * p.Done / max(p.Of, 1)
			fmt.Fprintf(c.env.Err, "\r[%s%s] %3d %%  %-20s", strings.Repeat("#", full), strings.Repeat(".", width-full), 100*p.Done/max(p.Of, 1), p.Workload)
			if p.Done == p.Of {
				fmt.Fprintln(c.env.Err)
			}
			return
		}
		if time.Since(last) < 3*time.Second && p.Done < p.Of {
			return
		}
		last = time.Now()
		fmt.Fprintf(c.env.Err, "bench: %d of %d: %s\n", p.Done, p.Of, p.Workload)
	}
}

func newBenchCompare(c *common) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "compare A.json B.json",
		Short: "Compare the ratios of two runs, by benchstat's test",
		Long: `compare says for each ratio that two runs have in common whether they differ, by
benchstat's test (Mann-Whitney U, 0.05) over their incarnations. "~" is no
difference that could be shown. Absolute figures of two runs are not compared:
machines change their speed.`,
		Args: twoFiles,
		RunE: func(_ *cobra.Command, args []string) error { return c.benchCompare(args[0], args[1]) },
	}
	addOutput(cmd, c)
	return cmd
}

func (c *common) benchCompare(pathA, pathB string) error {
	format, err := c.format()
	if err != nil {
		return err
	}
	a, err := bench.Read(pathA)
	if err != nil {
		return err
	}
	b, err := bench.Read(pathB)
	if err != nil {
		return err
	}
	for _, warning := range bench.Unlike(a, b) {
		fmt.Fprintln(c.env.Err, "careful:", warning)
	}
	all := bench.Compare(a, b)
	return report.Write(c.env.Out, format, all, bench.DifferenceTable(all))
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
	f.BoolVar(&id.Inherits, "inherits", false, "descriptor 3 is a listener")
	return cmd
}
