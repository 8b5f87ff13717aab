package ctl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
)

const (
	// callTime is how long a node daemon may take to answer.
	callTime = 10 * time.Second
	// takeDownTime is how long it may take to remove everything.
	takeDownTime = 2 * time.Minute
)

func newDown(c *common) *cobra.Command {
	var now bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Remove every program, map and pin of Sluice's",
		Long: `down detaches every program and removes every map and pin below --bpffs.
Pods that were enrolled are not captured any more: their new connections go
direct. Where nothing is left to remove it says so and succeeds. If a sluiced has
ended here without an uninstall, it removes the plugin and its entry first.

On a node that sluiced runs, it does so only with --now: the daemon then removes
everything at once, the plugin and its entry in the CNI configuration too, and
does nothing more until it is restarted. To uninstall Sluice from a cluster,
remove it there: then pods stay redirected until they end.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(); err != nil {
				return err
			}
			o, owned, err := c.owner()
			if err != nil {
				return err
			}
			if !owned {
				return c.down(cmd)
			}
			if !now {
				return fmt.Errorf("this node belongs to the daemon sluiced (%s). Uninstall Sluice from the cluster, and its pods stay redirected until they end; or give --now, and everything is removed here at once", o)
			}
			return c.takeDown(cmd, o)
		},
	}
	cmd.Flags().BoolVar(&now, "now", false, "also where a node daemon runs, and pods that it has enrolled")
	return cmd
}

func (c *common) down(cmd *cobra.Command) (err error) {
	left, err := c.removePlugin(cmd)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, left.Close()) }()
	_, statErr := os.Stat(filepath.Join(c.dir, datapath.Layout))
	pods, err := datapath.Down(c.dir)
	if err := errors.Join(err, dropMount(c.dir)); err != nil {
		return err
	}
	if err := left.removeFiles(); err != nil {
		return err
	}
	if errors.Is(statErr, os.ErrNotExist) {
		cmd.Printf("Sluice was not up: nothing of it is pinned in %s.\n", c.dir)
		for _, dir := range datapath.Find(c.dir) {
			there := common{dir: dir, runDir: c.runDir}
			cmd.PrintErrf("sluicectl: warning: a Sluice is up below %s: %s takes it down\n", dir, there.hint("down"))
		}
		return nil
	}
	cmd.Printf("Sluice is down: nothing of it is left in %s.", c.dir)
	if pods > 0 {
		cmd.Printf(" The connections of %s that had been enrolled now go direct.", count(pods, "pod"))
	}
	cmd.Println()
	return nil
}

// takeDown has the daemon remove everything, and waits until it has.
func (c *common) takeDown(cmd *cobra.Command, o agentapi.Owner) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), callTime)
	defer cancel()
	_, err := agentapi.Call(ctx, agentapi.SocketPath(c.runDir), agentapi.Request{Verb: agentapi.TakeDown}, nil)
	if err != nil {
		return fmt.Errorf("ask sluiced (%s): %w; end it first, and then this command needs no --now", o, err)
	}
	for until := time.Now().Add(takeDownTime); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if _, owned, err := c.owner(); err != nil || owned {
			continue
		}
		if _, err := os.Stat(filepath.Join(c.dir, datapath.Layout)); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("sluiced (%s) has left something below %s: its log and its /readyz say why", o, c.dir)
		}
		cmd.Printf("Sluice is down: nothing of it is left in %s, and connections of all pods go direct.\n", c.dir)
		cmd.Printf("sluiced (%s) does nothing more until it is restarted; so that it does not come back, uninstall it.\n", o)
		return nil
	}
	return fmt.Errorf("sluiced (%s) has not removed everything within %v: its log and its /readyz say why", o, takeDownTime)
}
