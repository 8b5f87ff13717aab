package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/sluice-mesh/sluice/pkg/conflist"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/install"
	keeper "github.com/sluice-mesh/sluice/pkg/keep"
)

// part is something that works beside the daemon once the socket is served.
type part struct {
	name string
	run  func(ctx context.Context) error // until the context ends
}

// parts keep the pods current and the plugin in place.
func (a *Agent) parts(d *datapath.Datapath) []part {
	parts := []part{{"keep", keeper.New(d, a.log).Run}}
	if a.installer != nil {
		parts = append(parts, part{"install", a.installer.Run})
	}
	return parts
}

// runPart runs a part, again if it ends before its time.
func (a *Agent) runPart(ctx context.Context, p part) {
	for {
		err := p.run(ctx)
		if ctx.Err() != nil {
			return
		}
		a.log.WithError(err).WithField(fieldPart, p.name).Error("a part of the daemon has ended; starting it again")
		select {
		case <-ctx.Done():
			return
		case <-time.After(startRetry):
		}
	}
}

// makeInstaller does nothing where no directories are given.
func (a *Agent) makeInstaller() error {
	c := a.config
	if c.Install.ConfDir == "" {
		return nil
	}
	entry := conflist.Entry{Socket: c.socketPath(), StateFile: c.statePath(), LogFile: c.Install.LogFile, Extra: map[string]any{"bpffs": c.BPFFS}}
	if c.Self.DaemonSet != "" {
		entry.Extra["ownPod"] = map[string]any{"namespace": c.Self.Namespace, "prefix": c.Self.DaemonSet + "-"}
	}
	var err error
	a.installer, err = install.New(install.Options{
		ConfDir: c.Install.ConfDir, BinDir: c.Install.BinDir, Plugin: c.Install.Plugin, Entry: entry, OnChange: a.installed, Log: a.log,
	})
	if err != nil {
		return fmt.Errorf("install the plugin: %w", err)
	}
	a.ready.block(partCNI, "not there yet")
	a.metrics.followInstaller(a.installer)
	return nil
}

// installed takes what has become of the installation.
func (a *Agent) installed(s install.Status) {
	if s.Ready {
		a.ready.block(partCNI, "")
		a.self.say(reasonInstalled, "pods that start on this node pass Sluice's plugin, by "+s.File)
		return
	}
	a.ready.block(partCNI, s.Reason)
	if !s.Withdrawn {
		a.self.warn(reasonNotInstalled, s.Reason)
	}
}
