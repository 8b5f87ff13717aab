package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// verdict is what becomes of a pod.
type verdict struct {
	skip        string // why it is left alone; empty: enrol it
	rules       rules.Rules
	provisional bool // decided without the daemon
	warnings    []string
}

// errUndecidable is returned for a pod about which neither the daemon nor what it
// left says enough: the runtime tries again.
var errUndecidable = errors.New("it cannot be told whether this pod is in the mesh")

// decide asks the daemon, and where none answers decides alone.
func decide(ctx context.Context, c config, pod agentapi.Pod, attachment agentapi.Attachment, netns *os.File) (verdict, error) {
	if c.OwnPod.Namespace != "" && pod.Namespace == c.OwnPod.Namespace && strings.HasPrefix(pod.Name, c.OwnPod.Prefix) {
		return verdict{skip: "it is Sluice's own"}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, daemonTime)
	defer cancel()
	answer, err := agentapi.Call(ctx, c.Socket, agentapi.Request{Verb: agentapi.Add, Attachment: attachment, Pod: pod}, netns)
	switch {
	case errors.Is(err, agentapi.ErrNoDaemon):
		v, alone := decideAlone(c, pod)
		if alone != nil {
			return verdict{}, fmt.Errorf("%w: %w", alone, err)
		}
		v.warnings = append(v.warnings, "decided without the node daemon: "+err.Error())
		return v, nil
	case err != nil:
		return verdict{}, err
	case answer.Decision == agentapi.Skip:
		return verdict{skip: answer.Reason, warnings: answer.Warnings}, nil
	}
	return verdict{rules: *answer.Rules, warnings: answer.Warnings}, nil
}

// decideAlone decides from the state file and the annotations. What it cannot
// see (the proxy's user, its environment, labels) it takes from the mesh's
// defaults: the daemon judges again when it is back.
func decideAlone(c config, pod agentapi.Pod) (verdict, error) {
	state, stateErr := agentapi.ReadState(c.StateFile)
	if stateErr == nil && slices.Contains(state.Mesh.ExcludedNamespaces, pod.Namespace) {
		return verdict{skip: "namespace " + pod.Namespace + " is excluded"}, nil
	}
	if pod.Annotations == nil {
		if in, known := state.Namespaces[pod.Namespace]; stateErr == nil && known && !in {
			return verdict{skip: "namespace " + pod.Namespace + " is not in the mesh"}, nil
		}
		return verdict{}, errors.Join(errUndecidable, stateErr)
	}
	config := mesh.DefaultConfig()
	if stateErr == nil {
		config = state.Mesh
	}
	decision, err := mesh.Judge(presumed(pod), config)
	if err != nil {
		return verdict{}, err
	}
	if decision.Skip != "" {
		return verdict{skip: decision.Skip, warnings: decision.Warnings}, nil
	}
	if stateErr != nil { // the mesh's defaults are not known: fail closed
		return verdict{}, errors.Join(errUndecidable, stateErr)
	}
	return verdict{rules: decision.Rules, provisional: true, warnings: decision.Warnings}, nil
}

// presumed is the pod that annotations alone speak of: if the injector made it a
// sidecar pod, it has a sidecar.
func presumed(pod agentapi.Pod) mesh.Pod {
	return mesh.Pod{
		Metadata: mesh.Metadata{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Annotations: pod.Annotations},
		Spec:     mesh.Spec{Containers: []mesh.Container{{Name: mesh.ProxyContainer}}},
	}
}
