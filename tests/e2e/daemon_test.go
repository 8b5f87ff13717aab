package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

// counts are podapp's.
type counts struct {
	Kept, Lost, New, Failed, Escaped int64
	Error                            string
}

// load puts a load on a URL from a pod, for as long as the function runs, and wants
// every request to have passed the pod's proxy and every connection to have lived.
func (s *space) load(pod, to string, during func()) {
	s.t.Helper()
	var started string
	s.control(pod, "/load/start", url.Values{"url": {to}}, &started)
	s.awaitLoad(pod, counts{})
	during()
	var now counts
	s.control(pod, "/load", nil, &now)
	s.awaitLoad(pod, now)
	s.control(pod, "/load/stop", nil, &now)
	s.t.Logf("under load: %+v", now)
	if now.Lost > 0 || now.Failed > 0 || now.Escaped > 0 {
		s.t.Errorf("%d connections were lost, %d requests failed, %d escaped the proxy; the last error: %s", now.Lost, now.Failed, now.Escaped, now.Error)
	}
}

// awaitLoad waits until both kinds of requests are well beyond what they were.
func (s *space) awaitLoad(pod string, since counts) {
	s.t.Helper()
	eventually(s.t, "the load is under way", func() error {
		var now counts
		if err := s.tryControl(pod, "/load", nil, &now); err != nil {
			return err
		}
		if now.New < since.New+20 || now.Kept < since.Kept+20 {
			return fmt.Errorf("%+v", now)
		}
		return nil
	})
}

// patchDaemonSet changes its pods' template.
func patchDaemonSet(t *testing.T, spec map[string]any) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"spec": spec}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.client.AppsV1().DaemonSets(sluiceNamespace).Patch(t.Context(), sluiceDaemonSet, types.StrategicMergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// sendAway takes the daemon from every node, and returns how to bring it back.
func sendAway(t *testing.T) (back func()) {
	t.Helper()
	patchDaemonSet(t, map[string]any{"nodeSelector": map[string]string{"sluice.e2e/nowhere": "yes"}})
	eventually(t, "no daemon is left", func() error {
		if pods := sluicePods(t.Context()); len(pods) > 0 {
			return fmt.Errorf("there are %d", len(pods))
		}
		return nil
	})
	return func() {
		t.Helper()
		patchDaemonSet(t, map[string]any{"nodeSelector": map[string]any{"sluice.e2e/nowhere": nil}})
		awaitSluice(t)
	}
}

// awaitRestart waits until the container of the daemon has been restarted.
func awaitRestart(t *testing.T, before int32) {
	t.Helper()
	eventually(t, "the daemon is started again", func() error {
		for _, p := range sluicePods(t.Context()) {
			if len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].RestartCount > before && ready(&p) {
				return nil
			}
		}
		return errors.New("it is not")
	})
}

func TestNoConnectionIsLostOrEscapesWhileTheDaemonIsKilledAndDeleted(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	s.load("client", server, func() {
		restarts := sluicePods(t.Context())[0].Status.ContainerStatuses[0].RestartCount
		signal(t, unix.SIGKILL, sluiced(t)...)
		awaitRestart(t, restarts)

		old := sluicePods(t.Context())[0]
		if err := cluster.client.CoreV1().Pods(sluiceNamespace).Delete(t.Context(), old.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "another pod of the daemon is ready", func() error {
			for _, p := range sluicePods(t.Context()) {
				if p.UID != old.UID && ready(&p) {
					return nil
				}
			}
			return errors.New("there is none")
		})
	})
}

