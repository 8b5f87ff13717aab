package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/failpoint"
)

// retreat takes the entry out of the runtime's configuration and waits until no
// plugin runs any more, while the socket is still served.
func (a *Agent) retreat() {
	if a.installer == nil {
		return
	}
	if err := a.installer.Withdraw(); err != nil {
		a.log.WithError(err).Error("the plugin's entry cannot be taken out of the CNI configuration")
		return
	}
	failpoint.Step("uninstall: entry withdrawn")
	a.installer.AwaitIdle()
}

// uninstall removes what the daemon has put on the node. Enrolled pods stay
// redirected until they end, unless the operator wants otherwise.
func (a *Agent) uninstall(lock *agentapi.Lock) error {
	failpoint.Step("uninstall: socket gone")
	err := a.removeFiles()
	if a.config.RunningPods == RunningPodsDirect || a.nobodyIsEnrolled() {
		err = errors.Join(err, a.removeDatapath())
	} else {
		a.log.Info("uninstalled; pods that are enrolled stay redirected until they end")
	}
	if err != nil {
		return err
	}
	if err := lock.Remove(); err != nil {
		return err
	}
	_ = os.Remove(a.config.RunDir) // if it is empty, and no mount
	return nil
}

// stayDown removes everything at an operator's word, and then does nothing until
// the daemon is ended: if it ended by itself, the kubelet would start another,
// which would put everything back. The node stays its own.
func (a *Agent) stayDown(ctx context.Context, lock *agentapi.Lock) error {
	a.ready.block(partOperator, "taken down by \"sluicectl down --now\": restart this pod to bring it up again")
	a.log.Warn("taken down by \"sluicectl down --now\"; doing nothing until restarted")
	// The signature comes last: it tells the command line that all is done.
	err := errors.Join(a.removeFiles(), a.removeDatapath(), lock.Sign(""))
	if err != nil {
		a.ready.block(partOperator, "taking down left something: "+err.Error())
		a.log.WithError(err).Error("taking down left something")
	}
	<-ctx.Done()
	if a.self.uninstalled(context.WithoutCancel(ctx)) {
		return errors.Join(a.removeFiles(), lock.Remove())
	}
	return nil
}

// removeFiles removes binary and state file. The binary stays if an entry does,
// and then the plugin needs the state file.
func (a *Agent) removeFiles() error {
	if a.installer != nil {
		if err := a.installer.Uninstall(); err != nil {
			return fmt.Errorf("uninstall the plugin: %w", err)
		}
	}
	if err := os.Remove(a.config.statePath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the state file: %w", err)
	}
	failpoint.Step("uninstall: state file removed")
	return nil
}

// nobodyIsEnrolled says whether no living pod needs what is pinned.
func (a *Agent) nobodyIsEnrolled() bool {
	d, err := datapath.Open(datapath.Options{Dir: a.config.BPFFS, Log: a.log})
	if err != nil {
		return errors.Is(err, datapath.ErrNotUp)
	}
	defer d.Close()
	if _, err := d.Sweep(); err != nil {
		return false
	}
	pods, err := d.Cookies()
	return err == nil && len(pods) == 0
}

func (a *Agent) removeDatapath() error {
	pods, err := datapath.Down(a.config.BPFFS)
	if err != nil {
		return fmt.Errorf("remove the datapath: %w", err)
	}
	a.log.WithField(fieldCount, pods).Info("programs and maps are removed; connections of the pods that were enrolled go direct")
	return nil
}
