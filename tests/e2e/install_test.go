package e2e

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

// TestInstallOnANodeWithRunningPods: what runs outside the mesh is untouched, and
// sidecar pods that were there before are repaired without a restart.
func TestInstallOnANodeWithRunningPods(t *testing.T) {
	needNode(t)
	eachWay(t, installOnANodeWithRunningPods)
}

func installOnANodeWithRunningPods(t *testing.T, by way) {
	bed := needNode(t)
	removeSluice(t)
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

	install(t, by)
	if said := step(t, *checkoutFlag, "verify"); !strings.Contains(said, "sluiced version "+versionOf(t, *checkoutFlag)) {
		t.Error("the page's commands say", said)
	}
	wantVersion(t, versionOf(t, *checkoutFlag))
	t.Run("the node stays ready", func(t *testing.T) {
		if err := bed.AwaitNode(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("the plugin is chained", func(t *testing.T) {
		if text := mustRead(t, testbed.Conflist); !strings.Contains(text, "sluice-cni") || !strings.Contains(text, "portmap") {
			t.Error("the conflist is", text)
		}
		if _, err := os.Stat(pluginPath); err != nil {
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
	t.Run("a new one is redirected without any capability", sidecarPodsAreRedirected)
	t.Run("the page's commands show a pod", func(t *testing.T) {
		said := step(t, *checkoutFlag, "verify-pod", "NAMESPACE="+s.name, "POD=unredirected")
		for _, want := range []string{validation, s.name + "/unredirected", "captured-out"} {
			if !strings.Contains(said, want) {
				t.Errorf("%q is not in what they print: %s", want, said)
			}
		}
	})
}
