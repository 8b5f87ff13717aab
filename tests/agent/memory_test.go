package agent

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// The daemon's limit, at rest and at its worst, with this many injected pods.
const (
	memoryLimit  = 64 << 20
	memoryPods   = 1000
	injectedSize = 12 << 10 // of one pod, at least, as the API server sends it
)

// asInjected fills a pod as an injector does: volumes, probes, resources, a long
// environment, and annotations that say it all again.
func asInjected(p *corev1.Pod) {
	text := strings.Repeat("an injector's template of "+p.Name+" ", 60)
	p.Annotations["sidecar.istio.io/status"] = `{"initContainers":["istio-validation"],"containers":["istio-proxy"],"volumes":["workload-socket","istio-envoy"],"imagePullSecrets":null,"revision":"default"}`
	p.Annotations["kubectl.kubernetes.io/last-applied-configuration"] = text
	p.Labels = map[string]string{"app": p.Name, "pod-template-hash": "5d9c6fb7c4", "service.istio.io/canonical-name": p.Name}
	p.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubelet", Operation: "Update", FieldsV1: &metav1.FieldsV1{Raw: []byte(`{"f:metadata":{"f:annotations":{"x":"` + text + `"}}}`)}}}
	for i := range p.Spec.Containers {
		c := &p.Spec.Containers[i]
		c.Image = "registry.example/" + p.Name + ":v1.2.3@sha256:" + strings.Repeat("ab", 32)
		for n := range 40 {
			c.Env = append(c.Env, corev1.EnvVar{Name: fmt.Sprintf("ISTIO_META_VARIABLE_%d", n), Value: strings.Repeat("v", 30)})
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: fmt.Sprintf("volume-%d", n%12), MountPath: fmt.Sprintf("/etc/istio/mount-%d", n)})
		}
		c.Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi")}
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{Name: c.Name, Image: c.Image, ImageID: c.Image, ContainerID: "containerd://" + strings.Repeat("cd", 32)})
	}
	for n := range 12 {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: fmt.Sprintf("volume-%d", n)})
	}
}

// status reads a line of /proc/PID/status that is in kB.
func (d *daemon) status(line string) int {
	d.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		d.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), line+":")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		d.t.Fatalf("no %s in %s", line, text)
	}
	n, err := strconv.Atoi(fields[0])
	if err != nil {
		d.t.Fatal(err)
	}
	return n << 10
}

func TestAThousandInjectedPodsFitInTheDaemonsMemory(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	put := func(i int, more ...string) {
		n.api.put(fmt.Sprintf("cart-%d", i), fmt.Sprintf("0a1b2c3d-0000-4000-8000-%012d", i), injected(more...), asInjected)
	}
	for i := range memoryPods {
		put(i)
	}
	if each := n.api.size() / memoryPods; each < injectedSize {
		t.Fatalf("a pod has %d bytes: none is that small", each)
	} else {
		t.Logf("a pod has %d bytes", each)
	}
	d := n.start().awaitReady()                           // looks for each to repair it, and says an Event
	kit.Eventually(t, "the pods are known", func() bool { // until then a runtime tries again
		_, err := n.add(p, "cart-7", "0a1b2c3d-0000-4000-8000-000000000007", nil)
		return err == nil
	})
	if yes, doubt := n.enrolled(p); !yes || doubt {
		t.Fatal("the daemon does not know the pods: enrolled:", yes, "in doubt:", doubt)
	}
	for range 5 { // one change after the other
		for i := range memoryPods / 5 {
			put(i, excludePorts, "80")
		}
		time.Sleep(time.Second)
	}
	now, peak := d.status("VmRSS"), d.status("VmHWM")
	t.Logf("at rest: %d KiB, at its worst: %d KiB", now>>10, peak>>10)
	if now > memoryLimit || peak > memoryLimit {
		t.Errorf("resident are %d bytes, at the worst %d, and the limit is %d", now, peak, memoryLimit)
	}
}

func TestANodeHoldsAsManyPodsAsItIsTold(t *testing.T) {
	n := newNode(t)
	n.start("--max-pods", "2").awaitReady()
	var out string
	var err error
	for i := range 3 {
		p, uid := kit.NewPod(t), fmt.Sprintf("u%d", i)
		n.api.put("cart-"+uid, uid, injected(), func(p *corev1.Pod) { p.Status = corev1.PodStatus{Phase: corev1.PodPending} })
		if out, err = n.add(p, "cart-"+uid, uid, nil); err != nil && i < 2 {
			t.Fatalf("pod %d: %v %s", i, err, out)
		}
	}
	if err == nil || !strings.Contains(out, "the table is full: ") || !strings.Contains(out, "or give the node larger tables") {
		t.Errorf("the third of two pods: %v %s", err, out)
	}
}
