package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestSidecarPodsAreRedirectedWithoutAnyCapability: as the injector writes them, in a
// namespace that enforces the restricted Pod Security Standard.
func TestSidecarPodsAreRedirectedWithoutAnyCapability(t *testing.T) {
	needSluice(t)
	sidecarPodsAreRedirected(t)
}

func sidecarPodsAreRedirected(t *testing.T) {
	for _, form := range []struct {
		name   string
		change func(*corev1.Pod)
	}{
		{"a container", func(*corev1.Pod) {}},
		{"a native sidecar", native},
	} {
		t.Run(form.name, func(t *testing.T) {
			s := newSpace(t)
			s.run(plain("outside"), meshed("client", form.change), meshed("server", form.change))
			for _, name := range []string{"client", "server"} {
				wantValidated(t, s.get(name))
				wantNoCapability(t, s, name)
			}
			client, server, outside := s.get("client").Status.PodIP, s.get("server").Status.PodIP, s.get("outside").Status.PodIP
			s.sees("client", "http://"+outside+":8080", "out client "+client+" "+outside+":8080")
			s.sees("outside", "http://"+server+":8080", "in server "+outside+" "+server+":8080")
			s.sees("client", "http://"+server+":8080", "out client "+client+" "+server+":8080", "in server "+client+" "+server+":8080")
			got := s.fetch("client", "http://"+outside+":8080")
			if host, _, _ := net.SplitHostPort(got.Local); host != client || got.Peer != outside+":8080" {
				t.Errorf("the client's socket is %s to %s; it must see its own address and the one it called", got.Local, got.Peer)
			}
			if got := s.fetch("outside", "http://"+server+":8080"); !strings.HasPrefix(got.Answer.Remote, "127.0.0.6:") {
				t.Error("the app was called by", got.Answer.Remote, "and not by its proxy")
			}
			s.goesStraight("client", "http://"+client+":8080") // an app may call itself freely
		})
	}
}

func wantValidated(t *testing.T, p *corev1.Pod) {
	t.Helper()
	for _, c := range p.Status.InitContainerStatuses {
		if c.Name == validation {
			if c.State.Terminated == nil || c.State.Terminated.ExitCode != 0 {
				t.Error(p.Name, "was not validated:", c.State)
			}
			return
		}
	}
	t.Error(p.Name, "has no", validation)
}

const noCapability = "0000000000000000"

// wantNoCapability looks at the pod's description, at the app, and on a node of ours
// at every process of the pod but its pause.
func wantNoCapability(t *testing.T, s *space, name string) {
	t.Helper()
	p := s.get(name)
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if len(c.SecurityContext.Capabilities.Add) > 0 {
			t.Error(name, c.Name, "adds", c.SecurityContext.Capabilities.Add)
		}
	}
	var capabilities map[string]string
	s.control(name, "/capabilities", nil, &capabilities)
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
		if capabilities[set] != noCapability {
			t.Errorf("%s: the app's %s is %q", name, set, capabilities[set])
		}
	}
	if cluster.bed == nil {
		return
	}
	programs := map[string]bool{}
	for _, pid := range podProcesses(t, p, "") {
		program, _ := os.Readlink(filepath.Join("/proc", pid, "exe"))
		status, err := os.ReadFile(filepath.Join("/proc", pid, "status"))
		if err != nil || filepath.Base(program) == "pause" {
			continue
		}
		programs[filepath.Base(program)] = true
		if !strings.Contains(string(status), "CapPrm:\t"+noCapability) || !strings.Contains(string(status), "CapEff:\t"+noCapability) {
			t.Errorf("%s: %s has a capability: %s", name, program, status)
		}
	}
	if !programs["haproxy"] || !programs["podapp"] {
		t.Errorf("%s: proxy and app are not among the pod's processes %v", name, programs)
	}
}

// podProcesses are the PIDs of a pod's processes, whose cgroups name its UID; with a
// program, only those that run it.
func podProcesses(t *testing.T, p *corev1.Pod, program string) (pids []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		text, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(text), "pod"+string(p.UID)) {
			continue
		}
		exe, _ := os.Readlink(filepath.Join(filepath.Dir(path), "exe"))
		if program == "" || filepath.Base(exe) == program {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	return pids
}

