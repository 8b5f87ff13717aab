package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// task is one thing to look at: a pod by its key, or one of the node's own.
type task string

// The node's own tasks. No pod's key is without a slash.
const (
	taskSweep task = "sweep" // namespaces that are gone
	taskDoubt task = "doubt" // pods that a plugin enrolled alone
	taskState task = "state" // the state file
)

const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 30 * time.Second
	// settleTime is how long the sweep waits after a pod is deleted: its DEL comes
	// first, as a rule.
	settleTime = 10 * time.Second
	// doubtTime is how long after an ADD in doubt the pod is looked at, which the
	// API server may have told of before the plugin was done.
	doubtTime = 500 * time.Millisecond
	// doubtRounds is how often, from the start on, pods in doubt are looked for: a
	// plugin that found no daemon may be about to enroll one.
	doubtRounds = 20
)

// reconciler compares what should be with what is, in both directions.
type reconciler struct {
	config  Config
	client  typed.CoreV1Interface
	cluster *cluster
	node    node
	ready   *readiness
	metrics *metrics
	events  *events
	log     logrus.FieldLogger
	queue   taskQueue
	repairs taskQueue  // pods to repair, which may wait for the API server
	lost    chan error // what is pinned is gone

	processes processes

	mu          sync.Mutex
	state       agentapi.State
	pods        snapshot               // what is enrolled, read a moment ago
	applied     map[uint64]rules.Rules // by cookie: the rules known to be in force
	skipped     map[types.UID]string   // pods that ADD left alone, and why
	said        map[types.UID]said     // so that no Event comes twice
	strays      map[uint64]time.Time   // attachments without a pod, since when
	lastDeleted time.Time              // when the API server last told of a pod's end
}

type taskQueue = workqueue.TypedRateLimitingInterface[task]

func newQueue() taskQueue {
	return workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[task](retryFirst, retryMost))
}

// said are the last words about a pod, by the Event's reason.
type said map[string]string

func newReconciler(config Config, client typed.CoreV1Interface, n node, ready *readiness, m *metrics, log logrus.FieldLogger) (*reconciler, error) {
	r := &reconciler{
		config: config, client: client, node: n, ready: ready, metrics: m, log: log,
		events: newEvents(client, config.Node),
		queue:  newQueue(), repairs: newQueue(), lost: make(chan error, 1),
		applied: map[uint64]rules.Rules{}, skipped: map[types.UID]string{}, said: map[types.UID]said{}, strays: map[uint64]time.Time{},
	}
	var err error
	if r.cluster, err = newCluster(client, config.Node, r.trouble); err != nil {
		return nil, err
	}
	_, podErr := r.cluster.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    r.enqueue,
		UpdateFunc: func(_, object any) { r.enqueue(object) },
		DeleteFunc: r.deleted,
	})
	_, nsErr := r.cluster.namespaces.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { r.queue.Add(taskState) },
		UpdateFunc: func(any, any) { r.queue.Add(taskState) },
		DeleteFunc: func(any) { r.queue.Add(taskState) },
	})
	r.state = r.firstState()
	r.ready.note(partAPI, "it has not answered yet")
	return r, errors.Join(podErr, nsErr)
}

func (r *reconciler) enqueue(object any) {
	if key, err := cache.MetaNamespaceKeyFunc(object); err == nil {
		r.queue.Add(task(key))
	}
}

// deleted forgets what was noted of a pod. It un-enrols nobody: that the API
// server does not know a pod any more says nothing about its processes.
func (r *reconciler) deleted(object any) {
	if last, ok := object.(cache.DeletedFinalStateUnknown); ok {
		object = last.Obj
	}
	if p, ok := object.(*corev1.Pod); ok {
		r.mu.Lock()
		delete(r.skipped, p.UID)
		delete(r.said, p.UID)
		r.lastDeleted = time.Now()
		r.mu.Unlock()
	}
	r.queue.AddAfter(taskSweep, settleTime)
}

