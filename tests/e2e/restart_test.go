package e2e

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

// loaded has the app put a load on a URL from its first moment.
func loaded(url string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Spec.Containers[0].Args = []string{"serve", url} }
}

// noneEscaped wants the load of such a pod to have succeeded, and to have passed its
// proxy with every request from the first one.
func (s *space) noneEscaped(pod string) {
	s.t.Helper()
	s.awaitLoad(pod, counts{})
	eventually(s.t, "requests of "+pod+" succeed", func() error {
		var now counts
		s.control(pod, "/load", nil, &now)
		if now.Escaped > 0 {
			s.t.Fatalf("%d requests of %s escaped its proxy", now.Escaped, pod)
		}
		if now.New+now.Kept-now.Failed < 20 {
			return errors.New("too few do")
		}
		return nil
	})
}

func TestPodsStayRedirectedWhenKubeletAndRuntimeRestart(t *testing.T) {
	bed := needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.load("client", server, func() {
		for _, name := range []string{testbed.Kubelet, testbed.Containerd} {
			bed.Stop(name)
			if err := errors.Join(bed.Start(name), bed.AwaitNode(t.Context())); err != nil {
				t.Fatal(err)
			}
		}
		s.run(meshed("new"))
	})
	s.goesThrough("new", server, "out new")
}

func TestANewSandboxOfTheSamePodIsEnrolledBeforeItsAppRuns(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"))
	s.run(meshed("client", loaded(s.appURL("server"))))
	s.noneEscaped("client")
	old := s.get("client")
	signal(t, unix.SIGKILL, pausesOf(t, old)...)
	eventually(t, "the pod has another sandbox", func() error {
		if p := s.get("client"); p.UID != old.UID || p.Status.PodIP == old.Status.PodIP || !ready(p) {
			return errors.New("it has not")
		}
		return nil
	})
	s.awaitReady("client")
	s.noneEscaped("client")
	s.goesThrough("client", s.appURL("server"), "out client")
	n := 0
	for _, p := range infos(t) {
		if p.Name == "client" && p.Namespace == s.name {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d namespaces are enrolled for it", n)
	}
}

func TestAPodOfAStatefulSetIsEnrolledUnderTheSameNameAgain(t *testing.T) {
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"))
	server := s.appURL("server")
	p := meshed("web")
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: appsv1.StatefulSetSpec{
		ServiceName: "web", Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: p.Labels, Annotations: p.Annotations}, Spec: p.Spec},
	}}
	if _, err := cluster.client.AppsV1().StatefulSets(s.name).Create(t.Context(), set, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var before *corev1.Pod
	for range 3 {
		eventually(t, "web-0 is ready, and new", func() error {
			now, err := cluster.client.CoreV1().Pods(s.name).Get(t.Context(), "web-0", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if !ready(now) || before != nil && now.UID == before.UID {
				return errors.New("it is not")
			}
			before = now
			return nil
		})
		s.goesThrough("web-0", server, "out web-0")
		if err := cluster.client.CoreV1().Pods(s.name).Delete(t.Context(), "web-0", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAfterARebootEverythingComesBackEnrolledBeforeAnyAppRuns(t *testing.T) {
	bed := needNode(t)
	needSluice(t)
	s := newSpace(t)
	always := corev1.RestartPolicyAlways
	keep := func(p *corev1.Pod) { p.Spec.RestartPolicy = always }
	s.run(plain("server"))
	// A service's address stays, a pod's does not.
	server := "http://" + s.service("server", 8080) + ":80"
	s.run(meshed("client", keep, loaded(server)), meshed("sidecar", native, loaded(server)))
	s.noneEscaped("client")
	was := map[string]string{}
	for _, name := range []string{"server", "client", "sidecar"} {
		was[name] = s.get(name).Status.PodIP
	}
	if err := bed.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"server", "client", "sidecar"} {
		eventually(t, name+" has come back", func() error {
			if p := s.get(name); !ready(p) || p.Status.PodIP == was[name] && p.Status.ContainerStatuses[0].RestartCount == 0 {
				return errors.New("it has not")
			}
			return nil
		})
	}
	awaitSluice(t)
	for _, name := range []string{"client", "sidecar"} {
		s.noneEscaped(name)
		s.goesThrough(name, server, "out "+name)
	}
}
