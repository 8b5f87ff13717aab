package agent

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// reconcile makes a pod's redirection what the pod says.
func (r *reconciler) reconcile(t task, p *corev1.Pod) error {
	decision, judgeErr := mesh.Judge(meshPod(p), r.config.Mesh)
	pods, err := r.enrolledAs(p, false)
	if err != nil {
		return err
	}
	if len(pods) == 0 {
		r.repairs.Add(t)
		return nil
	}
	for _, e := range pods {
		if err := r.follow(p, e, decision, judgeErr); err != nil {
			return err
		}
	}
	return nil
}

// follow has an enrolled pod's rules follow its annotations. What cannot be
// changed in a pod that runs stays as it is, and so does a pod that is wrong.
func (r *reconciler) follow(p *corev1.Pod, e enrolled, decision mesh.Decision, judgeErr error) error {
	switch {
	case judgeErr != nil:
		r.say(p, corev1.EventTypeWarning, reasonInvalid, "the redirection stays as it was: "+judgeErr.Error())
		return nil
	case decision.Skip != "" && e.provisional:
		return r.leave(p, e, decision.Skip)
	case decision.Skip != "":
		r.say(p, corev1.EventTypeWarning, reasonKept, "the pod stays redirected as it was, for it started in the mesh; now "+decision.Skip)
		return nil
	}
	force, found, err := r.node.InForce(e.Cookie, decision.Rules)
	if err != nil || !found {
		return err
	}
	if force.Follows {
		r.remember(e.Cookie, decision.Rules)
		return r.settle(p, e, nil)
	}
	before, known := r.before(p, e)
	if reason := fixed(before, known, force, decision.Rules); reason != "" && !e.provisional {
		r.say(p, corev1.EventTypeWarning, reasonKept, "the redirection stays as it was: "+reason+" cannot change while the pod runs; restart the pod")
		return nil
	}
	pod := datapath.Pod{Namespace: p.Namespace, Name: p.Name, UID: e.UID, Rules: decision.Rules, Inbound: force.Inbound, NoGuard: force.NoGuard}
	if err := r.node.Change(e.Cookie, pod); err != nil {
		r.say(p, corev1.EventTypeWarning, reasonInvalid, "the new rules cannot be applied, and the old ones stay: "+err.Error())
		return err
	}
	changes := []string{"everything"}
	if known {
		changes = differences(before, decision.Rules)
	}
	r.remember(e.Cookie, decision.Rules)
	if e.provisional {
		return r.settle(p, e, changes)
	}
	r.metrics.changes.Inc()
	r.log.WithFields(podFields(p, e)).WithField(fieldChanges, changes).Info("a running pod's rules are changed")
	r.say(p, corev1.EventTypeNormal, reasonChanged, "new connections follow the new rules ("+strings.Join(changes, ", ")+"); open ones stay as they are")
	return nil
}

// fixed says what of a change a running pod cannot take: the proxy has been
// started for it, or not.
func fixed(before rules.Rules, known bool, force datapath.Force, want rules.Rules) string {
	mode := force.Mode
	if mode == "" && known {
		mode = before.Mode
	}
	switch {
	case mode != "" && mode != want.Mode:
		return "its interception mode"
	case force.DNS != want.DNS:
		return "DNS capture"
	}
	return ""
}

// leave un-enrols a pod that ADD enrolled in doubt, and that is not in the mesh:
// it is ADD's decision, made late.
func (r *reconciler) leave(p *corev1.Pod, e enrolled, why string) error {
	if err := r.node.Leave(e.Cookie); err != nil {
		return err
	}
	r.metrics.judged.WithLabelValues("left").Inc()
	r.log.WithFields(podFields(p, e)).WithField(fieldReason, why).Info("a pod that was enrolled in doubt is not in the mesh, and un-enrolled")
	r.say(p, corev1.EventTypeNormal, reasonJudged, "the pod is not redirected any more: it was enrolled while the node could not tell, and "+why)
	r.mu.Lock()
	r.skipped[p.UID] = why
	r.pods.read = r.pods.read.Add(-snapshotAge)
	r.mu.Unlock()
	return nil
}

// settle ends a pod's doubt.
func (r *reconciler) settle(p *corev1.Pod, e enrolled, changes []string) error {
	if !e.provisional {
		return nil
	}
	if err := r.node.Settle(e.Cookie); err != nil {
		return err
	}
	entry := r.log.WithFields(podFields(p, e)).WithField(fieldChanges, changes)
	if len(changes) == 0 {
		r.metrics.judged.WithLabelValues("kept").Inc()
		entry.Info("a pod that was enrolled in doubt is as it should be")
		return nil
	}
	r.metrics.judged.WithLabelValues("changed").Inc()
	entry.Info("a pod that was enrolled in doubt has other rules now")
	r.say(p, corev1.EventTypeNormal, reasonJudged, "the pod was enrolled while the node could not tell everything about it; changed since: "+strings.Join(changes, ", "))
	return nil
}

func (r *reconciler) remember(cookie uint64, in rules.Rules) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.applied[cookie] = in
}

// before are the rules that a pod has had, where they are known: from this
// daemon's life, or as they are presumed without the API server.
func (r *reconciler) before(p *corev1.Pod, e enrolled) (rules.Rules, bool) {
	state := r.currentState()
	r.mu.Lock()
	in, known := r.applied[e.Cookie]
	r.mu.Unlock()
	if known || !e.provisional {
		return in, known
	}
	presumed, err := agentapi.Presume(&state, agentapi.Pod{Namespace: p.Namespace, Name: p.Name, UID: e.UID, Annotations: p.Annotations})
	if err != nil || presumed.Skip != "" {
		return rules.Rules{}, false
	}
	force, _, err := r.node.InForce(e.Cookie, presumed.Rules)
	return presumed.Rules, err == nil && force.Follows
}

// differences names the rules that differ.
func differences(a, b rules.Rules) []string {
	one, other := fieldsOf(a), fieldsOf(b)
	var out []string
	for _, name := range slices.Sorted(maps.Keys(other)) {
		if !reflect.DeepEqual(one[name], other[name]) {
			out = append(out, name)
		}
	}
	return out
}

func fieldsOf(r rules.Rules) map[string]any {
	out := map[string]any{}
	text, err := json.Marshal(r)
	if err == nil {
		err = json.Unmarshal(text, &out)
	}
	if err != nil { // rules are JSON, both ways
		return nil
	}
	return out
}

func podFields(p *corev1.Pod, e enrolled) logrus.Fields {
	return logrus.Fields{fieldPod: p.Namespace + "/" + p.Name, fieldUID: string(p.UID), fieldCookie: e.Cookie}
}
