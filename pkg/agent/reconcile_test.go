package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
)

const (
	excludePorts = "traffic.sidecar.istio.io/excludeOutboundPorts"
	captureDNS   = "ISTIO_META_DNS_CAPTURE"
)

func withEnv(name, value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[1].Env = append(p.Spec.Containers[1].Env, corev1.EnvVar{Name: name, Value: value})
	}
}

func wait(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatal("it was not asked")
	}
}

// Whatever the API server says or does not say of a pod that is enrolled, it stays.
func TestNobodyIsUnenrolledOnTheAPIServersWord(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	for _, tt := range []struct {
		name string
		list func() (runtime.Object, error)
	}{
		{"an empty list", func() (runtime.Object, error) { return &corev1.PodList{}, nil }},
		{"403", func() (runtime.Object, error) { return nil, apierrors.NewForbidden(pods, "", nil) }},
		{"410", func() (runtime.Object, error) { return nil, apierrors.NewResourceExpired("too old") }},
		{"401", func() (runtime.Object, error) { return nil, apierrors.NewUnauthorized("who?") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			clientset := fake.NewClientset()
			asked := make(chan struct{}, 100)
			clientset.PrependReactor("list", "pods", func(ktesting.Action) (bool, runtime.Object, error) {
				asked <- struct{}{}
				object, err := tt.list()
				return true, object, err
			})
			w := newWorld(t, clientset)
			w.fake.enroll(7, "u1", rulesOf(t, sidecar("u1")), false)
			w.start()
			wait(t, asked)
			if object, err := tt.list(); err == nil && object != nil {
				w.eventually("the list has been taken", w.cluster.pods.HasSynced)
			} else {
				wait(t, asked) // and once more
			}
			w.queue.Add(taskSweep)
			w.queue.Add("shop/cart")
			w.eventually("the tasks are done", func() bool { return w.queue.Len() == 0 })
			if _, enrolled, _ := w.fake.get(7); !enrolled || len(w.fake.left) != 0 {
				t.Error("the pod is un-enrolled")
			}
			_, text := w.ready.text()
			if wrong := tt.name != "an empty list"; strings.Contains(text, partAPI) != wrong {
				t.Errorf("readiness says %q", text)
			}
		})
	}
}

func TestAPodThatIsDeletedTerminatingOrSucceededStaysEnrolled(t *testing.T) {
	p := sidecar("u1")
	w := newWorld(t, fake.NewClientset(p))
	w.fake.enroll(7, "u1", rulesOf(t, p), false)
	w.start()
	ended := p.DeepCopy()
	ended.Status.Phase, ended.Spec.Containers = corev1.PodSucceeded, nil
	w.update(ended)
	w.event(reasonKept) // it has no sidecar any more, says the API server
	if err := w.clientset.CoreV1().Pods("shop").Delete(t.Context(), "cart", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("the pod is gone from the cache", func() bool { return w.cluster.get("shop/cart") == nil })
	if _, enrolled, _ := w.fake.get(7); !enrolled || len(w.fake.left) != 0 {
		t.Error("the pod is un-enrolled")
	}
}

func TestRulesFollowAnnotations(t *testing.T) {
	p := sidecar("u1")
	w := newWorld(t, fake.NewClientset(p))
	w.fake.enroll(7, "u1", rulesOf(t, p), false)
	w.start()
	w.eventually("the pod is known", func() bool { return w.cluster.get("shop/cart") != nil })
	began := time.Now()
	w.update(sidecar("u1", annotated(excludePorts, "3306")))
	w.eventually("the rules are changed", func() bool {
		got, _, _ := w.fake.get(7)
		return len(got.Rules.ExcludeOutboundPorts) == 1 && got.Rules.ExcludeOutboundPorts[0] == 3306
	})
	t.Log("changed after", time.Since(began))
	if text := w.event(reasonChanged); !strings.Contains(text, "excludeOutboundPorts") {
		t.Errorf("the Event says %q", text)
	}
}

func TestWhatARunningPodCannotTakeIsNotApplied(t *testing.T) {
	for _, tt := range []struct {
		name, reason, says string
		change             func(*corev1.Pod)
	}{
		{"an invalid value", reasonInvalid, "nonsense", annotated(excludePorts, "nonsense")},
		{"another interception mode", reasonKept, "interception mode", annotated("sidecar.istio.io/interceptionMode", "TPROXY")},
		{"no redirection", reasonKept, "NONE", annotated("sidecar.istio.io/interceptionMode", "NONE")},
		{"DNS capture", reasonKept, "DNS", withEnv(captureDNS, "true")},
		{"no status", reasonKept, "status", func(p *corev1.Pod) { delete(p.Annotations, "sidecar.istio.io/status") }},
		{"not injected", reasonKept, "inject", annotated("sidecar.istio.io/inject", "false")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := sidecar("u1")
			w := newWorld(t, fake.NewClientset(p))
			before := rulesOf(t, p)
			w.fake.enroll(7, "u1", before, false)
			w.start()
			w.eventually("the pod is known", func() bool { return w.cluster.get("shop/cart") != nil })
			w.update(sidecar("u1", annotated(excludePorts, "99"), tt.change))
			if text := w.event(tt.reason); !strings.Contains(text, tt.says) || !strings.Contains(text, "as it was") {
				t.Errorf("the Event says %q", text)
			}
			got, enrolled, _ := w.fake.get(7)
			if want, _ := before.Normalise(); !enrolled || got.Rules.Digest() != want.Digest() {
				t.Error("the rules have changed")
			}
		})
	}
}