func TestPodsThatStartWhileTheDaemonIsAwayAreJudgedByTheirAnnotations(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("old"))
	server := s.appURL("server")
	s.goesThrough("old", server, "out old")
	back := sendAway(t)
	s.create(meshed("bad", annotated(excludeOutbound, "http")))
	s.run(plain("plain"), meshed("new"))
	s.goesThrough("old", server, "out old")
	s.goesStraight("plain", server)
	wantValidated(t, s.get("new"))
	s.goesThrough("new", server, "out new")
	s.awaitEvent("bad", "FailedCreatePodSandBox", excludeOutbound)
	s.load("new", server, back)
	eventually(t, "no enrolment is in doubt", func() error {
		for _, a := range attachments(t) {
			if a.Provisional {
				return fmt.Errorf("%+v is", a)
			}
		}
		return nil
	})
	s.goesThrough("new", server, "out new")
}

func attachments(t *testing.T) []datapath.Attachment {
	t.Helper()
	d, err := datapath.Open(datapath.Options{Dir: sluiceBPFFS})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	all, err := d.Attachments()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestWithoutAnAPIServerPodsAndTheDaemonComeBack: for 60 s there is no API server; in
// that time a pod gets a new sandbox and the daemon starts again.
func TestWithoutAnAPIServerPodsAndTheDaemonComeBack(t *testing.T) {
	bed := needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("steady"))
	server := s.appURL("server")
	s.run(meshed("moved", func(p *corev1.Pod) { p.Spec.Containers[0].Args = []string{"serve", server} }))
	moved := s.get("moved")
	steady := "http://" + net.JoinHostPort(s.get("steady").Status.PodIP, "9000")
	daemons := sluiced(t)

	bed.Stop(testbed.APIServer)
	until := time.Now().Add(60 * time.Second)
	t.Cleanup(func() { _ = bed.Start(testbed.APIServer) })
	var started string
	if err := getJSON(steady+"/load/start?url="+url.QueryEscape(server), &started); err != nil {
		t.Fatal(err)
	}
	signal(t, unix.SIGKILL, daemons...)
	signal(t, unix.SIGKILL, pausesOf(t, moved)...)
	var address string
	eventually(t, "the pod has a new sandbox, enrolled", func() error {
		address = ""
		for _, p := range infos(t) {
			if p.Name == "moved" && p.Namespace == s.name && p.Addr4.String() != moved.Status.PodIP {
				address = p.Addr4.String()
			}
		}
		if address == "" {
			return errors.New("it has not")
		}
		return nil
	})
	eventually(t, "its app's requests pass its proxy, from the first", func() error {
		var now counts
		if err := getJSON("http://"+net.JoinHostPort(address, "9000")+"/load", &now); err != nil {
			return err
		}
		if now.Escaped > 0 {
			t.Fatalf("%d requests escaped", now.Escaped)
		}
		if now.New-now.Failed < 20 {
			return fmt.Errorf("%+v", now)
		}
		return nil
	})
	eventually(t, "the daemon is ready without an API server", func() error { return httpOK(sluiceReady) })
	time.Sleep(time.Until(until))
	var now counts
	if err := getJSON(steady+"/load/stop", &now); err != nil {
		t.Fatal(err)
	}
	t.Logf("under load: %+v", now)
	if now.New < 20 || now.Lost+now.Failed+now.Escaped > 0 {
		t.Errorf("of the pod that stayed: %+v", now)
	}
	if err := errors.Join(bed.Start(testbed.APIServer), bed.AwaitAPI(t.Context())); err != nil {
		t.Fatal(err)
	}
	awaitSluice(t)
	s.run(meshed("after"))
	s.goesThrough("after", server, "out after")
	s.goesThrough("moved", server, "out moved")
}

// infos is what the kernel's maps say of enrolled pods.
func infos(t *testing.T) []datapath.PodInfo {
	t.Helper()
	d, err := datapath.Open(datapath.Options{Dir: sluiceBPFFS})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	all, err := d.Pods()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func pausesOf(t *testing.T, p *corev1.Pod) (pids []int) {
	t.Helper()
	for _, pid := range podProcesses(t, p, "pause") {
		var n int
		if _, err := fmt.Sscan(pid, &n); err != nil {
			t.Fatal(err)
		}
		pids = append(pids, n)
	}
	return pids
}
