package mesh

// Pod is what of a Kubernetes Pod says how it is redirected. The tags are those
// of the Kubernetes API, so that a pod's JSON decodes into it; whatever else a
// pod has is ignored.
type Pod struct {
	Metadata Metadata `json:"metadata"`
	Spec     Spec     `json:"spec"`
}

// Metadata names a pod and holds what people and the injector say of it.
type Metadata struct {
	Namespace   string            `json:"namespace,omitempty"`
	Name        string            `json:"name,omitempty"`
	UID         string            `json:"uid,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Spec is what runs in a pod.
type Spec struct {
	HostNetwork     bool             `json:"hostNetwork,omitempty"`
	SecurityContext *SecurityContext `json:"securityContext,omitempty"`
	InitContainers  []Container      `json:"initContainers,omitempty"`
	Containers      []Container      `json:"containers,omitempty"`
}

// Container is one container. RestartPolicy "Always" makes an init container a
// native sidecar, which runs as long as the pod.
type Container struct {
	Name            string           `json:"name"`
	Args            []string         `json:"args,omitempty"`
	Env             []EnvVar         `json:"env,omitempty"`
	RestartPolicy   string           `json:"restartPolicy,omitempty"`
	SecurityContext *SecurityContext `json:"securityContext,omitempty"`
}

// EnvVar is a variable of a container. With ValueFrom its value is known to the
// kubelet alone.
type EnvVar struct {
	Name      string    `json:"name"`
	Value     string    `json:"value,omitempty"`
	ValueFrom *struct{} `json:"valueFrom,omitempty"`
}

// SecurityContext says who runs a container, or every container of a pod that
// does not say so itself.
type SecurityContext struct {
	RunAsUser  *int64 `json:"runAsUser,omitempty"`
	RunAsGroup *int64 `json:"runAsGroup,omitempty"`
}

// fullName is how messages name the pod.
func (p Pod) fullName() string {
	if p.Metadata.Namespace == "" {
		return p.Metadata.Name
	}
	return p.Metadata.Namespace + "/" + p.Metadata.Name
}

// proxy returns the container that Istio's injector adds: an ordinary one, or a
// native sidecar. An init container that ends is no proxy.
func (p Pod) proxy() (Container, bool) {
	for _, c := range p.Spec.InitContainers {
		if c.Name == ProxyContainer && c.RestartPolicy == "Always" {
			return c, true
		}
	}
	for _, c := range p.Spec.Containers {
		if c.Name == ProxyContainer {
			return c, true
		}
	}
	return Container{}, false
}

// has says whether any container, init or ordinary, has this name.
func (p Pod) has(name string) bool {
	for _, list := range [][]Container{p.Spec.InitContainers, p.Spec.Containers} {
		for _, c := range list {
			if c.Name == name {
				return true
			}
		}
	}
	return false
}

// runsAs returns the UID and GID that a container runs with; nil is what its
// image says.
func (p Pod) runsAs(c Container) (uid, gid *int64) {
	for _, sc := range []*SecurityContext{c.SecurityContext, p.Spec.SecurityContext} {
		if sc == nil {
			continue
		}
		if uid == nil {
			uid = sc.RunAsUser
		}
		if gid == nil {
			gid = sc.RunAsGroup
		}
	}
	return uid, gid
}
