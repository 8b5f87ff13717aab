package agent

import (
	"errors"
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// snapshotAge is how old what was read of the maps may be: at the start every pod
// is looked at within a moment.
const snapshotAge = 100 * time.Millisecond

// enrolled is a pod's network namespace that is enrolled.
type enrolled struct {
	datapath.PodInfo
	provisional bool
}

// snapshot is what is enrolled, by UID.
type snapshot struct {
	read time.Time
	pods map[string][]enrolled
}

// enrolledAs lists a pod's namespaces that are enrolled: more than one where an
// old sandbox is not gone yet.
func (r *reconciler) enrolledAs(p *corev1.Pod, fresh bool) ([]enrolled, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if fresh || time.Since(r.pods.read) > snapshotAge {
		pods, err := r.readPods()
		if err != nil {
			return nil, err
		}
		r.pods = snapshot{time.Now(), pods}
	}
	var out []enrolled
	for _, uid := range uids(p) {
		out = append(out, r.pods.pods[uid]...)
	}
	return out, nil
}

func (r *reconciler) readPods() (map[string][]enrolled, error) {
	infos, err := r.node.Pods()
	if err != nil {
		return nil, err
	}
	attachments, err := r.node.Attachments()
	if err != nil {
		return nil, err
	}
	provisional := map[uint64]bool{}
	for _, a := range attachments {
		provisional[a.Cookie] = provisional[a.Cookie] || a.Provisional
	}
	out := map[string][]enrolled{}
	for _, info := range infos {
		if info.UID != "" {
			out[info.UID] = append(out[info.UID], enrolled{info, provisional[info.Cookie]})
		}
	}
	return out, nil
}

// judgeDoubts has every pod looked at that is enrolled provisionally.
func (r *reconciler) judgeDoubts() error {
	all, err := r.readPods()
	if err != nil {
		return err
	}
	for _, pods := range all {
		for _, e := range pods {
			if e.provisional {
				r.queue.Add(task(e.Namespace + "/" + e.Name))
			}
		}
	}
	return nil
}

// adopt says what the daemon found at its start. Up has completed or un-enrolled
// what could not stay as it was.
func (r *reconciler) adopt() error {
	pods, err := r.node.Pods()
	if err != nil {
		return err
	}
	if len(pods) > 0 {
		r.log.WithField(fieldCount, len(pods)).Info("adopted the pods that are enrolled")
	}
	if r.config.ResetConnections {
		if err := netns.CanReset(); err != nil {
			r.log.WithError(err).Warn("open connections of repaired pods stay as they are")
		}
	}
	r.queue.Add(taskSweep)
	return nil
}

// strayTime is longer than any ADD takes.
const strayTime = 15 * time.Second

// sweep un-enrols the namespaces that are gone. Attachments of namespaces that are
// not enrolled go only after a while, for an ADD may be under way.
func (r *reconciler) sweep() error {
	if err := r.node.StillUp(); errors.Is(err, datapath.ErrNotUp) {
		select {
		case r.lost <- err:
		default: // it has been said
		}
		return nil
	}
	swept, err := r.node.Sweep()
	r.metrics.swept.Add(float64(len(swept.Gone)))
	living := map[uint64]bool{}
	for _, cookie := range swept.Left {
		living[cookie] = true
	}
	strays, strayErr := r.node.Strays()
	now, long := map[uint64]time.Time{}, []uint64{}
	r.mu.Lock()
	for _, cookie := range strays {
		since, before := r.strays[cookie]
		if !before {
			since = time.Now()
		}
		now[cookie] = since
		if time.Since(since) > strayTime {
			long = append(long, cookie)
		}
	}
	r.strays = now
	if err == nil {
		maps.DeleteFunc(r.applied, func(cookie uint64, _ rules.Rules) bool { return !living[cookie] })
	}
	r.mu.Unlock()
	if len(long) > 0 {
		r.log.WithField(fieldCount, len(long)).Info("attachments of namespaces that are not enrolled are dropped")
		strayErr = errors.Join(strayErr, r.node.DropStrays(long))
	}
	if err := errors.Join(err, strayErr); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	return r.sweepAgain()
}

// sweepAgain has the sweep come back soon while a pod is enrolled that the API
// server does not know any more: it stays for as long as its namespace lives, but
// nothing tells when that ends, where no DEL names it. Namespaces that outlive their
// pods for longer are left to the resync.
func (r *reconciler) sweepAgain() error {
	r.mu.Lock()
	recent := time.Since(r.lastDeleted) < r.config.Resync
	r.mu.Unlock()
	if !recent {
		return nil
	}
	all, err := r.readPods()
	if err != nil {
		return err
	}
	for _, pods := range all {
		e := pods[0]
		if r.cluster.find(agentapi.Pod{Namespace: e.Namespace, Name: e.Name, UID: e.UID}) == nil {
			r.queue.AddAfter(taskSweep, settleTime)
			return nil
		}
	}
	return nil
}