func TestAPodThatWasEnrolledInDoubtIsJudgedAgain(t *testing.T) {
	for _, tt := range []struct {
		name     string
		pod      *corev1.Pod
		enrolled bool
		changed  int
		event    string
		says     string
	}{
		{"it is right", sidecar("u1"), true, 0, "", ""},
		{"it captures DNS", sidecar("u1", withEnv(captureDNS, "true")), true, 1, reasonJudged, "dns"},
		{"its proxy is another user", sidecar("u1", func(p *corev1.Pod) {
			uid := int64(2000)
			p.Spec.Containers[1].SecurityContext = &corev1.SecurityContext{RunAsUser: &uid}
		}), true, 1, reasonJudged, "proxyUIDs"},
		{"it is not in the mesh", sidecar("u1", withEnv("DISABLE_ENVOY", "true")), false, 0, reasonJudged, "DISABLE_ENVOY"},
		{"it is wrong", sidecar("u1", annotated(excludePorts, "x")), true, 0, reasonInvalid, "excludeOutboundPorts"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, fake.NewClientset(tt.pod))
			w.fake.enroll(7, "u1", rulesOf(t, sidecar("u1")), true)
			began := time.Now()
			w.start()
			if tt.event == "" {
				w.eventually("it is settled", func() bool { _, _, provisional := w.fake.get(7); return !provisional })
			} else if text := w.event(tt.event); !strings.Contains(text, tt.says) {
				t.Errorf("the Event says %q", text)
			}
			t.Log("judged after", time.Since(began))
			_, enrolled, provisional := w.fake.get(7)
			if enrolled != tt.enrolled || w.fake.changes != tt.changed || provisional && tt.event == reasonJudged && tt.enrolled {
				t.Errorf("enrolled %v, provisional %v, changes %d", enrolled, provisional, w.fake.changes)
			}
		})
	}
}

func TestAPodThatRunsOutsideTheMeshIsRepaired(t *testing.T) {
	for _, mode := range []Repair{RepairInPlace, RepairLabel, RepairDelete, RepairOff} {
		t.Run(string(mode), func(t *testing.T) {
			other := sidecar("u2", func(p *corev1.Pod) { p.Name, p.Spec.Containers = "plain", p.Spec.Containers[:1] })
			w := newWorld(t, fake.NewClientset(sidecar("u1"), other), func(c *Config) { c.Repair = mode })
			w.fake.running["u1"], w.fake.running["u2"] = 7, 8
			w.start()
			switch mode {
			case RepairInPlace:
				if text := w.event(reasonRepaired); !strings.Contains(text, "1 connections (10.0.0.2:40000 - 10.0.0.9:5432)") {
					t.Errorf("the Event says %q", text)
				}
			case RepairOff:
				w.eventually("the pods are known", func() bool { return w.cluster.get("shop/cart") != nil })
				if err := w.doRepair("shop/cart"); err != nil {
					t.Error(err)
				}
			default:
				w.event(reasonOutside)
				w.eventually("it is done", func() bool {
					p, err := w.clientset.CoreV1().Pods("shop").Get(t.Context(), "cart", metav1.GetOptions{})
					return mode == RepairDelete && apierrors.IsNotFound(err) || mode == RepairLabel && err == nil && p.Labels[labelUnredirected] == "true"
				})
			}
			if _, enrolled, _ := w.fake.get(7); enrolled != (mode == RepairInPlace) {
				t.Error("enrolled:", enrolled)
			}
			if _, enrolled, _ := w.fake.get(8); enrolled {
				t.Error("a pod without a sidecar is enrolled")
			}
		})
	}
}

