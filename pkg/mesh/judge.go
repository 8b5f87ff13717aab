// Package mesh turns what a mesh says about a pod into rules, or into the
// reason why the pod is left alone. It is pure: no kernel, no API server. It
// reads what Istio's CNI plugin and injector read, and guesses nothing: a value
// that means nothing is an error that names it.
package mesh

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// The containers that Istio's injector adds.
const (
	ProxyContainer = "istio-proxy"
	initContainer  = "istio-init" // redirects by iptables
)

// Decision says what is to be done with a pod.
type Decision struct {
	// Skip is the reason why the pod is left alone, as the end of a sentence
	// about it; empty if the pod is to be enrolled.
	Skip string `json:"skip,omitempty"`

	Rules    rules.Rules `json:"rules"` // normalised; without meaning beside Skip
	Warnings []string    `json:"warnings,omitempty"`
}

// Judge decides about a pod as Istio's CNI plugin does. An error names the pod,
// what is wrong with it and what would be right; such a pod must not start
// outside the mesh. Where the effect differs from Istio's, docs/compatibility.md
// says why.
func Judge(pod Pod, config Config) (Decision, error) {
	d, err := judge(pod, config)
	if err != nil {
		return Decision{}, fmt.Errorf("pod %s: %w", pod.fullName(), err)
	}
	if d.Skip != "" {
		return Decision{Skip: d.Skip}, nil
	}
	return d, nil
}

func judge(pod Pod, config Config) (Decision, error) {
	if reason := skip(pod, config); reason != "" {
		return Decision{Skip: reason}, nil
	}
	proxy, _ := pod.proxy()
	base := config.Rules()
	if sc := proxy.SecurityContext; sc != nil {
		if err := setID(&base.ProxyUIDs, "runAsUser", sc.RunAsUser); err != nil {
			return Decision{}, err
		}
		if err := setID(&base.ProxyGIDs, "runAsGroup", sc.RunAsGroup); err != nil {
			return Decision{}, err
		}
	}
	d, err := decide(base, pod.Metadata.Annotations, newEnvironment(proxy))
	if err != nil {
		return Decision{}, err
	}
	for _, key := range unknown(pod.Metadata.Annotations) {
		d.Warnings = append(d.Warnings, fmt.Sprintf("annotation %s means nothing; %s", key, known(key)))
	}
	d.Warnings = append(d.Warnings, identityWarnings(pod, proxy, base)...)
	return d, nil
}

// skip returns why a pod has no sidecar whose traffic is to be redirected.
func skip(pod Pod, config Config) string {
	meta := pod.Metadata
	if pod.Spec.HostNetwork {
		return "it uses the network of its node (hostNetwork)"
	}
	if slices.Contains(config.ExcludedNamespaces, meta.Namespace) {
		return "namespace " + meta.Namespace + " is excluded"
	}
	if pod.has(initContainer) {
		return "it has a container " + initContainer + ", which redirects by iptables: have the injector leave that out"
	}
	proxy, ok := pod.proxy()
	if !ok {
		if pod.has(ProxyContainer) {
			return "its " + ProxyContainer + " is an init container without restartPolicy Always, which ends before the others start"
		}
		return "it has no container " + ProxyContainer
	}
	if len(proxy.Args) >= 2 && proxy.Args[0] == "proxy" && proxy.Args[1] != "" && proxy.Args[1] != "sidecar" {
		return fmt.Sprintf("its proxy is a %s and no sidecar", shorten(proxy.Args[1]))
	}
	if reason := notInjected(meta.Labels, meta.Annotations); reason != "" {
		return reason
	}
	if _, ok := meta.Annotations[annotationStatus]; !ok {
		return "it has no annotation " + annotationStatus + ": the injector did not make it a sidecar pod"
	}
	return ""
}

// notInjected returns how a pod says that it is not for the mesh. The label counts
// alone where there is one, even if nobody can read it.
func notInjected(labels, annotations map[string]string) string {
	what, value := "annotation", annotations[annotationInject]
	if label, ok := labels[annotationInject]; ok {
		what, value = "label", label
	}
	if inject, err := strconv.ParseBool(value); err == nil && !inject {
		return what + " " + annotationInject + " is " + value
	}
	return ""
}

// setID replaces the proxy's ID by what its container says. 0 is no exemption,
// as in Istio: in TPROXY mode the proxy runs as root, and so may apps.
func setID(ids *[]uint32, field string, id *int64) error {
	if id == nil || *id == 0 {
		return nil
	}
	parsed, err := rules.ParseID(strconv.FormatInt(*id, 10))
	if err != nil {
		return &ValueError{field + " of " + ProxyContainer, strconv.FormatInt(*id, 10), errors.New("not an ID: give a number from 0 to 4294967294")}
	}
	*ids = []uint32{parsed}
	return nil
}

// identityWarnings says where the proxy may not be taken for the proxy, or an
// app may be.
func identityWarnings(pod Pod, proxy Container, r rules.Rules) []string {
	var out []string
	uid, gid := r.ProxyUIDs[0], r.ProxyGIDs[0]
	isNot := func(id *int64, want uint32) bool { return id != nil && *id != int64(want) }
	is := func(id *int64, want uint32) bool { return id != nil && *id == int64(want) }
	runUID, runGID := pod.runsAs(proxy)
	if isNot(runUID, uid) && !is(runGID, gid) {
		out = append(out, fmt.Sprintf("%s runs as UID %d, and the proxy is whoever runs as UID %d or GID %d: give it its own runAsUser or runAsGroup, or its connections count as an app's",
			ProxyContainer, *runUID, uid, gid))
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		runUID, runGID := pod.runsAs(c)
		switch {
		case c.Name == ProxyContainer || c.Name == "istio-validation":
		case is(runUID, uid):
			out = append(out, fmt.Sprintf("container %s runs as UID %d, which is the proxy's: its connections are not captured", c.Name, uid))
		case is(runGID, gid):
			out = append(out, fmt.Sprintf("container %s runs as GID %d, which is the proxy's: its connections are not captured", c.Name, gid))
		}
	}
	return out
}