func TestAJobWithANativeSidecarEndsAndLeavesNothing(t *testing.T) {
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"))
	p := meshed("job", native)
	p.Spec.Containers[0].Args = []string{"fetch", "60s", s.appURL("server")}
	p.Spec.RestartPolicy = corev1.RestartPolicyNever
	none := int32(0)
	job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: "job"}, Spec: batchv1.JobSpec{
		BackoffLimit: &none, Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: p.Labels, Annotations: p.Annotations}, Spec: p.Spec},
	}}
	if _, err := cluster.client.BatchV1().Jobs(s.name).Create(t.Context(), job, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the job succeeds", func() error {
		job, err := cluster.client.BatchV1().Jobs(s.name).Get(t.Context(), "job", metav1.GetOptions{})
		if err == nil && job.Status.Succeeded != 1 {
			err = fmt.Errorf("it is %+v", job.Status)
		}
		return err
	})
	pods, err := cluster.client.CoreV1().Pods(s.name).List(t.Context(), metav1.ListOptions{LabelSelector: "job-name=job"})
	if err != nil || len(pods.Items) != 1 {
		t.Fatal("the job's pods:", pods, err)
	}
	pod := pods.Items[0]
	var got fetched
	if text := pod.Status.ContainerStatuses[0].State.Terminated.Message; json.Unmarshal([]byte(text), &got) != nil {
		t.Fatal("the client said", text)
	}
	if want := "out " + pod.Name + " " + pod.Status.PodIP + " " + s.appAddress("server"); got.path() != want {
		t.Errorf("its request met %q, not %q", got.path(), want)
	}
	if cluster.bed != nil {
		s.notEnrolled(pod.Name)
	}
}

// notEnrolled waits until no map holds the pod.
func (s *space) notEnrolled(name string) {
	s.t.Helper()
	eventually(s.t, name+" is not enrolled", func() error {
		if slices.Contains(enrolled(s.t), s.name+"/"+name) {
			return errors.New("it is")
		}
		return nil
	})
}

func TestABadAnnotationKeepsThePodFromStartingAndSaysWhy(t *testing.T) {
	needSluice(t)
	s := newSpace(t)
	s.create(meshed("bad", annotated(excludeOutbound, "80,http")))
	s.awaitEvent("bad", "FailedCreatePodSandBox", excludeOutbound, `"http"`)
	p := s.get("bad")
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if c.State.Waiting == nil || c.LastTerminationState.Terminated != nil {
			t.Error("container", c.Name, "has started:", c.State)
		}
	}
	s.run(meshed("good", annotated(excludeOutbound, "80")))
}

func TestInitContainersHaveANetworkOnlyWithProxyReady(t *testing.T) {
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"))
	server := s.appURL("server")
	early := func(limit string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Spec.InitContainers = append(p.Spec.InitContainers, podapp("early", "fetch", limit, server))
		}
	}
	s.create(meshed("always", early("3s")))
	s.run(meshed("late", early("60s"), annotated(captureFrom, "proxy-ready")))

	message := func(pod string) string {
		for _, c := range s.get(pod).Status.InitContainerStatuses {
			for _, state := range []corev1.ContainerState{c.State, c.LastTerminationState} {
				if c.Name == "early" && state.Terminated != nil {
					return state.Terminated.Message
				}
			}
		}
		return ""
	}
	var got fetched
	if err := json.Unmarshal([]byte(message("late")), &got); err != nil || got.path() != "" {
		t.Errorf("with proxy-ready the init container's request met %q (%v)", got.path(), err)
	}
	s.goesThrough("late", server, "out late") // and from then on nothing escapes
	eventually(t, "without it the init container is refused", func() error {
		if text := message("always"); !strings.Contains(text, "connection refused") {
			return fmt.Errorf("it says %q", text)
		}
		return nil
	})
}
