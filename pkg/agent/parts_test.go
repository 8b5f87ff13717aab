package agent

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/install"
)

var update = flag.Bool("update", false, "write the golden files")

// fakeInstaller has lost its entry twice.
type fakeInstaller struct{}

func (fakeInstaller) Status() install.Status { return install.Status{Ready: true, Overwritten: 2} }

func TestWhatMetricsLookLike(t *testing.T) {
	m := newMetrics()
	n := newFakeNode()
	n.stats = []datapath.StatInfo{{Cookie: 1, Reason: "captured-out", Count: 5}, {Cookie: 2, Reason: "captured-out", Count: 2}, {Cookie: 1, Reason: "captured-in", Count: 1}}
	m.setNode(n)
	m.followInstaller(fakeInstaller{})
	m.observeAdd(agentapi.Answer{Decision: agentapi.Enroll}, 3*time.Millisecond)
	registry := prometheus.NewRegistry()
	registry.MustRegister(m)
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Error("promlint:", problems, err)
	}
	n.stats = n.stats[1:] // pod 1 counts less: it has ended
	n.stats[0].Count = 3
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&got, f); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(got.String(), `sluice_connections_total{direction="outbound",reason="captured-out"} 8`) {
		t.Error("a counter has gone down, or what was added is lost")
	}
	golden := filepath.Join("testdata", "metrics.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Error(diff)
	}
}

func TestAPodsCgroupIsKnownByItsName(t *testing.T) {
	const uid = "0a1b2c3d-0000-4000-8000-000000000001"
	for path, want := range map[string]bool{
		"0::/kubepods/burstable/pod" + uid + "/abc":                                               true,
		"4:memory:/kubepods/pod" + uid:                                                            true,
		"0::/../../kubepods.slice/kubepods-pod0a1b2c3d_0000_4000_8000_000000000001.slice/x.scope": true,
		"0::/kubepods/burstable/pod" + uid + "1/abc":                                              false,
		"0::/user/notpod" + uid:                                                                   false,
		"0::/":                                                                                    false,
		"":                                                                                        false,
	} {
		if got := namesPod(path+"\n", []string{"", uid}); got != want {
			t.Errorf("%s: %v", path, got)
		}
	}
}

func TestADDWaitsForThePodThatTheRuntimeSpeaksOf(t *testing.T) {
	asked := agentapi.Pod{Namespace: "shop", Name: "cart", UID: "new"}
	for name, change := range map[string]func(*corev1.Pod){
		"another pod of its name": func(*corev1.Pod) {},
		"a static pod's mirror":   func(p *corev1.Pod) { p.UID = "mirror"; p.Annotations[configHash] = "new" },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, fake.NewClientset(sidecar("old", annotated("sidecar.istio.io/inject", "false")))).start()
			w.eventually("the old pod is known", func() bool { return w.cluster.get("shop/cart") != nil })
			answers := make(chan agentapi.Answer, 1)
			go func() { answers <- (&handler{w.reconciler}).add(t.Context(), agentapi.Request{Pod: asked}, nil) }()
			w.update(sidecar("new", change))
			if answer := <-answers; answer.Decision != agentapi.Enroll || answer.Provisional {
				t.Errorf("the answer is %+v", answer)
			}
		})
	}
}

func TestADDOfAPodThatTheAPIServerDoesNotKnow(t *testing.T) {
	w := newWorld(t, fake.NewClientset()).start()
	pod := agentapi.Pod{Namespace: "shop", Name: "cart", UID: "u1"}
	began := time.Now()
	answer := (&handler{w.reconciler}).add(t.Context(), agentapi.Request{Pod: pod}, nil)
	if answer.Error == nil || !answer.Error.Later || time.Since(began) > 10*time.Second {
		t.Errorf("without annotations the answer is %+v, after %v", answer, time.Since(began))
	}
	pod.Annotations = map[string]string{"sidecar.istio.io/status": "{}"}
	if answer := (&handler{w.reconciler}).add(t.Context(), agentapi.Request{Pod: pod}, nil); answer.Decision != agentapi.Enroll || !answer.Provisional {
		t.Errorf("with annotations the answer is %+v", answer)
	}
}
