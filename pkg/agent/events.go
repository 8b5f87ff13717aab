package agent

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
)

// The reasons of Events about pods.
const (
	reasonChanged  = "RedirectionChanged"  // rules follow an annotation
	reasonKept     = "RedirectionKept"     // a change that a running pod cannot take
	reasonInvalid  = "RedirectionInvalid"  // annotations that cannot be obeyed
	reasonJudged   = "RedirectionJudged"   // of a pod that was enrolled in doubt
	reasonRepaired = "RedirectionRepaired" // enrolled while it runs
	reasonOutside  = "RedirectionMissing"  // runs outside the mesh
)

// maxNote is how long an Event's text may be.
const maxNote = 1000

// events tells the API server's users what happened to pods.
type events struct {
	broadcaster record.EventBroadcaster
	recorder    record.EventRecorder
}

func newEvents(client typed.CoreV1Interface, node string) *events {
	b := record.NewBroadcaster()
	b.StartRecordingToSink(&typed.EventSinkImpl{Interface: client.Events("")})
	return &events{b, b.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "sluiced", Host: node})}
}

func (e *events) close() { e.broadcaster.Shutdown() }

// shorten cuts a text to what an Event holds.
func shorten(text string) string {
	if len(text) > maxNote {
		text = strings.ToValidUTF8(text[:maxNote], "")
	}
	return text
}

// say makes an Event, unless it was the last word about the pod already.
func (r *reconciler) say(p *corev1.Pod, kind, reason, text string) {
	text = shorten(text)
	r.mu.Lock()
	words := r.said[p.UID]
	if words == nil {
		words = said{}
		r.said[p.UID] = words
	}
	again := words[reason] == text
	words[reason] = text
	r.mu.Unlock()
	if again {
		return
	}
	if kind == corev1.EventTypeWarning {
		r.log.WithField(fieldPod, p.Namespace+"/"+p.Name).WithField(fieldReason, text).Warn("a pod is not as it asks to be")
	}
	ref := &corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: p.Namespace, Name: p.Name, UID: p.UID}
	r.events.recorder.Event(ref, kind, reason, text)
}
