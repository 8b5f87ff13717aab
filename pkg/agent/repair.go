package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
)

// labelUnredirected is what a pod is labelled with that is outside the mesh and
// should not be.
const labelUnredirected = "sluice.dev/unredirected"

// apiTime is how long one call of the API server may take.
const apiTime = 5 * time.Second

// patientTries is how often a pod without a process is tried again before that is
// news: for six seconds.
const patientTries = 6

// shownConnections are named one by one in an Event.
const shownConnections = 5

// repair does something about a pod that has a sidecar and runs outside the mesh:
// it started before Sluice, or where Sluice was not there.
func (r *reconciler) repair(p *corev1.Pod, decision mesh.Decision, judgeErr error) error {
	if r.config.Repair == RepairOff || judgeErr != nil || decision.Skip != "" || ended(p) {
		return nil
	}
	r.mu.Lock()
	_, left := r.skipped[p.UID] // by ADD; what has changed since does not count
	r.mu.Unlock()
	if left || len(p.Status.PodIPs) == 0 {
		return nil // without an address it is still being made
	}
	if pods, err := r.enrolledAs(p, true); err != nil || len(pods) > 0 {
		return err
	}
	switch r.config.Repair {
	case RepairLabel:
		return r.labelPod(p)
	case RepairDelete:
		return r.deletePod(p)
	}
	return r.repairInPlace(p, decision)
}

func ended(p *corev1.Pod) bool {
	return p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func (r *reconciler) repairInPlace(p *corev1.Pod, decision mesh.Decision) error {
	names := uids(p)
	done, err := r.node.Repair(running{r.processes.of(names), names, addresses(p)}, datapath.Pod{Namespace: p.Namespace, Name: p.Name, UID: names[len(names)-1], Rules: decision.Rules}, r.config.ResetConnections)
	if errors.Is(err, errNotFound) && p.Status.Phase != corev1.PodRunning {
		return nil // an event comes when it runs
	}
	if errors.Is(err, errNotFound) && r.repairs.NumRequeues(task(p.Namespace+"/"+p.Name)) < patientTries {
		return err // its sandbox is being made again
	}
	if err != nil {
		r.metrics.repairs.WithLabelValues("failed").Inc()
		r.say(p, corev1.EventTypeWarning, reasonOutside, "the pod runs outside the mesh and cannot be redirected: "+err.Error())
		return err
	}
	r.metrics.repairs.WithLabelValues("enrolled").Inc()
	r.remember(done.Cookie, decision.Rules)
	r.log.WithFields(logrus.Fields{fieldPod: p.Namespace + "/" + p.Name, fieldUID: string(p.UID), fieldCookie: done.Cookie, fieldCount: len(done.Before)}).
		Info("a running pod is enrolled")
	r.say(p, corev1.EventTypeNormal, reasonRepaired, strings.Join(append([]string{"the pod ran outside the mesh and is redirected now" + opened(done)}, done.Notes...), "; "))
	return nil
}

// opened tells of the connections that were open before.
func opened(done repaired) string {
	all := done.Before
	if len(all) == 0 {
		return "; no connection was open before"
	}
	var named []string
	for _, c := range all[:min(len(all), shownConnections)] {
		named = append(named, fmt.Sprintf("%s - %s", c.Local, c.Remote))
	}
	if more := len(all) - len(named); more > 0 {
		named = append(named, fmt.Sprintf("and %d more", more))
	}
	became := "and so outside the mesh until they end"
	switch {
	case done.Reset == len(all):
		became = "and closed, to be opened again through the proxy"
	case done.Reset > 0:
		became = fmt.Sprintf("%d of them closed, the others outside the mesh until they end", done.Reset)
	}
	return fmt.Sprintf("; open before, %s: %d connections (%s)", became, len(all), strings.Join(named, ", "))
}

func (r *reconciler) labelPod(p *corev1.Pod) error {
	ctx, cancel := context.WithTimeout(context.Background(), apiTime)
	defer cancel()
	patch := fmt.Sprintf(`{"metadata":{"uid":%q,"labels":{%q:"true"}}}`, p.UID, labelUnredirected)
	if _, err := r.client.Pods(p.Namespace).Patch(ctx, p.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("label the pod: %w", err)
	}
	r.metrics.repairs.WithLabelValues("labelled").Inc()
	r.say(p, corev1.EventTypeWarning, reasonOutside, "the pod runs outside the mesh; labelled "+labelUnredirected+"=true")
	return nil
}

func (r *reconciler) deletePod(p *corev1.Pod) error {
	ctx, cancel := context.WithTimeout(context.Background(), apiTime)
	defer cancel()
	r.say(p, corev1.EventTypeWarning, reasonOutside, "the pod runs outside the mesh and is deleted, for its owner to make a new one")
	if err := r.client.Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &p.UID}}); err != nil {
		return fmt.Errorf("delete the pod: %w", err)
	}
	r.metrics.repairs.WithLabelValues("deleted").Inc()
	return nil
}
