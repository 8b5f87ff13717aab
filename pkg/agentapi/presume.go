package agentapi

import (
	"errors"
	"slices"

	"github.com/sluice-mesh/sluice/pkg/mesh"
)

// ErrUndecidable is returned for a pod about which too little is known: the
// runtime is to try again.
var ErrUndecidable = errors.New("it cannot be told whether this pod is in the mesh")

// Presume decides about a pod from a state and what the runtime says of it, for a
// plugin without a daemon and a daemon without an API server. What they cannot see
// (the proxy's user, its environment, labels) is taken from the mesh's defaults,
// so an enrolment is provisional: to be judged again. A nil state is one that
// nobody has left.
func Presume(state *State, pod Pod) (mesh.Decision, error) {
	if state != nil && slices.Contains(state.Mesh.ExcludedNamespaces, pod.Namespace) {
		return mesh.Decision{Skip: "namespace " + pod.Namespace + " is excluded"}, nil
	}
	if pod.Annotations == nil {
		if state != nil {
			if in, known := state.Namespaces[pod.Namespace]; known && !in {
				return mesh.Decision{Skip: "namespace " + pod.Namespace + " is not in the mesh"}, nil
			}
		}
		return mesh.Decision{}, ErrUndecidable
	}
	config := mesh.DefaultConfig()
	if state != nil {
		config = state.Mesh
	}
	decision, err := mesh.Judge(presumed(pod), config)
	if err == nil && decision.Skip == "" && state == nil {
		return mesh.Decision{}, ErrUndecidable // the mesh's defaults are not known: fail closed
	}
	return decision, err
}

// presumed is the pod that annotations alone speak of: if the injector made it a
// sidecar pod, it has a sidecar.
func presumed(pod Pod) mesh.Pod {
	return mesh.Pod{
		Metadata: mesh.Metadata{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Annotations: pod.Annotations},
		Spec:     mesh.Spec{Containers: []mesh.Container{{Name: mesh.ProxyContainer}}},
	}
}
