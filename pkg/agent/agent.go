package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/install"
)

// The parts of being ready.
const (
	partOwner     = "owner"
	partDatapath  = "datapath"
	partSocket    = "socket"
	partCNI       = "cni"
	partOperator  = "operator"
	partAPI       = "api server" // a note: pods are served without it too
	partDaemonSet = "daemonset"  // a note
)

// errEnd ends the daemon's work when it is told to end.
var errEnd = errors.New("told to end")

// Agent is the daemon of one node.
type Agent struct {
	config    Config
	client    Client
	log       logrus.FieldLogger
	ready     *readiness
	metrics   *metrics
	installer *install.Installer // nil: nothing is installed
	self      *self
	takeDown  chan struct{} // an operator's word
}

// New makes a daemon.
func New(config Config, client Client, log logrus.FieldLogger) (*Agent, error) {
	if err := config.check(); err != nil {
		return nil, err
	}
	ready := newReadiness(partOwner, partDatapath, partSocket)
	a := &Agent{
		config: config, client: client, log: log, ready: ready, metrics: newMetrics(),
		self: newSelf(config, client, ready, log), takeDown: make(chan struct{}, 1),
	}
	return a, a.makeInstaller()
}

// Run works until the context ends, which is no error. Unless that is an
// uninstall, nothing changes for any pod: what is pinned goes on redirecting.
func (a *Agent) Run(ctx context.Context) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	beside, stop := context.WithCancel(context.WithoutCancel(ctx)) // until everything else has ended
	defer stop()
	registry := prometheus.NewRegistry()
	registry.MustRegister(a.metrics)
	if a.config.Listen != "" {
		wait.Go(func() { serveHTTP(beside, a.config.Listen, a.ready, registry, a.log) })
	}
	a.self.open()
	wait.Go(func() { a.self.run(beside) })
	lock, err := a.own(ctx)
	if err != nil {
		return ignoreEnd(ctx, err)
	}
	defer lock.Close()
	work, end := context.WithCancelCause(beside)
	defer end(nil)
	ended := make(chan error, 1)
	wait.Go(func() { ended <- a.live(work) })
	select {
	case err := <-ended:
		return err
	case <-a.takeDown:
		a.retreat()
		end(errEnd)
		err := ignoreEnd(work, <-ended)
		return errors.Join(err, a.stayDown(ctx, lock))
	case <-ctx.Done():
		uninstall := a.self.uninstalled(beside)
		if uninstall {
			a.retreat()
		}
		end(errEnd)
		err := ignoreEnd(work, <-ended)
		if uninstall {
			err = errors.Join(err, a.uninstall(lock))
		}
		return err
	}
}

// ignoreEnd drops an error that only says that the context has ended.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, context.Cause(ctx)) || errors.Is(err, ctx.Err())) {
		return nil
	}
	return err
}

func (a *Agent) own(ctx context.Context) (*agentapi.Lock, error) {
	if err := os.MkdirAll(a.config.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("make the daemon's directory: %w", err)
	}
	lock, err := agentapi.Own(ctx, a.config.RunDir, a.config.BPFFS, func(owner agentapi.Owner) {
		if a.ready.block(partOwner, "waiting for another daemon of this node to end: "+owner.String()) {
			a.log.WithField(fieldHolder, owner.String()).Warn("another daemon owns this node; waiting for its end")
		}
	})
	if err == nil {
		a.ready.block(partOwner, "")
		a.removeHalfWritten()
	}
	return lock, err
}

// removeHalfWritten removes state files that a daemon was killed while it wrote
// them: renameio names them like this. It is best effort: they are in nobody's way.
func (a *Agent) removeHalfWritten() {
	path := a.config.statePath()
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"[0-9]*"))
	if err != nil {
		return
	}
	for _, l := range left {
		_ = os.Remove(l)
	}
}

// live brings the datapath up and works with it, until the context ends, and does
// so again when what is pinned is gone: somebody has emptied the bpffs or mounted
// another.
func (a *Agent) live(ctx context.Context) error {
	for {
		err := a.liveOnce(ctx)
		if !errors.Is(err, datapath.ErrNotUp) {
			return err
		}
		a.ready.block(partDatapath, err.Error())
		a.log.WithError(err).Error("what was pinned is gone, and with it every redirection; making it anew")
	}
}

func (a *Agent) liveOnce(ctx context.Context) error {
	d, err := a.bringUp(ctx)
	if err != nil {
		return err
	}
	defer d.Close()
	a.metrics.setNode(kernelNode{d})
	defer a.metrics.setNode(nil)
	return a.work(ctx, d)
}

// work runs everything that needs the datapath.
func (a *Agent) work(ctx context.Context, d *datapath.Datapath) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer cancel(nil)
	r, err := newReconciler(a.config, a.client.Core, kernelNode{d}, a.ready, a.metrics, a.log)
	if err != nil {
		return err
	}
	if err := r.adopt(); err != nil {
		return err
	}
	if err := r.writeState(); err != nil {
		return err
	}
	server, err := agentapi.Listen(a.config.socketPath(), &door{&handler{r}, a.takeDown}, a.log)
	if err != nil {
		return err
	}
	wait.Go(func() { cancel(server.Serve(ctx)) })
	wait.Go(func() {
		if err := r.run(ctx); err != nil {
			cancel(err)
		}
	})
	a.ready.block(partSocket, "")
	a.log.Info("the socket is served")
	for _, p := range a.parts(d) { // the plugin comes last: from then on it is called
		wait.Go(func() { a.runPart(ctx, p) })
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// door hears an operator's word, and leaves the plugin's to its handler.
type door struct {
	agentapi.Handler
	takeDown chan<- struct{}
}

func (d *door) Handle(ctx context.Context, request agentapi.Request, ns *os.File) agentapi.Answer {
	if request.Verb != agentapi.TakeDown {
		return d.Handler.Handle(ctx, request, ns)
	}
	select {
	case d.takeDown <- struct{}{}:
	default: // it has been said already
	}
	return agentapi.Answer{}
}
