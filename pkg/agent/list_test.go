package agent

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestAListIsReadOneByOne(t *testing.T) {
	const pod = `{"metadata":{"name":"cart","annotations":{"x":"]}"}},"spec":{"nodeName":"n1"}}`
	for _, tt := range []struct {
		text    string
		pods    int
		version string
		wrong   string
	}{
		{`{"kind":"PodList","metadata":{"resourceVersion":"7"},"items":[` + pod + `,` + pod + `]}`, 2, "7", ""},
		{`{"items":[` + pod + `],"metadata":{"resourceVersion":"7","continue":""},"more":{"a":[1]}}`, 1, "7", ""},
		{`{"metadata":{"resourceVersion":"7"},"items":[]}`, 0, "7", ""},
		{`{"metadata":{"resourceVersion":"7"},"items":null}`, 0, "7", ""},
		{`{"metadata":{"resourceVersion":"7"},"items":[` + pod + `,`, 1, "7", "EOF"},
		{`{"metadata":{"resourceVersion":"7"},"items":[` + pod + `]`, 1, "7", "EOF"},
		{`{"metadata":{"resourceVersion":"7"},"items":{}}`, 0, "7", "its items begin with {"},
		{`{"items":[]}`, 0, "", "no resourceVersion"},
		{`[]`, 0, "", "it has [ where { belongs"},
		{`{"items":[7]}`, 0, "", "cannot unmarshal"},
		{``, 0, "", "EOF"},
	} {
		pods := 0
		meta, err := readList(strings.NewReader(tt.text), func(p *corev1.Pod) {
			if p.Name != "cart" || p.Spec.NodeName != "n1" {
				t.Errorf("%s: a pod is %v", tt.text, p)
			}
			pods++
		})
		if pods != tt.pods || meta.ResourceVersion != tt.version {
			t.Errorf("%s: %d pods, version %q", tt.text, pods, meta.ResourceVersion)
		}
		if (err != nil) != (tt.wrong != "") || err != nil && !strings.Contains(err.Error(), tt.wrong) {
			t.Errorf("%s: the error is %v", tt.text, err)
		}
	}
}
