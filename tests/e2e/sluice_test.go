package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-mesh/sluice/pkg/datapath"
)

// Where Sluice is, by deploy/sluice.yaml.
const (
	sluiceNamespace = "sluice-system"
	sluiceDaemonSet = "sluiced"
	sluiceBPFFS     = "/sys/fs/bpf/sluice"
	sluiceReady     = "http://127.0.0.1:15095/readyz"
	sluiceMetrics   = "http://127.0.0.1:15095/metrics"
	pluginPath      = "/opt/cni/bin/sluice-cni"
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
		install(t, byManifest)
	}
	awaitSluice(t)
}

func daemonSet(ctx context.Context) (*appsv1.DaemonSet, error) {
	return cluster.client.AppsV1().DaemonSets(sluiceNamespace).Get(ctx, sluiceDaemonSet, metav1.GetOptions{})
}

// installedBy is the way of what is installed now.
var installedBy way

// install installs Sluice, and waits until its page's commands say that it is there.
func install(t *testing.T, by way) {
	t.Helper()
	step(t, *checkoutFlag, "import")
	installedBy = by
	step(t, *checkoutFlag, "install"+string(by), localImage)
}

// uninstall removes Sluice in the way that it was installed.
func uninstall(t *testing.T) {
	t.Helper()
	step(t, *checkoutFlag, "uninstall"+string(installedBy))
}

// needSluiceBy is needSluice, installed in one way.
func needSluiceBy(t *testing.T, by way) {
	t.Helper()
	if installedBy != by {
		removeSluice(t)
	}
	if _, err := daemonSet(t.Context()); apierrors.IsNotFound(err) {
		install(t, by)
	}
	awaitSluice(t)
}

// removeSluice uninstalls what another test has installed.
func removeSluice(t *testing.T) {
	t.Helper()
	switch _, err := daemonSet(t.Context()); {
	case err == nil:
		uninstall(t)
	case !apierrors.IsNotFound(err):
		t.Fatal(err)
	}
}

// wantVersion wants the daemon that runs, its image and the node's plugin to be of a
// version.
func wantVersion(t *testing.T, version string) {
	t.Helper()
	eventually(t, "a daemon of version "+version+" serves metrics", func() error {
		text, err := httpGet(sluiceMetrics)
		if err == nil && !strings.Contains(text, fmt.Sprintf("sluice_build_info{version=%q} 1\n", version)) {
			err = errors.New(text)
		}
		return err
	})
	for _, p := range sluicePods(t.Context()) {
		if image := p.Spec.Containers[0].Image; !strings.HasSuffix(image, ":"+version) {
			t.Errorf("pod %s runs the image %s, not that of %s", p.Name, image, version)
		}
	}
	eventually(t, "the plugin is of version "+version, func() error {
		said, err := exec.Command(pluginPath).CombinedOutput() // it presents itself
		if err == nil && !strings.HasPrefix(string(said), "sluice-cni "+version+":") {
			err = errors.New(string(said))
		}
		return err
	})
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
