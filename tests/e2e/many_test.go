package e2e

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-mesh/sluice/tests/kit"
)

const many = 100

// TestAHundredPodsAtOnce: each is enrolled, the daemon comes back among them, and with
// their end nothing is left in any map.
func TestAHundredPodsAtOnce(t *testing.T) {
	needNode(t)
	needSluice(t)
	eventually(t, "no pod of another test is enrolled", func() error {
		if left := infos(t); len(left) > 0 {
			return fmt.Errorf("%+v", left)
		}
		return nil
	})
	before := kit.Pins(t, sluiceBPFFS)
	if len(before) == 0 {
		t.Fatal("there are no maps below", sluiceBPFFS)
	}
	s := newSpace(t)
	s.run(plain("server"))
	server := s.appURL("server")
	began := time.Now()
	for i := range many {
		s.create(meshed(fmt.Sprint("pod-", i)))
	}
	restarts := sluicePods(t.Context())[0].Status.ContainerStatuses[0].RestartCount
	signal(t, unix.SIGKILL, sluiced(t)...) // in the midst of their ADDs
	pods := s.awaitMany(many)
	t.Logf("%d pods were ready after %v, %v for each", many, time.Since(began).Round(time.Millisecond), (time.Since(began) / many).Round(time.Millisecond))
	awaitRestart(t, restarts)
	for _, p := range pods {
		wantValidated(t, &p)
	}
	wantEnrolled := func() error {
		names := enrolled(t)
		for _, p := range pods {
			if !slices.Contains(names, s.name+"/"+p.Name) {
				return fmt.Errorf("%s is not enrolled", p.Name)
			}
		}
		return nil
	}
	if err := wantEnrolled(); err != nil {
		t.Error(err)
	}
	for _, p := range pods {
		if err := reachesThrough(p, server); err != nil {
			t.Errorf("%s: %v", p.Name, err)
		}
	}

	old := sluiced(t)
	signal(t, unix.SIGKILL, old...)
	var up time.Time
	eventually(t, "another daemon runs", func() error {
		if now := sluiced(t); len(now) == 0 || slices.Equal(now, old) {
			return errors.New("it does not")
		}
		up = time.Now()
		return nil
	})
	eventually(t, "it is ready", func() error { return errors.Join(httpOK(sluiceReady), wantEnrolled()) })
	took := time.Since(up)
	t.Logf("a daemon that starts among them is ready after %v", took.Round(time.Millisecond))
	if limit := kit.Scaled(t, 5*time.Second); took > limit {
		t.Errorf("it was ready only after %v: it must converge within %v on a machine as busy as this", took, limit)
	}

	if err := cluster.client.CoreV1().Pods(s.name).DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	eventuallyWithin(t, 4*time.Minute, "nothing is left in any map", func() error {
		if diff := cmp.Diff(before, kit.Pins(t, sluiceBPFFS)); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
}

// awaitMany waits until so many pods with a sidecar are ready.
func (s *space) awaitMany(n int) (pods []corev1.Pod) {
	s.t.Helper()
	eventuallyWithin(s.t, 8*time.Minute, fmt.Sprint(n, " pods are ready"), func() error {
		list, err := cluster.client.CoreV1().Pods(s.name).List(s.t.Context(), metav1.ListOptions{LabelSelector: "security.istio.io/tlsMode=istio"})
		if err != nil {
			return err
		}
		pods = slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return !ready(&p) })
		if len(pods) < n {
			time.Sleep(time.Second) // the list is long
			return fmt.Errorf("%d are", len(pods))
		}
		return nil
	})
	return pods
}

// reachesThrough wants a pod's request to pass its own proxy alone.
func reachesThrough(p corev1.Pod, to string) error {
	var last error
	for range 50 { // the app of the newest may not listen yet
		var got fetched
		err := getJSON("http://"+net.JoinHostPort(p.Status.PodIP, "9000")+"/fetch?url="+to, &got)
		switch {
		case err != nil:
			last = err
		case got.Error != "":
			last = errors.New(got.Error)
		case len(got.Answer.Path) == 1 && got.Answer.Path[0] == fmt.Sprintf("out %s %s %s", p.Name, p.Status.PodIP, to[len("http://"):]):
			return nil
		default:
			return fmt.Errorf("its request met %q", got.path())
		}
		time.Sleep(100 * time.Millisecond)
	}
	return last
}
