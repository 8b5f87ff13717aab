package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/install"
)

// removeLeft removes what a daemon of this datapath has left when it ended: the
// plugin's entry first, for with an entry and nothing else pods of the mesh fail to
// start.
func (c *common) removeLeft(cmd *cobra.Command) error {
	path := agentapi.StatePath(c.runDir)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil // none has been here
	}
	state, err := agentapi.ReadState(path)
	if err != nil {
		warnLeft(cmd, fmt.Sprintf("sluiced has run on this node: %v", err), "/etc/cni/net.d, usually", "/opt/cni/bin, usually")
		return nil
	}
	if state.BPFFS != c.dir {
		return nil
	}
	if state.CNI == nil {
		warnLeft(cmd, "a sluiced has run on this node that does not tell where it installs the plugin", "/etc/cni/net.d, usually", "/opt/cni/bin, usually")
		return nil
	}
	if state.CNI.ConfDir != "" && !isDir(state.CNI.ConfDir) {
		warnLeft(cmd, "what sluiced has installed on this node is not visible here", state.CNI.ConfDir, state.CNI.BinDir)
		return nil
	}
	return c.removeInstalled(cmd, state)
}

// removeInstalled does it as the node's owner, so that no daemon comes meanwhile.
func (c *common) removeInstalled(cmd *cobra.Command, state agentapi.State) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
	defer cancel()
	lock, err := agentapi.Own(ctx, c.runDir, "", func(agentapi.Owner) {})
	if err != nil {
		return fmt.Errorf("a daemon has just started on this node: try again (%w)", err)
	}
	defer lock.Close()
	if at := state.CNI; at.ConfDir != "" {
		if err := install.Remove(at.ConfDir, at.BinDir, c.log()); err != nil {
			return fmt.Errorf("remove the plugin that sluiced has installed: %w; the programs stay, for while the entry is in %s pods need them to start", err, at.ConfDir)
		}
		cmd.Printf("The CNI plugin of sluiced, which does not run, is gone from %s and %s.\n", at.ConfDir, at.BinDir)
	}
	for _, path := range []string{agentapi.SocketPath(c.runDir), agentapi.StatePath(c.runDir)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove what sluiced has left: %w", err)
		}
	}
	if err := lock.Remove(); err != nil {
		return err
	}
	_ = os.Remove(c.runDir) // if it is empty, and no mount
	return nil
}

func warnLeft(cmd *cobra.Command, why, confDir, binDir string) {
	cmd.PrintErrf("sluicectl: warning: %s. If its entry is left in the CNI configuration (%s), take that out and then remove the plugin sluice-cni (%s): as long as it is there, pods of the mesh fail to start\n", why, confDir, binDir)
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
