package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

// TestInstallOnANodeWithRunningPods: what runs outside the mesh is untouched, and
// sidecar pods that were there before are repaired without a restart.
func TestInstallOnANodeWithRunningPods(t *testing.T) {
	bed := needNode(t)
	if _, err := daemonSet(t.Context()); err == nil {
		uninstall(t) // another test has installed it
	} else if !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	s := newSpace(t)
	s.run(plain("plain"), plain("server"), meshed("before", unvalidated), meshed("other", unvalidated))
	server, other := s.appURL("server"), s.appURL("other")
	t.Run("without Sluice traffic goes straight", func(t *testing.T) {
		s.goesStraight("plain", server)
		s.goesStraight("before", server)
		s.goesStraight("plain", other)
	})
	t.Run("without Sluice istio-validation fails", func(t *testing.T) {
		s.create(meshed("unredirected"))
		eventually(t, "it ends with 126", func() error {
			for _, c := range s.get("unredirected").Status.InitContainerStatuses {
				for _, state := range []corev1.ContainerState{c.State, c.LastTerminationState} {
					if state.Terminated != nil && state.Terminated.ExitCode == 126 && strings.Contains(state.Terminated.Message, "not enrolled") {
						return nil
					}
				}
			}
			return errors.New("it has not ended so")
		})
	})
	untouched := s.get("plain")
	old := s.get("before")

	install(t)
	awaitSluice(t)
	t.Run("the node stays ready", func(t *testing.T) {
		if err := bed.AwaitNode(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("the plugin is chained", func(t *testing.T) {
		if text := mustRead(t, testbed.Conflist); !strings.Contains(text, "sluice-cni") || !strings.Contains(text, "portmap") {
			t.Error("the conflist is", text)
		}
		if _, err := os.Stat("/opt/cni/bin/sluice-cni"); err != nil {
			t.Error(err)
		}
	})
	t.Run("a pod outside the mesh is untouched", func(t *testing.T) {
		s.goesStraight("plain", server)
		s.run(plain("new"))
		s.goesStraight("new", server)
		for _, name := range []string{"plain", "server", "new"} {
			if slices.Contains(enrolled(t), s.name+"/"+name) {
				t.Error(name, "is enrolled")
			}
		}
		if now := s.get("plain"); now.Status.ContainerStatuses[0].RestartCount != 0 || now.UID != untouched.UID {
			t.Error("it was restarted")
		}
	})
	t.Run("a pod from before is repaired as it runs", func(t *testing.T) {
		eventually(t, "both are enrolled", func() error {
			have := enrolled(t)
			for _, name := range []string{"before", "other"} {
				if !slices.Contains(have, s.name+"/"+name) {
					return fmt.Errorf("%s is not among %q", name, have)
				}
			}
			return nil
		})
		s.sees("before", server, s.out("before", s.appAddress("server")))
		s.goesThrough("before", other, "out before", "in other")
		s.goesThrough("plain", other, "in other")
		now := s.get("before")
		for i, c := range now.Status.ContainerStatuses {
			if c.RestartCount != 0 || c.ContainerID != old.Status.ContainerStatuses[i].ContainerID {
				t.Error(c.Name, "was restarted")
			}
		}
		s.awaitEvent("before", "RedirectionRepaired")
	})
	t.Run("a pod whose validation failed comes up", func(t *testing.T) {
		s.awaitReady("unredirected")
		s.goesThrough("unredirected", server, "out unredirected")
	})
}
