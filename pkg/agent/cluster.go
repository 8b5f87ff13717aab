package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
)

// awaitTime is how long ADD waits for its pod to come from the API server.
const awaitTime = 1500 * time.Millisecond

// cluster is what the API server says of this node's pods and of namespaces. What
// it said last stays when it says nothing any more.
type cluster struct {
	pods, namespaces cache.SharedIndexInformer

	mu      sync.Mutex
	changed chan struct{}     // closed at the next change of a pod
	trouble map[string]string // by kind of object: what is wrong with the API server
	tell    func(trouble string)
}

// newCluster does not ask the API server yet. tell is told what is wrong with it,
// or nothing.
func newCluster(client typed.CoreV1Interface, node string, tell func(trouble string)) (*cluster, error) {
	c := &cluster{changed: make(chan struct{}), trouble: map[string]string{}, tell: tell}
	onNode := fields.OneTermEqualSelector("spec.nodeName", node).String()
	var err error
	c.pods, err = c.informer("pods", &corev1.Pod{}, lister{
		func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = onNode
			return client.Pods("").List(ctx, o)
		},
		func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = onNode
			return client.Pods("").Watch(ctx, o)
		},
	})
	if err != nil {
		return nil, err
	}
	c.namespaces, err = c.informer("namespaces", &corev1.Namespace{}, lister{
		func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return client.Namespaces().List(ctx, o)
		},
		func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return client.Namespaces().Watch(ctx, o)
		},
	})
	if err != nil {
		return nil, err
	}
	_, err = c.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { c.broadcast() },
		UpdateFunc: func(any, any) { c.broadcast() },
	})
	return c, err
}

type lister struct {
	list  func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch func(context.Context, metav1.ListOptions) (watch.Interface, error)
}

func (c *cluster) informer(kind string, example runtime.Object, l lister) (cache.SharedIndexInformer, error) {
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := l.list(ctx, o)
			c.heard(ctx, kind, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := l.watch(ctx, o)
			c.heard(ctx, kind, err)
			return w, err
		},
	}
	informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, plainList{}), example, 0, cache.Indexers{})
	if err := informer.SetTransform(trim); err != nil {
		return nil, err
	}
	return informer, nil
}

// plainList asks for a list and then a watch, rather than for a stream that begins
// with the list: one node's pods are few, and every API server knows how.
type plainList struct{}

// IsWatchListSemanticsUnSupported is what client-go asks.
func (plainList) IsWatchListSemanticsUnSupported() bool { return true }

// heard notes what the API server answered.
func (c *cluster) heard(ctx context.Context, kind string, err error) {
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	if err == nil {
		delete(c.trouble, kind)
	} else {
		c.trouble[kind] = err.Error()
	}
	all := ""
	for _, text := range c.trouble {
		all = max(all, text)
	}
	c.mu.Unlock()
	c.tell(all)
}

// run asks the API server until the context ends.
func (c *cluster) run(ctx context.Context) {
	var wait sync.WaitGroup
	wait.Go(func() { c.pods.RunWithContext(ctx) })
	wait.Go(func() { c.namespaces.RunWithContext(ctx) })
	wait.Wait()
}

func (c *cluster) broadcast() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.changed)
	c.changed = make(chan struct{})
}

// healthy says whether nothing is known to be wrong with the API server.
func (c *cluster) healthy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.trouble) == 0
}

// await finds the pod of an ADD, waiting for it while there is hope.
func (c *cluster) await(ctx context.Context, asked agentapi.Pod) *corev1.Pod {
	ctx, cancel := context.WithTimeout(ctx, awaitTime)
	defer cancel()
	for {
		c.mu.Lock()
		changed := c.changed
		c.mu.Unlock()
		if pod := c.find(asked); pod != nil {
			return pod
		}
		if !c.healthy() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// find looks for the pod that the runtime speaks of, which is not just any of its
// name.
func (c *cluster) find(asked agentapi.Pod) *corev1.Pod {
	pod := c.get(asked.Namespace + "/" + asked.Name)
	if pod == nil || asked.UID != "" && !slices.Contains(uids(pod), asked.UID) {
		return nil
	}
	return pod
}

func (c *cluster) get(key string) *corev1.Pod {
	object, found, err := c.pods.GetStore().GetByKey(key)
	if err != nil || !found {
		return nil
	}
	pod, _ := object.(*corev1.Pod)
	return pod
}

// inMesh says of each namespace whether its pods are in the mesh unless they say
// otherwise; ok is false before the API server has said it.
func (c *cluster) inMesh() (out map[string]bool, ok bool) {
	if !c.namespaces.HasSynced() {
		return nil, false
	}
	out = map[string]bool{}
	for _, object := range c.namespaces.GetStore().List() {
		if n, is := object.(*corev1.Namespace); is {
			out[n.Name] = injects(n)
		}
	}
	for _, object := range c.pods.GetStore().List() { // a pod may ask for its injection by itself
		if p, is := object.(*corev1.Pod); is && meshed(p) {
			out[p.Namespace] = true
		}
	}
	return out, true
}
