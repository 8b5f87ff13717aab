package e2e

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The users of the app and of the proxy.
const (
	appUser   = 1000
	proxyUser = 1337
)

const (
	statusAnnotation = "sidecar.istio.io/status"
	excludeInbound   = "traffic.sidecar.istio.io/excludeInboundPorts"
	excludeOutbound  = "traffic.sidecar.istio.io/excludeOutboundPorts"
	captureFrom      = "sluice.dev/capture"

	validation = "istio-validation"
	proxyName  = "istio-proxy"
)

// plain is a pod outside the mesh: the app alone.
func plain(name string) *corev1.Pod {
	seconds, yes := int64(1), true
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}, Annotations: map[string]string{}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &seconds,
			SecurityContext: &corev1.PodSecurityContext{
				RunAsNonRoot: &yes, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
			Containers: []corev1.Container{podapp("app", "serve")},
		},
	}
}

// podapp is a container of the app's image.
func podapp(name string, args ...string) corev1.Container {
	return container(name, *appImage, appUser, args...)
}

func container(name, image string, user int64, args ...string) corev1.Container {
	no, yes := false, true
	return corev1.Container{
		Name: name, Image: image, ImagePullPolicy: corev1.PullNever, Args: args,
		SecurityContext: &corev1.SecurityContext{
			RunAsUser: &user, RunAsGroup: &user, RunAsNonRoot: &yes, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
	}
}

// meshed is a pod as Istio's injector leaves it where the CNI plugin does the
// redirection. The control port is excluded, so that a test reaches the app whatever
// the proxy does.
func meshed(name string, changes ...func(*corev1.Pod)) *corev1.Pod {
	p := plain(name)
	p.Annotations[statusAnnotation] = `{"initContainers":["istio-validation"],"containers":["istio-proxy"]}`
	p.Annotations[excludeInbound] = "9000"
	p.Labels["security.istio.io/tlsMode"] = "istio"
	p.Spec.InitContainers = []corev1.Container{container(validation, *appImage, proxyUser, "validate")}
	p.Spec.Containers = append(p.Spec.Containers, proxy())
	for _, change := range changes {
		change(p)
	}
	return p
}

func proxy() corev1.Container {
	c := container(proxyName, *proxyImage, proxyUser)
	c.Env = []corev1.EnvVar{{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}}
	return c
}

// native makes the proxy a native sidecar: an init container that goes on.
func native(p *corev1.Pod) {
	always := corev1.ContainerRestartPolicyAlways
	c := proxy()
	c.RestartPolicy = &always
	p.Spec.Containers = p.Spec.Containers[:1]
	p.Spec.InitContainers = append(p.Spec.InitContainers, c)
}

// annotated sets annotations: name, value, name, value.
func annotated(pairs ...string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		for i := 0; i+1 < len(pairs); i += 2 {
			p.Annotations[pairs[i]] = pairs[i+1]
		}
	}
}

// unvalidated has no istio-validation.
func unvalidated(p *corev1.Pod) { p.Spec.InitContainers = p.Spec.InitContainers[1:] }