func TestAPodThatADDLeftAloneIsNotRepaired(t *testing.T) {
	alone := sidecar("u1", annotated("sidecar.istio.io/inject", "false"))
	w := newWorld(t, fake.NewClientset(alone)).start()
	w.fake.running["u1"] = 7
	answer := (&handler{w.reconciler}).add(t.Context(), agentapi.Request{Pod: agentapi.Pod{Namespace: "shop", Name: "cart", UID: "u1"}}, nil)
	if answer.Decision != agentapi.Skip {
		t.Fatalf("the answer is %+v", answer)
	}
	w.update(sidecar("u1"))
	w.eventually("the change is known", func() bool { return w.cluster.get("shop/cart").Annotations["sidecar.istio.io/inject"] == "" })
	w.eventually("the tasks are done", func() bool { return w.queue.Len() == 0 })
	if err := w.doRepair("shop/cart"); err != nil {
		t.Error(err)
	}
	if _, enrolled, _ := w.fake.get(7); enrolled {
		t.Error("it is enrolled")
	}
}

func TestStrayAttachmentsGoOnceNoADDCanBeAtThem(t *testing.T) {
	w := newWorld(t, fake.NewClientset())
	w.fake.strays = []uint64{3, 4}
	for range 2 {
		if err := w.sweep(); err != nil || len(w.fake.dropped) != 0 {
			t.Error(err, w.fake.dropped)
		}
	}
	for cookie := range w.strays {
		w.strays[cookie] = time.Now().Add(-strayTime - time.Second)
	}
	w.fake.strays = []uint64{4, 5}
	if err := w.sweep(); err != nil || !slices.Equal(w.fake.dropped, []uint64{4}) {
		t.Error(err, w.fake.dropped)
	}
	w.events.close()
	w.queue.ShutDown()
	w.repairs.ShutDown()
}

// laterQueue notes what is put off.
type laterQueue struct {
	taskQueue
	later []task
}

func (q *laterQueue) AddAfter(t task, after time.Duration) { q.later = append(q.later, t) }

func TestTheSweepComesBackWhileAnEnrolledPodIsUnknownToTheAPIServer(t *testing.T) {
	for _, tt := range []struct {
		name  string
		uid   string        // of the pod that is enrolled
		ago   time.Duration // a pod was deleted
		again bool
	}{
		{"known", "u1", 0, false},
		{"deleted", "u2", 0, true}, // the pod of that name is another
		{"deleted long ago", "u2", time.Hour, false},
		{"not a pod of Kubernetes", "", 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, fake.NewClientset(sidecar("u1"))).start()
			w.eventually("the pod is known", func() bool { return w.cluster.get("shop/cart") != nil })
			w.eventually("the tasks are done", func() bool { return w.queue.Len() == 0 })
			w.fake.enroll(7, tt.uid, rulesOf(t, sidecar("u1")), false)
			r := &reconciler{node: w.fake, cluster: w.cluster, metrics: w.metrics, config: w.config, lastDeleted: time.Now().Add(-tt.ago)}
			later := &laterQueue{taskQueue: w.queue}
			r.queue = later
			if err := r.sweep(); err != nil {
				t.Fatal(err)
			}
			if got := slices.Contains(later.later, taskSweep); got != tt.again {
				t.Errorf("the sweep comes back: %v", got)
			}
		})
	}
}
