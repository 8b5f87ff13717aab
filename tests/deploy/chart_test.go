package deploy

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
)

func TestEachPlatformsDirectoriesAreMountedAndTold(t *testing.T) {
	type expected struct {
		conf, bin, cgroup, selinux string
		quota, scc                 bool
	}
	usual := expected{conf: "/etc/cni/net.d", bin: "/opt/cni/bin"}
	gke, openshift, inContainer := usual, usual, usual
	gke.bin, gke.quota = "/home/kubernetes/bin", true
	openshift.conf, openshift.bin, openshift.selinux, openshift.scc = "/etc/kubernetes/cni/net.d", "/var/lib/cni/bin", "spc_t", true
	inContainer.cgroup = "/host/cgroup"
	for platform, want := range map[string]expected{
		"": usual, "aks": usual, "eks": usual, "gke": gke, "openshift": openshift, "minikube": inContainer, "kind": inContainer,
		"k3s": {conf: "/var/lib/rancher/k3s/agent/etc/cni/net.d", bin: "/var/lib/rancher/k3s/data/cni"},
	} {
		t.Run("platform="+platform, func(t *testing.T) {
			m := mustRender(t, "--set", "platform="+platform)
			pod := one[*appsv1.DaemonSet](t, m).Spec.Template.Spec
			got := expected{
				conf: argument(pod, "--cni-conf-dir="), bin: argument(pod, "--cni-bin-dir="), cgroup: argument(pod, "--cgroup="),
				quota: has[*corev1.ResourceQuota](m),
			}
			if o := pod.SecurityContext.SELinuxOptions; o != nil {
				got.selinux = o.Type
			}
			got.scc = slices.Contains(rights(one[*rbacv1.Role](t, m).Rules), "securitycontextconstraints: use of privileged")
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
			for _, dir := range []string{got.conf, got.bin} {
				if !mounted(pod, dir) {
					t.Errorf("%s is not mounted at its own path", dir)
				}
			}
		})
	}
}

func argument(pod corev1.PodSpec, flag string) string {
	for _, a := range pod.Containers[0].Args {
		if value, ok := strings.CutPrefix(a, flag); ok {
			return value
		}
	}
	return ""
}

func mounted(pod corev1.PodSpec, path string) bool {
	for _, m := range pod.Containers[0].VolumeMounts {
		for _, v := range pod.Volumes {
			if v.Name == m.Name && v.HostPath.Path == path && m.MountPath == path && !m.ReadOnly {
				return true
			}
		}
	}
	return false
}

func TestRepairModesGetTheRightsTheyNeedAndNoOther(t *testing.T) {
	for mode, more := range map[string][]string{
		"repair": nil, "off": nil, "label": {"pods: patch"}, "delete": {"pods: delete"},
	} {
		m := mustRender(t, "--set-string", "repair.mode="+mode)
		want := append(slices.Clone(usualRights), more...)
		if diff := cmp.Diff(want, rights(one[*rbacv1.ClusterRole](t, m).Rules)); diff != "" {
			t.Errorf("repair.mode=%s: %s", mode, diff)
		}
		if got := argument(one[*appsv1.DaemonSet](t, m).Spec.Template.Spec, "--repair="); got != mode {
			t.Errorf("the daemon is told %q, not %q", got, mode)
		}
	}
}

