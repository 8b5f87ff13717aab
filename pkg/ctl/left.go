package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/install"
)

// Where a daemon installs the plugin, if nothing says otherwise.
const (
	usualConfDir = "/etc/cni/net.d"
	usualBinDir  = "/opt/cni/bin"
)

// left is what a daemon of this datapath has left when it ended. While it is open
// no daemon starts on the node.
type left struct {
	*common
	lock *agentapi.Lock // nil: there is nothing that is ours to remove
}

// removePlugin removes the plugin that a daemon has left: its entry first, for with
// an entry and nothing else pods of the mesh fail to start. Close what it returns.
func (c *common) removePlugin(cmd *cobra.Command) (left, error) {
	path := agentapi.StatePath(c.runDir)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		// None has been here since the machine started, after which the entry is still there.
		if !same(c.dir, datapath.DefaultDir) {
			return left{}, nil
		}
		if found := install.Entries(usualConfDir); len(found) > 0 {
			warnLeft(cmd, "sluiced is not on this node, and its entry is in "+strings.Join(found, ", "), usualConfDir, usualBinDir)
		}
		return left{}, nil
	}
	state, err := agentapi.ReadState(path)
	switch {
	case err != nil:
		warnLeft(cmd, fmt.Sprintf("sluiced has run on this node: %v", err), usualConfDir+", usually", usualBinDir+", usually")
		return left{}, nil
	case !same(state.BPFFS, c.dir):
		return left{}, nil
	case state.CNI == nil:
		warnLeft(cmd, "a sluiced has run on this node that does not tell where it installs the plugin", usualConfDir+", usually", usualBinDir+", usually")
		return left{}, nil
	case state.CNI.ConfDir != "" && !isDir(state.CNI.ConfDir):
		warnLeft(cmd, "what sluiced has installed on this node is not visible here", state.CNI.ConfDir, state.CNI.BinDir)
		return left{}, nil
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
	defer cancel()
	lock, err := agentapi.Own(ctx, c.runDir, c.dir, func(agentapi.Owner) {})
	if errors.Is(err, context.DeadlineExceeded) {
		return left{}, errors.New("a sluiced runs on this node: end it first")
	}
	if err != nil {
		return left{}, err
	}
	if at := state.CNI; at.ConfDir != "" {
		if err := install.Remove(at.ConfDir, at.BinDir, c.log()); err != nil {
			err = fmt.Errorf("remove the plugin that sluiced has installed: %w; the programs stay, for while the entry is in %s pods need them to start", err, at.ConfDir)
			return left{}, errors.Join(err, lock.Close())
		}
		cmd.Printf("No CNI plugin of sluiced, which does not run, is left in %s and %s.\n", at.ConfDir, at.BinDir)
	}
	return left{c, lock}, nil
}

// Close lets another daemon start. It keeps what belongs to the next one.
func (l left) Close() error {
	if l.lock == nil {
		return nil
	}
	return l.lock.Close()
}

// removeFiles removes what else it has left, once the datapath is down.
func (l left) removeFiles() error {
	if l.lock == nil {
		return nil
	}
	for _, path := range []string{agentapi.SocketPath(l.runDir), agentapi.StatePath(l.runDir)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove what sluiced has left: %w", err)
		}
	}
	if err := l.lock.Remove(); err != nil {
		return err
	}
	_ = os.Remove(l.runDir) // if it is empty, and no mount
	return nil
}

func warnLeft(cmd *cobra.Command, why, confDir, binDir string) {
	cmd.PrintErrf("sluicectl: warning: %s. If its entry is left in the CNI configuration (%s), take that out and then remove the plugin sluice-cni (%s): as long as it is there, pods of the mesh fail to start\n", why, confDir, binDir)
}

// same says whether two paths are one, but for how they are written.
func same(a, b string) bool { return filepath.Clean(a) == filepath.Clean(b) }

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
