package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
)

const (
	// startRetry is how long the daemon waits before it tries again to bring up a
	// datapath that did not come up: somebody may mount what is missing.
	startRetry = 10 * time.Second
	// startPatience is how often it may fail before the node is taken for one
	// where Sluice does not work.
	startPatience = 3
)

// errNoProof is returned where nothing could show that the programs see anybody.
var errNoProof = errors.New("nothing can show that programs there see any pod")

// bringUp tries until the datapath is up and proven: a node that cannot run Sluice
// is not ready and says why, and its pods outside the mesh never notice.
func (a *Agent) bringUp(ctx context.Context) (*datapath.Datapath, error) {
	for tries := 1; ; tries++ {
		d, err := a.up()
		if err == nil {
			a.ready.block(partDatapath, "")
			return d, nil
		}
		if a.ready.block(partDatapath, err.Error()) {
			a.log.WithError(err).Error("the datapath is not up")
			a.self.warn(reasonDown, err.Error())
		}
		if tries >= startPatience || hopeless(err) {
			a.stepAside()
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(startRetry):
		}
	}
}

// hopeless says of an error that waiting will not mend it.
func hopeless(err error) bool {
	for _, never := range []error{datapath.ErrKernel, kernel.ErrNoCgroup2, kernel.ErrNoBPFFS, datapath.ErrElsewhere, errNoProof} {
		if errors.Is(err, never) {
			return true
		}
	}
	return false
}

func (a *Agent) up() (*datapath.Datapath, error) {
	cgroup := a.config.Cgroup
	if cgroup == "" {
		root, err := kernel.CgroupRoot()
		if err != nil {
			return nil, err
		}
		cgroup = root
	}
	if err := kernel.IsCgroup2(cgroup); err != nil {
		return nil, err
	}
	if !kernel.IsInside(cgroup) {
		return nil, fmt.Errorf("%s is not the true root of cgroup2, and this process is not seen to be below it: %w. Mount the host's cgroup2 (in a pod: as a hostPath) and give its root with --cgroup", cgroup, errNoProof)
	}
	_, before := os.Stat(filepath.Join(a.config.BPFFS, datapath.Layout))
	d, err := datapath.Up(datapath.Options{Dir: a.config.BPFFS, Cgroup: cgroup, Reattach: true, MaxPods: a.config.MaxPods, Log: a.log})
	if err != nil {
		return nil, err
	}
	if err := d.Prove(); err != nil {
		err = errors.Join(err, d.Close())
		if errors.Is(before, os.ErrNotExist) { // nobody depends on it yet
			_, undo := datapath.Down(a.config.BPFFS)
			err = errors.Join(err, undo)
		}
		return nil, err
	}
	return d, nil
}

// stepAside takes the plugin out of the runtime's configuration on a node where
// Sluice does not work, or no pod could start. Where an earlier release's programs
// still redirect the entry stays: without it, pods of the mesh would start outside.
func (a *Agent) stepAside() {
	if a.installer == nil || a.stillRedirects() {
		return
	}
	if err := a.installer.Withdraw(); err != nil {
		a.log.WithError(err).Error("the plugin's entry cannot be taken out of the CNI configuration")
	}
	a.ready.block(partCNI, "not installed, for the datapath is not up")
}

func (a *Agent) stillRedirects() bool {
	d, err := datapath.Open(datapath.Options{Dir: a.config.BPFFS, Log: a.log})
	if err != nil {
		return false
	}
	defer d.Close()
	return d.Prove() == nil
}
