package ctl

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/datapath"
)

const podYAML = `apiVersion: v1
kind: Pod
metadata: {namespace: shop, name: cart-0, uid: u-1}
spec:
  containers: [{name: cart}]
`

func TestParseManifest(t *testing.T) {
	for _, tt := range []struct{ name, text, want, says string }{
		{"YAML", podYAML, "shop/cart-0", ""},
		{"JSON", `{"kind":"Pod","metadata":{"namespace":"shop","name":"cart-0"},"spec":{}}`, "shop/cart-0", ""},
		{"no namespace", "kind: Pod\nmetadata: {name: cart-0}", "default/cart-0", ""},
		{"one document and empty ones", "%YAML 1.1\n# Source: x\n---\n" + podYAML + "---\n# nothing\n\n---\n", "shop/cart-0", ""},
		{"a line of dashes inside a value", podYAML + "status:\n  message: |\n    ---\n    ---\n", "shop/cart-0", ""},
		{"two documents", podYAML + "---\n" + podYAML, "", "these are several documents"},
		{"two documents on lines of dashes", "--- {kind: Pod}\n--- {kind: Pod}\n", "", "these are several documents"},
		{"nothing", "", "", "it is empty: give a running pod's manifest"},
		{"comments alone", "# nothing\n---\n", "", "it is empty: "},
		{"no kind", "metadata: {name: a}", "", "it has no kind: "},
		{"a deployment", "kind: Deployment\nmetadata: {name: cart}", "", `its kind is "Deployment", not Pod`},
		{"a list", "kind: List\nitems: []", "", `its kind is "List", not Pod`},
		{"a template without a name", "kind: Pod\nmetadata: {namespace: shop, generateName: cart-}", "", "the pod name is missing"},
		{"a name with a slash", "kind: Pod\nmetadata: {name: a/b}", "", `"a/b" is no pod name: Kubernetes takes small letters`},
		{"a name too long", "kind: Pod\nmetadata: {name: " + strings.Repeat("a", 254) + "}", "", "the pod name is too long: it has 254 characters, and Kubernetes takes at most 253"},
		{"no YAML", "kind: [", "", "not a pod's YAML or JSON: "},
		{"a user that is no number", "kind: Pod\nspec: {containers: [{name: a}, {securityContext: {runAsUser: envoy}}]}", "", "spec.containers[1].securityContext.runAsUser is a string and should be a whole number"},
		{"a user that is no whole number", "kind: Pod\nspec: {initContainers: [{securityContext: {runAsUser: 1.5}}]}", "", "spec.initContainers[0].securityContext.runAsUser is the number 1.5 and should be a whole number"},
		{"an annotation that is a number", "kind: Pod\nmetadata: {annotations: {a: b, traffic.sidecar.istio.io/excludeOutboundPorts: 80}}", "", `metadata.annotations["traffic.sidecar.istio.io/excludeOutboundPorts"] is a number and should be a string: quote it`},
		{"an annotation that is a truth value", "kind: Pod\nmetadata: {annotations: {z/z: c, sidecar.istio.io/inject: false}}", "", `metadata.annotations["sidecar.istio.io/inject"] is true or false and should be a string: quote it`},
		{"annotations that are a list", "kind: Pod\nmetadata: {annotations: [a]}", "", "metadata.annotations is a list and should be a mapping"},
		{"containers that are a mapping", "kind: Pod\nspec: {containers: {name: a}}", "", "spec.containers is a mapping and should be a list"},
		{"a container that is a string", "kind: Pod\nspec: {containers: [{args: [a, b]}, a]}", "", "spec.containers[1] is a string and should be a mapping"},
		{"a network that is a word", "kind: Pod\nspec: {hostNetwork: maybe}", "", "spec.hostNetwork is a string and should be true or false"},
		{"a name that is a number", "kind: Pod\nmetadata: {name: 1}", "", "metadata.name is a number and should be a string: quote it"},
		{"a list of pods", "[a]", "", "it is a list and no pod"},
		{"a word", "Pod", "", "it is a string and no pod"},
		{"a key twice", "kind: Pod\nmetadata:\n  name: a\n  name: b\n", "", `line 4: key "name" already set`},
		{"an annotation twice, in JSON", `{"kind": "Pod", "metadata": {"name": "a", "annotations": {"b/c": "1", "b/c": "2"}}}`, "", `key "b/c" already set`},
		{"binary", "\x00\x01", "", "not a pod's YAML or JSON: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod, err := parseManifest([]byte(tt.text))
			switch {
			case tt.says == "":
				if got := pod.Metadata.Namespace + "/" + pod.Metadata.Name; err != nil || got != tt.want {
					t.Errorf("it is %s, %v; want %s", got, err, tt.want)
				}
			case err == nil || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "\n"):
				t.Errorf("it says %v, want %q", err, tt.says)
			}
		})
	}
}

