package ctl

import (
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/keep"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

func newWatch(c *common) *cobra.Command {
	return &cobra.Command{
		Use:   "watch",
		Short: "Keep enrolled namespaces current while their addresses, routes and interfaces change",
		Long: `watch stays in the foreground until Ctrl-C. What a pod's own addresses are,
which routes lead through an excluded interface and which interfaces need a
guard is read from the namespace at enrolment; watch follows every change within
a moment, says so, and finds pods that are enrolled later. Ended, it leaves
everything as it is.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.mayChange("it keeps every pod current: there is nothing left to watch"); err != nil {
				return err
			}
			d, err := c.open()
			if err != nil {
				return err
			}
			defer d.Close()
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, unix.SIGTERM)
			defer stop()
			cookies, err := d.Cookies()
			if err != nil {
				return err
			}
			cmd.Printf("Keeping the pods below %s current, %d of them now. Ctrl-C ends it.\n", c.dir, len(cookies))
			if err := keep.New(d, c.log()).Run(ctx); err != nil {
				return err
			}
			cmd.Println("Ended. What is enrolled stays enrolled; changes are not followed any more.")
			return nil
		},
	}
}

func newRefresh(c *common) *cobra.Command {
	var name string
	var all bool
	cmd := &cobra.Command{
		Use:   "refresh --netns PATH-OR-NAME | --all",
		Short: "Look once at what changed in enrolled namespaces",
		Long: `refresh reads addresses, routes and interfaces of an enrolled namespace, or of
all, corrects what differs and says what that was. Where "sluicectl watch" runs
there is nothing left to correct.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (name == "") != all {
				return errors.New("give either --netns or --all")
			}
			if err := c.mayChange("it keeps every pod current: there is nothing left to refresh"); err != nil {
				return err
			}
			d, err := c.open()
			if err != nil {
				return err
			}
			defer d.Close()
			if all {
				return c.refreshAll(cmd, d)
			}
			return c.refreshOne(cmd, d, name, name)
		},
	}
	cmd.Flags().StringVar(&name, "netns", "", "network namespace: a name of \"ip netns list\", or a path")
	cmd.Flags().BoolVar(&all, "all", false, "every enrolled namespace that a process or \"ip netns\" keeps")
	return cmd
}

func (c *common) refreshAll(cmd *cobra.Command, d *datapath.Datapath) error {
	cookies, err := d.Cookies()
	if err != nil {
		return err
	}
	if len(cookies) == 0 {
		cmd.Println("No pod is enrolled.")
	}
	paths := netns.ByCookie()
	var errs error
	for _, cookie := range cookies {
		path, ok := paths[cookie]
		if !ok {
			cmd.PrintErrf("sluicectl: warning: the namespace with cookie %d is not to be found; if it is gone, %s forgets it\n", cookie, c.hint(fmt.Sprint("unenroll --cookie ", cookie)))
			continue
		}
		errs = errors.Join(errs, c.refreshOne(cmd, d, path, fmt.Sprintf("cookie %d", cookie)))
	}
	return errs
}

// refreshOne shows a namespace without a pod's name as the caller calls it.
func (c *common) refreshOne(cmd *cobra.Command, d *datapath.Datapath, path, name string) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	done, err := d.Refresh(ns)
	if errors.Is(err, datapath.ErrNotEnrolled) {
		return fmt.Errorf("refresh %s: %w; %s does", name, err, c.hint("enroll --netns "+shellWord(path)))
	}
	if done.Pod != "" {
		name = done.Pod
	}
	for _, change := range done.Changes {
		cmd.Printf("%s: %s: %s\n", name, change.What, change.Which)
	}
	if err != nil {
		return fmt.Errorf("refresh %s: %w", name, err)
	}
	if len(done.Changes) == 0 {
		cmd.Printf("%s is current.\n", name)
	}
	return nil
}