func TestValuesReachTheDaemonSet(t *testing.T) {
	const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	m := mustRender(t, "--set", strings.Join([]string{
		"image.registry=registry.example:5000/mesh", "image.digest=" + digest, "image.pullSecrets={puller}",
		"daemon.maxUnavailable=10%", "daemon.podLabels.k8s-app=istio-cni-node", "daemon.listen=node",
		"daemon.seccompProfile.type=Localhost", "daemon.seccompProfile.localhostProfile=sluice.json",
		"daemon.appArmorProfile.type=RuntimeDefault", "daemon.seLinuxOptions.type=super_t", "daemon.extraCapabilities={DAC_OVERRIDE}",
		"resourceQuota.enabled=true", "repair.resetConnections=true", "uninstall.runningPods=direct", "mesh.excludedNamespaces={kube-system,gatekeeper}",
	}, ","))
	set := one[*appsv1.DaemonSet](t, m)
	pod := set.Spec.Template.Spec
	c := pod.Containers[0]
	for what, holds := range map[string]bool{
		"the digest is pulled":           c.Image == "registry.example:5000/mesh/sluice@"+digest,
		"with a secret":                  slices.Equal(pod.ImagePullSecrets, []corev1.LocalObjectReference{{Name: "puller"}}),
		"a tenth of the nodes at a time": set.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.String() == "10%",
		"the untaint controller's label": set.Spec.Template.Labels["k8s-app"] == "istio-cni-node",
		"the selector is without it":     set.Spec.Selector.MatchLabels["k8s-app"] == "",
		"it listens on the node":         argument(pod, "--listen=") == "$(NODE_IP):15095" && c.ReadinessProbe.HTTPGet.Host == "",
		"seccomp":                        *pod.SecurityContext.SeccompProfile.LocalhostProfile == "sluice.json",
		"AppArmor":                       pod.SecurityContext.AppArmorProfile.Type == corev1.AppArmorProfileTypeRuntimeDefault,
		"SELinux":                        pod.SecurityContext.SELinuxOptions.Type == "super_t",
		"one more capability":            slices.Contains(c.SecurityContext.Capabilities.Add, "DAC_OVERRIDE"),
		"connections are reset":          slices.Contains(c.Args, "--repair-reset-connections"),
		"running pods go direct":         argument(pod, "--uninstall-running-pods=") == "direct",
		"namespaces are excluded":        argument(pod, "--exclude-namespaces=") == "kube-system,gatekeeper,sluice-system",
	} {
		if !holds {
			t.Error("not so: ", what)
		}
	}
	quota := one[*corev1.ResourceQuota](t, m)
	if quota.Namespace != "sluice-system" || quota.Spec.ScopeSelector.MatchExpressions[0].Values[0] != "system-node-critical" {
		t.Error("the quota is ", quota)
	}
}

func TestAppArmorIsAnAnnotationBeforeKubernetes130(t *testing.T) {
	pod := one[*appsv1.DaemonSet](t, mustRender(t, "--kube-version", "1.29.0")).Spec.Template
	if pod.Annotations["container.apparmor.security.beta.kubernetes.io/sluiced"] != "unconfined" || pod.Spec.SecurityContext.AppArmorProfile != nil {
		t.Error("annotations are ", pod.Annotations)
	}
}

func TestABadValueIsRefusedWithASentence(t *testing.T) {
	for value, want := range map[string]string{
		"platform=gce":                         "'/platform': value must be one of '', 'aks', 'eks'",
		"imge.tag=1":                           "additional properties 'imge' not allowed",
		"repair.mode=restart":                  "'/repair/mode': value must be one of 'repair', 'label', 'delete', 'off'",
		"daemon.port=70000":                    "'/daemon/port': maximum: got 70,000, want 65,535",
		"uninstall.runningPods=stop":           "'/uninstall/runningPods': value must be one of 'keep', 'direct'",
		"mesh.dns=perhaps":                     "'/mesh/dns': got string, want boolean",
		"image.digest=latest":                  `image.digest is "latest": give sha256: and 64 hexadecimal digits`,
		"cni.binDir=opt/cni/bin":               `cni.binDir is "opt/cni/bin": give an absolute path`,
		"cgroupDir=cgroup":                     `cgroupDir is "cgroup": give an absolute path`,
		"daemon.maxUnavailable=0":              `daemon.maxUnavailable is "0": give a number of nodes from 1`,
		"daemon.maxUnavailable=101%":           `daemon.maxUnavailable is "101%": give a number of nodes from 1`,
		"daemon.resync=soon":                   `daemon.resync is "soon": give a time such as 30s`,
		"daemon.extraCapabilities={NET_RAW}":   "value must be one of 'DAC_OVERRIDE', 'CHOWN', 'FOWNER'",
		"daemon.seccompProfile.type=Localhost": "'/daemon/seccompProfile': missing property 'localhostProfile'",
	} {
		if _, err := render(t, "--set", value); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: the answer is %v, want %q in it", value, err, want)
		}
	}
	if _, err := render(t, "--set", "namespace.create=true", "--namespace", "kube-system"); err == nil || !strings.Contains(err.Error(), "install into one of Sluice's own") {
		t.Error("into kube-system: ", err)
	}
}
