package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// annotate changes one annotation of a pod that runs.
func (s *space) annotate(name, annotation, value string) {
	s.t.Helper()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{annotation: value}}})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := cluster.client.CoreV1().Pods(s.name).Patch(s.t.Context(), name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

func TestAnAnnotationOfARunningPodIsFollowedIfItIsValid(t *testing.T) {
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	began := time.Now()
	s.annotate("client", excludeOutbound, "8080")
	s.goesStraight("client", server)
	took := time.Since(began)
	t.Log("the change was in force after", took)
	if limit := kit.Scaled(t, time.Second); took > limit {
		t.Errorf("a change must be in force within %v on a machine as busy as this", limit)
	}
	s.awaitEvent("client", "RedirectionChanged")
	s.annotate("client", excludeOutbound, "8080,http")
	s.awaitEvent("client", "RedirectionInvalid", excludeOutbound, `"http"`)
	s.goesStraight("client", server) // the old rules stay
	s.annotate("client", excludeOutbound, "")
	s.goesThrough("client", server, "out client")
	if p := s.get("client"); p.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Error("it was restarted")
	}
}

func TestThePagesCommandsDisableAPortOfARunningPod(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	step(t, *checkoutFlag, "disable-port", "NAMESPACE="+s.name, "POD=client", "PORT=8080")
	s.goesStraight("client", server)
	step(t, *checkoutFlag, "enable-port", "NAMESPACE="+s.name, "POD=client")
	s.goesThrough("client", server, "out client")
}

// sluiced are the PIDs of the node's daemons.
func sluiced(t *testing.T) (pids []int) {
	t.Helper()
	for _, p := range sluicePods(t.Context()) {
		for _, pid := range podProcesses(t, &p, "sluiced") {
			var n int
			if _, err := fmt.Sscan(pid, &n); err != nil {
				t.Fatal(err)
			}
			pids = append(pids, n)
		}
	}
	return pids
}

func signal(t *testing.T, signal unix.Signal, pids ...int) {
	t.Helper()
	if len(pids) == 0 {
		t.Fatal("there is no such process")
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, signal); err != nil {
			t.Fatal(err)
		}
	}
}

// overwrite puts another text in place of the conflist, as a CNI's installer does.
func overwrite(t *testing.T, text string) {
	t.Helper()
	temporary := filepath.Join(filepath.Dir(testbed.Conflist), ".e2e")
	if err := errors.Join(os.WriteFile(temporary, []byte(text), 0o644), os.Rename(temporary, testbed.Conflist)); err != nil {
		t.Fatal(err)
	}
}

func TestAnOverwrittenConflistIsPutBackAndPodsOfTheMeantimeAreRepaired(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"))
	daemon := sluiced(t)
	signal(t, unix.SIGSTOP, daemon...)
	t.Cleanup(func() {
		for _, pid := range daemon {
			_ = unix.Kill(pid, unix.SIGCONT)
		}
	})
	overwrite(t, testbed.ConflistText(testbed.PodRanges()...))
	time.Sleep(2 * time.Second) // for containerd to have read it: nothing tells when it has
	s.run(meshed("meantime", unvalidated))
	s.goesStraight("meantime", s.appURL("server"))
	if slices.Contains(enrolled(t), s.name+"/meantime") {
		t.Fatal("it is enrolled, though the plugin was out of the chain: this test proves nothing")
	}
	signal(t, unix.SIGCONT, daemon...)
	eventually(t, "the entry is back", func() error {
		if text := mustRead(t, testbed.Conflist); !strings.Contains(text, "sluice-cni") {
			return errors.New(text)
		}
		return nil
	})
	s.goesThrough("meantime", s.appURL("server"), "out meantime")
	s.awaitEvent("meantime", "RedirectionRepaired")
	awaitSluice(t)
	s.run(meshed("after"))
	s.goesThrough("after", s.appURL("server"), "out after")
}
