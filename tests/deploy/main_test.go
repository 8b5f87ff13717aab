// Package deploy tests what is in deploy/: that what stands there is what a
// cluster takes, and that the chart renders it so for every platform. It decodes
// strictly with Kubernetes' own types: a field that they do not know is an error.
package deploy

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

var helm = flag.String("deploy.helm", "", "the helm command, built from hack/helm")

const root = "../.."

// manifest is a set of objects.
type manifest struct{ objects []runtime.Object }

// decode reads a stream of YAML documents.
func decode(t *testing.T, text []byte) manifest {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), appsv1.AddToScheme(scheme), rbacv1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	var m manifest
	for _, document := range documents(t, text) {
		object, _, err := decoder.Decode(document, nil, nil)
		if err != nil {
			t.Fatalf("%v in\n%s", err, document)
		}
		m.objects = append(m.objects, object)
	}
	if len(m.objects) == 0 {
		t.Fatal("there is no object")
	}
	return m
}

func documents(t *testing.T, text []byte) (out [][]byte) {
	t.Helper()
	for part := range strings.SplitSeq("\n"+string(text), "\n---") {
		for line := range strings.Lines(part) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				out = append(out, []byte(part))
				break
			}
		}
	}
	return out
}

// one is the only object of a type.
func one[T runtime.Object](t *testing.T, m manifest) (out T) {
	t.Helper()
	found := 0
	for _, o := range m.objects {
		if o, ok := o.(T); ok {
			out = o
			found++
		}
	}
	if found != 1 {
		t.Fatalf("there are %d objects of %T", found, out)
	}
	return out
}

func has[T runtime.Object](m manifest) bool {
	for _, o := range m.objects {
		if _, ok := o.(T); ok {
			return true
		}
	}
	return false
}

// render runs helm on the chart.
func render(t *testing.T, args ...string) (manifest, error) {
	t.Helper()
	if *helm == "" {
		t.Skip("needs helm: run make deploy-check")
	}
	cmd := exec.Command(*helm, append([]string{"template", "sluice", filepath.Join(root, "deploy/chart"), "--namespace", "sluice-system", "--kube-version", "1.30.0"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Env = append(os.Environ(), "HELM_CONFIG_HOME="+t.TempDir())
	out, err := cmd.Output()
	if err != nil {
		return manifest{}, errors.New(stderr.String())
	}
	return decode(t, out), nil
}

func mustRender(t *testing.T, args ...string) manifest {
	t.Helper()
	m, err := render(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}
