package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	apps "k8s.io/client-go/kubernetes/typed/apps/v1"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
)

// The reasons of Events about the daemon's own pod, and so about its node.
const (
	reasonDown         = "DatapathDown"       // Sluice does not work on this node
	reasonInstalled    = "PluginInstalled"    // pods that start pass the plugin
	reasonNotInstalled = "PluginNotInstalled" // they do not, or may soon not
)

// askTime is how long the API server may take to say whether the DaemonSet is
// still there: a pod that ends has 30 s for everything.
const askTime = 5 * time.Second

// self is the daemon in Kubernetes: its pod, about which Events are, and its
// DaemonSet, the end of which is an uninstall.
type self struct {
	Self
	node   string
	core   typed.CoreV1Interface
	events *events // nil: the pod is not known
	sets   apps.DaemonSetInterface
	ready  *readiness
	log    logrus.FieldLogger

	mu     sync.Mutex
	ending bool // what the API server last said of the DaemonSet
}

func newSelf(config Config, client Client, ready *readiness, log logrus.FieldLogger) *self {
	s := &self{Self: config.Self, node: config.Node, core: client.Core, ready: ready, log: log}
	if s.DaemonSet != "" {
		s.sets = client.Apps.DaemonSets(s.Namespace)
	}
	return s
}

// open is to be called once, before run and any Event.
func (s *self) open() {
	if s.Namespace != "" && s.Pod != "" {
		s.events = newEvents(s.core, s.node)
	}
}

// run follows the DaemonSet until the context ends. An uninstall takes the
// daemon's rights together with its DaemonSet, and the pod hears of it last: then
// there is nobody left to ask.
func (s *self) run(ctx context.Context) {
	if s.events != nil {
		defer s.events.close()
	}
	if s.sets == nil {
		<-ctx.Done()
		return
	}
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, s.DaemonSet).String()
	lister := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = only
			return s.sets.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = only
			return s.sets.Watch(ctx, o)
		},
	}
	_, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(lister, plainList{}),
		ObjectType:    &appsv1.DaemonSet{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    s.heard,
			UpdateFunc: func(_, object any) { s.heard(object) },
			DeleteFunc: func(object any) {
				// One that is only missing from a list is not said to be gone.
				if _, ok := object.(*appsv1.DaemonSet); ok {
					s.note(true)
				}
			},
		},
	})
	controller.RunWithContext(ctx)
}

func (s *self) heard(object any) {
	if set, ok := object.(*appsv1.DaemonSet); ok {
		s.note(set.DeletionTimestamp != nil)
	}
}

func (s *self) note(ending bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending = ending
	why := ""
	if ending {
		why = "it is gone or being deleted: when this process ends, Sluice is uninstalled from the node"
	}
	s.ready.note(partDaemonSet, why)
}

// uninstalled says whether Sluice is being uninstalled: the API server says that
// the DaemonSet is gone or being deleted, or does not answer now and has said so
// before. Anything else is an upgrade or a restart.
func (s *self) uninstalled(ctx context.Context) bool {
	if s.sets == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	set, err := s.sets.Get(ctx, s.DaemonSet, metav1.GetOptions{})
	if err == nil {
		s.note(set.DeletionTimestamp != nil)
	} else if s.isGone(err) {
		s.note(true)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log.WithField(fieldDaemonSet, s.Namespace+"/"+s.DaemonSet)
	if err != nil {
		log = log.WithError(err)
	}
	if s.ending {
		log.Info("the daemon's DaemonSet is gone or being deleted: this is an uninstall")
	} else {
		log.Info("the daemon's DaemonSet is not said to be gone: everything stays as it is")
	}
	return s.ending
}

// isGone says whether an error is the API server's word that there is no such
// DaemonSet. A 404 of whatever answers in its place is not.
func (s *self) isGone(err error) bool {
	var status apierrors.APIStatus
	if !apierrors.IsNotFound(err) || apierrors.IsUnexpectedServerError(err) || !errors.As(err, &status) {
		return false
	}
	details := status.Status().Details
	return details != nil && details.Name == s.DaemonSet && details.Kind == "daemonsets"
}

// say makes an Event about the daemon's own pod.
func (s *self) say(reason, text string) { s.event(corev1.EventTypeNormal, reason, text) }

// warn is say for what a person must look at.
func (s *self) warn(reason, text string) { s.event(corev1.EventTypeWarning, reason, text) }

func (s *self) event(kind, reason, text string) {
	if s.events == nil {
		return
	}
	ref := &corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: s.Namespace, Name: s.Pod, UID: types.UID(s.UID)}
	s.events.recorder.Event(ref, kind, reason, shorten(text))
}
