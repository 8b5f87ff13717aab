package agent

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-mesh/sluice/pkg/mesh"
)

// configHash is the annotation of a static pod's mirror that holds the UID which
// the kubelet, and so the runtime and the cgroups, know the pod by.
const configHash = "kubernetes.io/config.hash"

// trim is what the informer keeps of an object: what mesh reads and repair needs.
// An injected pod is 12 KB and more, of which this is some hundred bytes.
func trim(object any) (any, error) {
	switch o := object.(type) {
	case *corev1.Pod:
		return trimPod(o), nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.Name, ResourceVersion: o.ResourceVersion, Labels: o.Labels}}, nil
	}
	return object, nil
}

func trimPod(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion, DeletionTimestamp: p.DeletionTimestamp,
			Labels: keep(p.Labels), Annotations: keep(p.Annotations),
		},
		Status: corev1.PodStatus{Phase: p.Status.Phase, PodIPs: p.Status.PodIPs},
	}
	out.Spec.HostNetwork = p.Spec.HostNetwork
	if sc := p.Spec.SecurityContext; sc != nil {
		out.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: sc.RunAsUser, RunAsGroup: sc.RunAsGroup}
	}
	out.Spec.InitContainers = trimContainers(p.Spec.InitContainers)
	out.Spec.Containers = trimContainers(p.Spec.Containers)
	return out
}

func keep(all map[string]string) map[string]string {
	out := map[string]string{}
	for key, value := range all {
		if mesh.Reads(key) || key == configHash {
			out[key] = value
		}
	}
	return out
}

func trimContainers(all []corev1.Container) []corev1.Container {
	var out []corev1.Container
	for _, c := range all {
		kept := corev1.Container{Name: c.Name, RestartPolicy: c.RestartPolicy}
		if sc := c.SecurityContext; sc != nil {
			kept.SecurityContext = &corev1.SecurityContext{RunAsUser: sc.RunAsUser, RunAsGroup: sc.RunAsGroup}
		}
		if c.Name == mesh.ProxyContainer {
			kept.Args = slices.Clone(c.Args[:min(len(c.Args), 2)])
			for _, v := range c.Env {
				if mesh.ReadsVariable(v.Name) {
					kept.Env = append(kept.Env, v)
				}
			}
		}
		out = append(out, kept)
	}
	return out
}

// meshPod is the pod as mesh reads it.
func meshPod(p *corev1.Pod) mesh.Pod {
	out := mesh.Pod{Metadata: mesh.Metadata{
		Namespace: p.Namespace, Name: p.Name, UID: string(p.UID), Labels: p.Labels, Annotations: p.Annotations,
	}}
	out.Spec.HostNetwork = p.Spec.HostNetwork
	if sc := p.Spec.SecurityContext; sc != nil {
		out.Spec.SecurityContext = &mesh.SecurityContext{RunAsUser: sc.RunAsUser, RunAsGroup: sc.RunAsGroup}
	}
	out.Spec.InitContainers = meshContainers(p.Spec.InitContainers)
	out.Spec.Containers = meshContainers(p.Spec.Containers)
	return out
}

func meshContainers(all []corev1.Container) []mesh.Container {
	var out []mesh.Container
	for _, c := range all {
		container := mesh.Container{Name: c.Name, Args: c.Args}
		if c.RestartPolicy != nil {
			container.RestartPolicy = string(*c.RestartPolicy)
		}
		if sc := c.SecurityContext; sc != nil {
			container.SecurityContext = &mesh.SecurityContext{RunAsUser: sc.RunAsUser, RunAsGroup: sc.RunAsGroup}
		}
		for _, v := range c.Env {
			variable := mesh.EnvVar{Name: v.Name, Value: v.Value}
			if v.ValueFrom != nil {
				variable.ValueFrom = &struct{}{}
			}
			container.Env = append(container.Env, variable)
		}
		out = append(out, container)
	}
	return out
}

// uids are the names by which the node knows the pod.
func uids(p *corev1.Pod) []string {
	out := []string{string(p.UID)}
	if hash := p.Annotations[configHash]; hash != "" {
		out = append(out, hash)
	}
	return out
}

// addresses are what the API server says that the pod has.
func addresses(p *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

// injects says whether a namespace's pods are in the mesh unless they say
// otherwise: the labels that Istio's injector reads, and those of ambient mode.
func injects(n *corev1.Namespace) bool {
	_, revision := n.Labels["istio.io/rev"]
	return n.Labels["istio-injection"] == "enabled" || revision && n.Labels["istio-injection"] != "disabled" || n.Labels["istio.io/dataplane-mode"] == "ambient"
}
