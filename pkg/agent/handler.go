package agent

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/sirupsen/logrus"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// handler answers the plugin.
type handler struct{ *reconciler }

// Handle answers one request.
func (h *handler) Handle(ctx context.Context, request agentapi.Request, ns *os.File) agentapi.Answer {
	switch request.Verb {
	case agentapi.Add:
		began := time.Now()
		answer := h.add(ctx, request, ns)
		h.metrics.observeAdd(answer, time.Since(began))
		return answer
	case agentapi.Check:
		return h.check(ns)
	case agentapi.Undo:
		h.metrics.undone.Inc()
	case agentapi.Log:
		for _, line := range request.Lines {
			h.log.WithField(fieldPlugin, line).Info("the plugin says")
		}
	case agentapi.Del, agentapi.Status: // the plugin has done it; we are here
	}
	return agentapi.Answer{}
}

// add decides about a pod: by what the API server says of it, and where it does
// not know the pod, by what the runtime says.
func (h *handler) add(ctx context.Context, request agentapi.Request, ns *os.File) agentapi.Answer {
	decision, provisional, err := h.judge(ctx, request.Pod)
	fields := logrus.Fields{fieldPod: request.Pod.Namespace + "/" + request.Pod.Name, fieldUID: request.Pod.UID}
	if err != nil {
		h.log.WithFields(fields).WithError(err).Warn("pod refused")
		return agentapi.Answer{Error: &agentapi.Error{Message: err.Error(), Later: errors.Is(err, agentapi.ErrUndecidable)}}
	}
	uid := types.UID(request.Pod.UID)
	h.mu.Lock()
	defer h.mu.Unlock()
	if decision.Skip != "" {
		if uid != "" {
			h.skipped[uid] = decision.Skip
		}
		h.log.WithFields(fields).WithField(fieldReason, decision.Skip).Debug("pod left alone")
		return agentapi.Answer{Decision: agentapi.Skip, Reason: decision.Skip, Warnings: decision.Warnings}
	}
	delete(h.skipped, uid)
	if cookie, err := netns.CookieOf(ns); err == nil {
		h.applied[cookie] = decision.Rules // to tell later what a change changes
	}
	if provisional {
		for _, after := range []time.Duration{doubtTime, 4 * doubtTime} {
			h.queue.AddAfter(task(request.Pod.Namespace+"/"+request.Pod.Name), after)
		}
	}
	return agentapi.Answer{Decision: agentapi.Enroll, Rules: &decision.Rules, Provisional: provisional, Warnings: decision.Warnings}
}

func (h *handler) judge(ctx context.Context, asked agentapi.Pod) (decision mesh.Decision, provisional bool, err error) {
	if pod := h.cluster.await(ctx, asked); pod != nil {
		decision, err = mesh.Judge(meshPod(pod), h.config.Mesh)
		return decision, false, err
	}
	state := h.currentState()
	decision, err = agentapi.Presume(&state, asked)
	return decision, true, err
}

// check says what is missing of a pod's enrolment, and with which rules it should
// be enrolled, where that is known: the plugin looks into the maps.
func (h *handler) check(file *os.File) agentapi.Answer {
	cookie, err := netns.CookieOf(file)
	if err == nil {
		err = h.node.CheckPod(cookie)
	}
	if err != nil {
		return agentapi.Answer{Error: &agentapi.Error{Message: err.Error()}}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if r, known := h.applied[cookie]; known {
		return agentapi.Answer{Rules: &r}
	}
	return agentapi.Answer{}
}