// trouble takes what is wrong with the API server. Pods are served all the same.
func (r *reconciler) trouble(text string) {
	why := ""
	if text != "" {
		why = "it does not answer as it should, so new pods are judged by what the runtime says of them: " + text
	}
	r.metrics.setAPI(text == "")
	if !r.ready.note(partAPI, why) {
		return
	}
	if text != "" {
		r.log.WithField(fieldReason, text).Warn("the API server does not answer as it should; working without it")
	} else {
		r.log.Info("the API server answers again")
	}
}

// run works until the context ends, which is no error, or until what is pinned
// is gone.
func (r *reconciler) run(ctx context.Context) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	defer r.events.close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wait.Go(func() { r.cluster.run(ctx) })
	wait.Go(func() { r.worker(r.queue, r.do) })
	wait.Go(func() { r.worker(r.repairs, r.doRepair) })
	defer r.repairs.ShutDown()
	defer r.queue.ShutDown()
	for i := range doubtRounds {
		r.queue.AddAfter(taskDoubt, time.Duration(i+1)*doubtTime)
	}
	tick := time.NewTicker(r.config.Resync)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-r.lost:
			return err
		case <-tick.C:
			r.queue.Add(taskSweep)
			r.queue.Add(taskState)
			for _, key := range r.cluster.pods.GetStore().ListKeys() {
				r.queue.Add(task(key))
			}
		}
	}
}

func (r *reconciler) worker(queue taskQueue, do func(task) error) {
	for {
		t, shutdown := queue.Get()
		if shutdown {
			return
		}
		r.try(queue, t, do)
		queue.Done(t)
	}
}

// try does one task. An error is for the log once, and tried again later and later.
func (r *reconciler) try(queue taskQueue, t task, do func(task) error) {
	err := guarded(t, do)
	if err == nil {
		queue.Forget(t)
		return
	}
	r.metrics.reconcileErrors.Inc()
	entry := r.log.WithError(err).WithField(fieldPod, string(t))
	if queue.NumRequeues(t) == 0 {
		entry.Warn("not as it should be; trying again")
	} else {
		entry.Debug("still not as it should be; trying again")
	}
	queue.AddRateLimited(t)
}

// guarded turns a panic into an error: one bad pod must not end the daemon.
func guarded(t task, do func(task) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return do(t)
}

func (r *reconciler) do(t task) error {
	switch t {
	case taskSweep:
		return r.sweep()
	case taskState:
		return r.writeState()
	case taskDoubt:
		return r.judgeDoubts()
	}
	pod := r.cluster.get(string(t))
	if pod == nil {
		return nil // whatever is enrolled of it stays
	}
	return r.reconcile(t, pod)
}

func (r *reconciler) doRepair(t task) error {
	pod := r.cluster.get(string(t))
	if pod == nil {
		return nil
	}
	decision, err := mesh.Judge(meshPod(pod), r.config.Mesh)
	return r.repair(pod, decision, err)
}

// meshed says whether a pod has a sidecar of its own.
func meshed(p *corev1.Pod) bool {
	d, err := mesh.Judge(meshPod(p), mesh.Config{})
	return err == nil && d.Skip == ""
}

// firstState is that of before the API server has said anything: what the last
// daemon knew of namespaces is better than nothing.
func (r *reconciler) firstState() agentapi.State {
	state := agentapi.State{
		BPFFS: r.config.BPFFS, Mesh: r.config.Mesh, Namespaces: map[string]bool{},
		CNI: &agentapi.CNI{ConfDir: r.config.Install.ConfDir, BinDir: r.config.Install.BinDir},
	}
	if before, err := agentapi.ReadState(r.config.statePath()); err == nil && before.Namespaces != nil {
		state.Namespaces = before.Namespaces
	}
	return state
}

// writeState leaves what a plugin without a daemon needs.
func (r *reconciler) writeState() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if all, ok := r.cluster.inMesh(); ok {
		r.state.Namespaces = all
	}
	text, err := r.state.Encode()
	if err != nil {
		return err
	}
	path := r.config.statePath()
	if err := renameio.WriteFile(path, text, 0o600, renameio.WithTempDir(r.config.RunDir), renameio.WithStaticPermissions(0o600)); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	failpoint.Step("daemon: state file written")
	return nil
}

func (r *reconciler) currentState() agentapi.State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}
