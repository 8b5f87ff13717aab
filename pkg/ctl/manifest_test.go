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
		{"no document", "", "", `its kind is "", not Pod`},
		{"a deployment", "kind: Deployment\nmetadata: {name: cart}", "", `its kind is "Deployment", not Pod`},
		{"a list", "kind: List\nitems: []", "", `its kind is "List", not Pod`},
		{"a template without a name", "kind: Pod\nmetadata: {namespace: shop, generateName: cart-}", "", `namespace "shop" and name "" are not those of a pod`},
		{"a name with a slash", "kind: Pod\nmetadata: {name: a/b}", "", `name "a/b"`},
		{"a name too long", "kind: Pod\nmetadata: {name: " + strings.Repeat("a", 254) + "}", "", "are not those of a pod"},
		{"no YAML", "kind: [", "", "not a pod's YAML or JSON: "},
		{"a UID that is no number", "kind: Pod\nspec: {containers: [{securityContext: {runAsUser: envoy}}]}", "", "not a pod's YAML or JSON: "},
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
