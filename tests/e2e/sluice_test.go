package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"

	"github.com/sluice-mesh/sluice/pkg/datapath"
)

// Where Sluice is, by deploy/sluice.yaml.
const (
	sluiceNamespace = "sluice-system"
	sluiceDaemonSet = "sluiced"
	sluiceBPFFS     = "/sys/fs/bpf/sluice"
	sluiceReady     = "http://127.0.0.1:15095/readyz"
)

var installed sync.Mutex

// needSluice installs Sluice unless it is there, and waits until it is ready. On a
// cluster of somebody else it must be there.
func needSluice(t *testing.T) {
	t.Helper()
	needCluster(t)
	installed.Lock()
	defer installed.Unlock()
	_, err := daemonSet(t.Context())
	switch {
	case err == nil:
	case !apierrors.IsNotFound(err):
		t.Fatal(err)
	case cluster.bed == nil:
		t.Fatalf("there is no DaemonSet %s in namespace %s of this cluster: install Sluice first (docs/install.md)", sluiceDaemonSet, sluiceNamespace)
	default:
		install(t)
	}
	awaitSluice(t)
}

func daemonSet(ctx context.Context) (*appsv1.DaemonSet, error) {
	return cluster.client.AppsV1().DaemonSets(sluiceNamespace).Get(ctx, sluiceDaemonSet, metav1.GetOptions{})
}

// install applies deploy/sluice.yaml, as the page on installing says.
func install(t *testing.T, changes ...func(*unstructured.Unstructured)) {
	t.Helper()
	each(t, func(resource dynamic.ResourceInterface, object *unstructured.Unstructured) error {
		for _, change := range changes {
			change(object)
		}
		_, err := resource.Apply(t.Context(), object.GetName(), object, metav1.ApplyOptions{FieldManager: "e2e", Force: true})
		return err
	})
}

// each calls do for each object of the manifest, in its order.
func each(t *testing.T, do func(dynamic.ResourceInterface, *unstructured.Unstructured) error) {
	t.Helper()
	if *manifestFlag == "" {
		t.Fatal("give -e2e.manifest: make e2e does")
	}
	file, err := os.Open(*manifestFlag)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	client, err := dynamic.NewForConfig(cluster.config)
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(cluster.client.Discovery()))
	for decoder := yaml.NewYAMLOrJSONDecoder(file, 4096); ; {
		object := &unstructured.Unstructured{}
		if err := decoder.Decode(object); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		if object.Object == nil {
			continue // a document of comments
		}
		kind := object.GroupVersionKind()
		mapping, err := mapper.RESTMapping(kind.GroupKind(), kind.Version)
		if err != nil {
			t.Fatal(err)
		}
		var resource dynamic.ResourceInterface = client.Resource(mapping.Resource)
		if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
			resource = client.Resource(mapping.Resource).Namespace(object.GetNamespace())
		}
		if err := do(resource, object); err != nil {
			t.Fatalf("%s %s: %v", kind.Kind, object.GetName(), err)
		}
	}
}

// awaitSluice waits until the DaemonSet's newest pods are ready everywhere.
func awaitSluice(t *testing.T) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Log(sluiceLog(40))
		}
	}()
	eventually(t, "Sluice is ready on every node", func() error {
		ds, err := daemonSet(context.Background()) // clean-ups wait too
		if err != nil {
			return err
		}
		st := ds.Status
		if st.ObservedGeneration != ds.Generation || st.DesiredNumberScheduled == 0 || st.UpdatedNumberScheduled != st.DesiredNumberScheduled || st.NumberReady != st.DesiredNumberScheduled {
			return fmt.Errorf("%d of %d pods are ready, %d are up to date", st.NumberReady, st.DesiredNumberScheduled, st.UpdatedNumberScheduled)
		}
		return nil
	})
}

func sluicePods(ctx context.Context) []corev1.Pod {
	list, err := cluster.client.CoreV1().Pods(sluiceNamespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil
	}
	return list.Items
}

// sluiceLog is the end of what the daemons say.
func sluiceLog(lines int64) string {
	var out strings.Builder
	ctx := context.Background()
	for _, p := range sluicePods(ctx) {
		fmt.Fprintf(&out, "--- %s: %s %v\n", p.Name, p.Status.Phase, p.Status.ContainerStatuses)
		text, err := cluster.client.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{TailLines: &lines}).DoRaw(ctx)
		if err != nil {
			fmt.Fprintln(&out, err)
		}
		out.Write(text)
	}
	return out.String()
}

// enrolled are the pods that the kernel's maps hold, NAMESPACE/NAME.
func enrolled(t *testing.T) (names []string) {
	t.Helper()
	d, err := datapath.Open(datapath.Options{Dir: sluiceBPFFS})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	pods, err := d.Pods()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		names = append(names, p.Namespace+"/"+p.Name)
	}
	return names
}
