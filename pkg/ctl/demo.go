package ctl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/demo"
	"github.com/sluice-mesh/sluice/pkg/report"
)

func newDemo(c *common) *cobra.Command {
	var opts demo.Options
	var broken string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Watch a real proxy's traffic being redirected, in pods of its own",
		Long: `demo shows all of Sluice on this machine in a few seconds, with parts that are
not Sluice's own: the reference CNI plugins wire two pods, and in one of them
runs HAProxy as UID 1337 without capabilities, where Envoy would be. It listens
on 15001 and 15006 and asks the kernel with SO_ORIGINAL_DST where a connection
was going. (For outbound IPv6 a helper of the demo's asks in its place and hands
the connection on: HAProxy itself asks for IPv4 only.)

Traffic first flows without Sluice. Then Sluice is loaded and one pod enrolled,
and each line shows what was expected and what happened: which way connections
went, what everybody on it sees of the others, what is left alone, that nothing
passes when the proxy is gone, and that nothing is left after "down".

It needs root, HAProxy, the CNI plugins and bpftool (hack/deps.sh demo installs
them), and no network. Everything happens in network, mount and PID namespaces
of its own, below a cgroup and a bpffs of its own: the machine's interfaces,
routes, settings and firewall are not touched, and everything is removed at the
end, also after Ctrl-C. A Sluice that is up on this machine is not disturbed.

The exit status is 0 only if every line is ok.`,
		Example: `  sluicectl demo
  sluicectl demo -o json | jq '.[] | select(.ok | not)'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := c.format()
			if err != nil {
				return err
			}
			switch opts.Break = demo.Break(broken); opts.Break {
			case demo.BreakNothing, demo.BreakEnroll, demo.BreakProxy, demo.BreakDown:
			default:
				return fmt.Errorf("--break: %q is not enroll, proxy or down", broken)
			}
			return c.demo(cmd, opts, format)
		},
	}
	addOutput(cmd, c)
	f := cmd.Flags()
	f.StringVar(&opts.Cgroup, "cgroup", "", "cgroup2 directory in which the demo makes its own (default: the true root of cgroup2)")
	f.StringVar(&opts.Tools.CNI, "cni-path", "", "directories of the CNI plugins, separated by colons (default: $CNI_PATH, /usr/lib/cni, /opt/cni/bin)")
	f.StringVar(&opts.Tools.HAProxy, "haproxy", "", "the HAProxy to use (default: the one on the PATH)")
	f.StringVar(&broken, "break", "", "leave something out on purpose, to see lines fail: enroll, proxy or down")
	cobra.CheckErr(f.MarkHidden("break"))
	return cmd
}

func (c *common) demo(cmd *cobra.Command, opts demo.Options, format report.Format) error {
	if err := needRoot(); err != nil {
		return err
	}
	var err error
	if opts.Cgroup, err = defaultCgroup(opts.Cgroup); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	people := format == report.Table
	// Progress is not part of a program's list.
	printer := demo.Printer{Out: cmd.ErrOrStderr(), Quiet: true}
	if people {
		printer = demo.Printer{Out: cmd.OutOrStdout()}
		cmd.Println("Sluice redirects a pod's TCP connections to its proxy. Here are two pods, a proxy, and Sluice; the machine itself is not touched.")
	}
	opts.Show = printer
	began := time.Now()
	results, err := demo.Run(ctx, opts)
	if !people && len(results) > 0 {
		err = errors.Join(err, report.Write(cmd.OutOrStdout(), format, results, report.Rows{}))
	}
	if errors.Is(err, context.Canceled) {
		return errors.New("the demo was interrupted; everything it had made is removed")
	}
	if err != nil {
		return err
	}
	return conclude(cmd, people, results, time.Since(began))
}

// conclude says in one sentence how it went.
func conclude(cmd *cobra.Command, people bool, results []demo.Result, took time.Duration) error {
	failed := 0
	for _, r := range results {
		if !r.OK {
			failed++
		}
	}
	if people {
		if failed == 0 {
			cmd.Printf("\nAll %d lines are as expected, after %.1f seconds, and the machine is as it was.\n", len(results), took.Seconds())
		} else {
			cmd.Printf("\n%d of %d lines are not as expected: see FAIL above. That took %.1f seconds, and the machine is as it was.\n", failed, len(results), took.Seconds())
		}
	}
	if failed > 0 {
		return errNotOK
	}
	return nil
}

// newDemoRole is what the demo starts of itself.
func newDemoRole() *cobra.Command {
	role := &cobra.Command{Use: "demo-role", Short: "The parts of \"sluicectl demo\"", Hidden: true}
	role.AddCommand(
		&cobra.Command{Use: "node CONFIG", Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, unix.SIGTERM)
			defer stop()
			return demo.RunNode(ctx, args[0], cmd.InOrStdin(), cmd.OutOrStdout())
		}},
		&cobra.Command{Use: "server ADDRESS...", Args: cobra.MinimumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			return demo.RunServer(cmd.OutOrStdout(), args)
		}},
		&cobra.Command{Use: "helper LISTEN TO", Args: cobra.ExactArgs(2), RunE: func(_ *cobra.Command, args []string) error {
			return demo.RunHelper(args[0], args[1])
		}},
		&cobra.Command{Use: "client ADDRESS ID", Args: cobra.ExactArgs(2), RunE: func(cmd *cobra.Command, args []string) error {
			return demo.RunClient(cmd.OutOrStdout(), args[0], args[1])
		}},
	)
	return role
}