func TestCheckPodNameTakesWhatKubernetesTakes(t *testing.T) {
	for _, tt := range []struct{ namespace, name, says string }{
		{"shop", "cart-0", ""},
		{"0", "a.b-c.0", ""},
		{strings.Repeat("a", 63), strings.Repeat("a", 253), ""},
		{strings.Repeat("a", 64), "cart", "the namespace is too long: it has 64 characters, and Kubernetes takes at most 63"},
		{"shop", strings.Repeat("a", 254), "the pod name is too long: it has 254 characters"},
		{"", "cart", "the namespace is missing"},
		{"shop", "", "the pod name is missing"},
		{"A B", "ü", `"A B" is no namespace: Kubernetes takes small letters, digits and "-",`},
		{"shop", "ü", `"ü" is no pod name: Kubernetes takes small letters, digits, "-" and ".",`},
		{"shop.eu", "cart", `"shop.eu" is no namespace`},
		{"-shop", "cart", `"-shop" is no namespace`},
		{"shop", "cart-", `"cart-" is no pod name`},
		{"shop", "a..b", `"a..b" is no pod name`},
		{"shop", "a\n", `"a\n" is no pod name`},
	} {
		err := checkPodName(tt.namespace, tt.name)
		if (tt.says == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s/%s: it says %v, want %q", tt.namespace, tt.name, err, tt.says)
		}
	}
}

func TestReadManifestHasALimit(t *testing.T) {
	for size, fits := range map[int]bool{maxManifest: true, maxManifest + 1: false} {
		text, err := readManifest("-", io.LimitReader(spaces{}, int64(size)))
		if fits != (err == nil) || fits && len(text) != size {
			t.Errorf("%d bytes: %d, %v", size, len(text), err)
		}
	}
}

type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

func TestTheManifestNamesThePod(t *testing.T) {
	var pod datapath.Pod
	decision, err := enrollFlags{manifest: "-"}.fromManifest(&pod, strings.NewReader(podYAML))
	if err != nil || pod.Namespace != "shop" || pod.Name != "cart-0" || pod.UID != "u-1" {
		t.Errorf("%+v, %v", pod, err)
	}
	if decision.Skip != "pod shop/cart-0: it has no container istio-proxy" {
		t.Error(decision.Skip)
	}
}

// FuzzParseManifest reads anything, twice the same, and names what it accepts.
func FuzzParseManifest(f *testing.F) {
	for _, seed := range []string{podYAML, podYAML + "---\n" + podYAML, `{"kind":"Pod"}`, "kind: List", "--- {kind: Pod}", "%YAML 1.1\n---\n", "a: &a [*a]", "\x00", "kind: Pod\nmetadata:\n  name: 1\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		before := bytes.Clone(text)
		pod, err := parseManifest(text)
		again, errAgain := parseManifest(text)
		if (err == nil) != (errAgain == nil) || pod.Metadata.Name != again.Metadata.Name || !bytes.Equal(before, text) {
			t.Errorf("read twice it is %v, %v and %v, %v", pod.Metadata, err, again.Metadata, errAgain)
		}
		if err == nil && (pod.Metadata.Name == "" || pod.Metadata.Namespace == "") {
			t.Errorf("a pod without a name: %+v", pod.Metadata)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%q is more than a line", err)
		}
	})
}
