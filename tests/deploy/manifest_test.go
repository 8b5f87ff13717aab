package deploy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

func committed(t *testing.T) manifest {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "deploy/sluice.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, text)
}

func TestTheDaemonsPodIsConfined(t *testing.T) {
	set := one[*appsv1.DaemonSet](t, committed(t))
	pod := set.Spec.Template.Spec
	c := pod.Containers[0]
	s := c.SecurityContext
	for what, holds := range map[string]bool{
		"one container":              len(pod.Containers) == 1 && len(pod.InitContainers) == 0,
		"not privileged":             !*s.Privileged && !*s.AllowPrivilegeEscalation,
		"its file system read-only":  *s.ReadOnlyRootFilesystem,
		"all capabilities dropped":   slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}),
		"the node's network":         pod.HostNetwork && pod.HostPID && !pod.HostIPC,
		"system-node-critical":       pod.PriorityClassName == "system-node-critical",
		"every taint tolerated":      slices.Equal(pod.Tolerations, []corev1.Toleration{{Operator: corev1.TolerationOpExists}}),
		"one node after the other":   set.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.String() == "1",
		"resources set":              !c.Resources.Requests.Memory().IsZero() && !c.Resources.Limits.Memory().IsZero() && !c.Resources.Requests.Cpu().IsZero(),
		"probes on the loopback":     c.LivenessProbe.HTTPGet.Host == "127.0.0.1" && c.ReadinessProbe.HTTPGet.Host == "127.0.0.1",
		"it listens on the loopback": slices.Contains(c.Args, "--listen=127.0.0.1:15095"),
		"no host port is reserved":   len(c.Ports) == 0,
		"the runtime's seccomp":      pod.SecurityContext.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault,
	} {
		if !holds {
			t.Error("not so: ", what)
		}
	}
}

func TestTheDaemonMountsOnlyWhatItNeeds(t *testing.T) {
	pod := one[*appsv1.DaemonSet](t, committed(t)).Spec.Template.Spec
	paths := map[string]string{}
	for _, v := range pod.Volumes {
		if v.HostPath == nil {
			t.Errorf("volume %s is not of the host", v.Name)
			continue
		}
		paths[v.Name] = v.HostPath.Path
	}
	got := map[string]string{}
	for _, m := range pod.Containers[0].VolumeMounts {
		how := "writable"
		if m.ReadOnly {
			how = "read-only"
		}
		if m.MountPropagation != nil {
			how += ", " + string(*m.MountPropagation)
		}
		got[paths[m.Name]+" at "+m.MountPath] = how
	}
	want := map[string]string{
		"/sys/fs/cgroup at /host/cgroup":     "read-only, HostToContainer",
		"/sys/fs/bpf at /sys/fs/bpf":         "writable, HostToContainer",
		"/var/run/netns at /var/run/netns":   "read-only, HostToContainer",
		"/var/run/sluice at /var/run/sluice": "writable",
		"/etc/cni/net.d at /etc/cni/net.d":   "writable",
		"/opt/cni/bin at /opt/cni/bin":       "writable",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestTheNamespaceSaysThatItsPodsArePrivileged(t *testing.T) {
	labels := one[*corev1.Namespace](t, committed(t)).Labels
	if labels["pod-security.kubernetes.io/enforce"] != "privileged" {
		t.Error("labels are ", labels)
	}
}

// rights are a role's, one line for each resource.
func rights(rules []rbacv1.PolicyRule) []string {
	var out []string
	for _, r := range rules {
		for _, resource := range r.Resources {
			line := resource + ": " + strings.Join(r.Verbs, " ")
			if len(r.ResourceNames) > 0 {
				line += " of " + strings.Join(r.ResourceNames, " ")
			}
			out = append(out, line)
		}
	}
	return out
}

var usualRights = []string{"pods: list watch", "namespaces: list watch", "events: create patch"}

func TestTheDaemonsRightsAreTheseAlone(t *testing.T) {
	m := committed(t)
	if diff := cmp.Diff(usualRights, rights(one[*rbacv1.ClusterRole](t, m).Rules)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"daemonsets: get list watch of sluiced"}, rights(one[*rbacv1.Role](t, m).Rules)); diff != "" {
		t.Error(diff)
	}
	account := one[*corev1.ServiceAccount](t, m)
	for _, s := range append(one[*rbacv1.ClusterRoleBinding](t, m).Subjects, one[*rbacv1.RoleBinding](t, m).Subjects...) {
		if s.Kind != "ServiceAccount" || s.Name != account.Name || s.Namespace != account.Namespace {
			t.Error("bound to ", s)
		}
	}
}

func TestTheKustomizeBaseHoldsTheSameObjects(t *testing.T) {
	dir := filepath.Join(root, "deploy/kustomize")
	text, err := os.ReadFile(filepath.Join(dir, "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var base struct{ Resources []string }
	if err := yaml.Unmarshal(text, &base); err != nil {
		t.Fatal(err)
	}
	var all []byte
	for _, name := range base.Resources {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		all = append(append(all, "---\n"...), text...)
	}
	if diff := cmp.Diff(committed(t).objects, decode(t, all).objects); diff != "" {
		t.Error(diff)
	}
	if there, _ := filepath.Glob(filepath.Join(dir, "*.yaml")); len(there) != len(base.Resources)+1 {
		t.Errorf("the directory has %v, and the base names %v", there, base.Resources)
	}
}
