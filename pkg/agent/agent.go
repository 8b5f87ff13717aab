package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// startRetry is how long the daemon waits before it tries again to bring up a
// datapath that did not come up: somebody may mount what is missing.
const startRetry = 10 * time.Second

// The parts of being ready.
const (
	partOwner    = "owner"
	partDatapath = "datapath"
	partSocket   = "socket"
	partAPI      = "api server" // a note: pods are served without it too
)

// Part is something that works beside the daemon once the socket is served: what
// installs the plugin on the node, what keeps pods' addresses current.
type Part struct {
	Name   string
	Run    func(ctx context.Context) error // until the context ends
	Status func() (ready bool, why string) // nil: it never keeps the node from being ready
}

// Parts makes them, given the datapath, which stays open until all have returned.
type Parts func(d *datapath.Datapath, log logrus.FieldLogger) []Part

// Agent is the daemon of one node.
type Agent struct {
	config  Config
	client  typed.CoreV1Interface
	parts   Parts
	log     logrus.FieldLogger
	ready   *readiness
	metrics *metrics
}

// New makes a daemon. client speaks to the API server; parts may be nil.
func New(config Config, client typed.CoreV1Interface, parts Parts, log logrus.FieldLogger) (*Agent, error) {
	if err := config.check(); err != nil {
		return nil, err
	}
	return &Agent{
		config: config, client: client, parts: parts, log: log,
		ready: newReadiness(partOwner, partDatapath, partSocket), metrics: newMetrics(),
	}, nil
}

// Run works until the context ends, which is no error. Whatever it leaves pinned
// goes on redirecting: ending the daemon changes nothing for any pod.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel(nil) // before the wait
	registry := prometheus.NewRegistry()
	registry.MustRegister(a.metrics)
	if a.config.Listen != "" {
		wait.Go(func() { serveHTTP(ctx, a.config.Listen, a.ready, registry, a.log) })
	}
	lock, err := a.own(ctx)
	if err != nil {
		return ignoreEnd(ctx, err)
	}
	defer lock.Close()
	d, err := a.bringUp(ctx)
	if err != nil {
		return ignoreEnd(ctx, err)
	}
	defer d.Close()
	a.metrics.setNode(kernelNode{d})
	defer a.metrics.setNode(nil)
	return ignoreEnd(ctx, a.work(ctx, d))
}

// ignoreEnd drops an error that only says that the context has ended.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Cause(ctx)) {
		return nil
	}
	return err
}

func (a *Agent) own(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(a.config.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("make the daemon's directory: %w", err)
	}
	lock, err := own(ctx, a.config.lockPath(), func(holder string) {
		if a.ready.block(partOwner, "waiting for another daemon of this node to end: "+holder) {
			a.log.WithField(fieldHolder, holder).Warn("another daemon owns this node; waiting for its end")
		}
	})
	if err == nil {
		a.ready.block(partOwner, "")
	}
	return lock, err
}

// bringUp tries until the datapath is up and proven: a node that cannot run Sluice
// is not ready and says why, and its pods outside the mesh never notice.
func (a *Agent) bringUp(ctx context.Context) (*datapath.Datapath, error) {
	for {
		d, err := a.up()
		if err == nil {
			a.ready.block(partDatapath, "")
			return d, nil
		}
		if a.ready.block(partDatapath, err.Error()) {
			a.log.WithError(err).Error("the datapath is not up")
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(startRetry):
		}
	}
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
	_, before := os.Stat(filepath.Join(a.config.BPFFS, datapath.Layout))
	d, err := datapath.Up(datapath.Options{Dir: a.config.BPFFS, Cgroup: cgroup, Log: a.log})
	if err != nil {
		return nil, err
	}
	if !kernel.IsInside(cgroup) {
		a.log.Warn("this process is not seen to be below the cgroup, so redirection is not proven")
		return d, nil
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

// work runs everything that needs the datapath.
func (a *Agent) work(ctx context.Context, d *datapath.Datapath) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel(nil)
	r, err := newReconciler(a.config, a.client, kernelNode{d}, a.ready, a.metrics, a.log)
	if err != nil {
		return err
	}
	if err := r.adopt(); err != nil {
		return err
	}
	if err := r.writeState(); err != nil {
		return err
	}
	server, err := agentapi.Listen(a.config.socketPath(), &handler{r}, a.log)
	if err != nil {
		return err
	}
	wait.Go(func() { cancel(server.Serve(ctx)) })
	wait.Go(func() { r.run(ctx) })
	for _, part := range a.makeParts(d) {
		wait.Go(func() { a.runPart(ctx, part) })
	}
	a.ready.block(partSocket, "")
	a.log.Info("the socket is served")
	<-ctx.Done()
	return context.Cause(ctx)
}

func (a *Agent) makeParts(d *datapath.Datapath) []Part {
	if a.parts == nil {
		return nil
	}
	parts := a.parts(d, a.log)
	for _, p := range parts {
		a.takeStatus(p)
	}
	return parts
}

// runPart runs a part, again if it ends before its time, and follows its status.
func (a *Agent) runPart(ctx context.Context, p Part) {
	ended := make(chan error, 1)
	start := func() { go func() { ended <- p.Run(ctx) }() }
	start()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if ctx.Err() != nil {
				return
			}
			a.log.WithError(err).WithField(fieldPart, p.Name).Error("a part of the daemon has ended; starting it again")
			select {
			case <-ctx.Done():
				return
			case <-time.After(startRetry):
			}
			start()
		case <-tick.C:
			a.takeStatus(p)
		}
	}
}

func (a *Agent) takeStatus(p Part) {
	if p.Status == nil {
		return
	}
	ok, why := p.Status()
	if ok {
		why = ""
	} else if why == "" {
		why = "not there yet"
	}
	a.ready.block(p.Name, why)
}
