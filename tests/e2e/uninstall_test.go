package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

// uninstall deletes the objects of the manifest in its order, as
// `kubectl delete -f deploy/sluice.yaml` does, and waits until all is gone.
func uninstall(t *testing.T) {
	t.Helper()
	each(t, func(resource dynamic.ResourceInterface, object *unstructured.Unstructured) error {
		background := metav1.DeletePropagationBackground
		err := resource.Delete(t.Context(), object.GetName(), metav1.DeleteOptions{PropagationPolicy: &background})
		if apierrors.IsNotFound(err) {
			return nil // it went with its namespace
		}
		return err
	})
	defer func() {
		if t.Failed() {
			t.Log(sluiceLog(40))
		}
	}()
	eventually(t, "Sluice's namespace is gone", func() error {
		_, err := cluster.client.CoreV1().Namespaces().Get(context.Background(), sluiceNamespace, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("it is there (%v), with %d pods", err, len(sluicePods(context.Background())))
	})
}

// wantNoTrace wants the node's files to be as before Sluice.
func wantNoTrace(t *testing.T) {
	t.Helper()
	if text := mustRead(t, testbed.Conflist); strings.Contains(text, "sluice") {
		t.Error("the conflist is", text)
	}
	for _, path := range []string{"/opt/cni/bin/sluice-cni", "/var/run/sluice/agent.sock"} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error(path, "is left:", err)
		}
	}
}

func argument(argument string) func(*unstructured.Unstructured) {
	return func(o *unstructured.Unstructured) {
		if o.GetKind() != "DaemonSet" {
			return
		}
		containers, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "containers")
		container := containers[0].(map[string]any)
		args := container["args"].([]any)
		name, _, _ := strings.Cut(argument, "=")
		args = slices.DeleteFunc(args, func(a any) bool { return strings.HasPrefix(a.(string), name+"=") })
		container["args"] = append(args, argument)
		_ = unstructured.SetNestedSlice(o.Object, containers, "spec", "template", "spec", "containers")
	}
}

func TestAfterAnUninstallRunningPodsStayRedirectedAndNewOnesAreNot(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	uninstall(t)
	wantNoTrace(t)
	s.goesThrough("client", server, "out client")
	s.run(plain("plain"), meshed("new", unvalidated))
	s.goesStraight("plain", server)
	s.goesStraight("new", server)
	s.remove("client")

	// Installed again, it takes everything over.
	install(t)
	awaitSluice(t)
	s.goesThrough("new", server, "out new")
	s.run(meshed("newest"))
	s.goesThrough("newest", server, "out newest")
}

func TestAnUninstallWithRunningPodsDirectRemovesEverythingAtOnce(t *testing.T) {
	needNode(t)
	needSluice(t)
	install(t, argument("--uninstall-running-pods=direct"))
	awaitSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	uninstall(t)
	wantNoTrace(t)
	s.goesStraight("client", server)
	if _, err := os.Lstat(sluiceBPFFS); !errors.Is(err, os.ErrNotExist) {
		t.Error("pins are left:", err)
	}
	needSluice(t)
	s.goesThrough("client", server, "out client")
}
