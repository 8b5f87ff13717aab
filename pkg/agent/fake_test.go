package agent

import (
	"context"
	"io"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

// fakeNode is a datapath without a kernel.
type fakeNode struct {
	mu          sync.Mutex
	pods        map[uint64]datapath.Pod
	provisional map[uint64]bool
	left        []uint64
	changes     int
	running     map[string]uint64 // by UID: pods that a process leads to
	stats       []datapath.StatInfo
	strays      []uint64
	dropped     []uint64
}

func newFakeNode() *fakeNode {
	return &fakeNode{pods: map[uint64]datapath.Pod{}, provisional: map[uint64]bool{}, running: map[string]uint64{}}
}

func (n *fakeNode) enroll(cookie uint64, uid string, r rules.Rules, provisional bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	normal, _ := r.Normalise()
	n.pods[cookie] = datapath.Pod{Namespace: "shop", Name: "cart", UID: uid, Rules: normal}
	n.provisional[cookie] = provisional
}

func (n *fakeNode) get(cookie uint64) (pod datapath.Pod, enrolled, provisional bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	pod, enrolled = n.pods[cookie]
	return pod, enrolled, n.provisional[cookie]
}

func (n *fakeNode) Pods() ([]datapath.PodInfo, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []datapath.PodInfo
	for cookie, p := range n.pods {
		out = append(out, datapath.PodInfo{Cookie: cookie, Namespace: p.Namespace, Name: p.Name, UID: p.UID})
	}
	return out, nil
}

func (n *fakeNode) Attachments() ([]datapath.Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []datapath.Attachment
	for cookie := range n.pods {
		out = append(out, datapath.Attachment{Cookie: cookie, Provisional: n.provisional[cookie]})
	}
	return out, nil
}

func (n *fakeNode) InForce(cookie uint64, r rules.Rules) (datapath.Force, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.pods[cookie]
	normal, err := r.Normalise()
	return datapath.Force{Follows: p.Rules.Digest() == normal.Digest(), DNS: p.Rules.DNS, Mode: p.Rules.Mode}, ok, err
}

func (n *fakeNode) Settle(cookie uint64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.provisional[cookie] = false
	return nil
}

func (n *fakeNode) Change(cookie uint64, pod datapath.Pod) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.changes++
	n.pods[cookie] = pod
	return nil
}

func (n *fakeNode) Leave(cookie uint64) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.left = append(n.left, cookie)
	delete(n.pods, cookie)
	return nil
}

func (n *fakeNode) Repair(found running, pod datapath.Pod, reset bool) (repaired, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, uid := range found.uids {
		if cookie, ok := n.running[uid]; ok && len(found.addresses) > 0 {
			n.pods[cookie] = pod
			local, remote := netip.MustParseAddrPort("10.0.0.2:40000"), netip.MustParseAddrPort("10.0.0.9:5432")
			done := repaired{Cookie: cookie, Before: []netns.Connection{{Local: local, Remote: remote}}}
			if reset {
				done.Reset = 1
			}
			return done, nil
		}
	}
	return repaired{}, errNotFound
}

func (n *fakeNode) Strays() ([]uint64, error) { return n.strays, nil }
func (n *fakeNode) DropStrays(cookies []uint64) error {
	n.dropped = append(n.dropped, cookies...)
	return nil
}
func (n *fakeNode) StillUp() error                      { return nil }
func (n *fakeNode) CheckPod(uint64) error               { return nil }
func (n *fakeNode) Sweep() (datapath.Swept, error)      { return datapath.Swept{}, nil }
func (n *fakeNode) Stats() ([]datapath.StatInfo, error) { return n.stats, nil }
func (n *fakeNode) Features() datapath.Features         { return datapath.Features{SetRetval: true, TCX: true} }
func (n *fakeNode) Fill() ([]datapath.Fill, error) {
	return []datapath.Fill{{Table: "pods", Entries: 2, Max: 1024}, {Table: "targets", Entries: 7, Max: 262144}}, nil
}

// world is a reconciler with everything around it faked.
type world struct {
	*reconciler
	t         *testing.T
	fake      *fakeNode
	clientset *fake.Clientset
}

// newWorld has a reconciler that does not run yet. Change edits its configuration.
func newWorld(t *testing.T, clientset *fake.Clientset, change ...func(*Config)) *world {
	t.Helper()
	config := DefaultConfig()
	config.Node, config.RunDir, config.Resync = "n1", t.TempDir(), time.Minute
	for _, c := range change {
		c(&config)
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	n := newFakeNode()
	r, err := newReconciler(config, clientset.CoreV1(), n, newReadiness(), newMetrics(), log)
	if err != nil {
		t.Fatal(err)
	}
	return &world{reconciler: r, t: t, fake: n, clientset: clientset}
}

// start runs it until the test ends.
func (w *world) start() *world {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.run(ctx) }()
	w.t.Cleanup(func() { cancel(); <-done })
	return w
}

// eventually polls until it holds.
func (w *world) eventually(what string, holds func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if holds() {
			return
		}
	}
	w.t.Fatal("never: ", what)
}

// event waits for an Event with this reason, and returns its text.
func (w *world) event(reason string) (text string) {
	w.t.Helper()
	w.eventually("an Event "+reason, func() bool {
		list, err := w.clientset.CoreV1().Events("").List(w.t.Context(), metav1.ListOptions{})
		if err != nil {
			w.t.Fatal(err)
		}
		for _, e := range list.Items {
			if e.Reason == reason {
				text = e.Message
				return true
			}
		}
		return false
	})
	return text
}

// sidecar is an injected pod.
func sidecar(uid string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "cart", UID: types.UID(uid), Annotations: map[string]string{"sidecar.istio.io/status": "{}"},
		},
		Spec:   corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "app"}, {Name: mesh.ProxyContainer, Args: []string{"proxy", "sidecar"}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.0.0.2"}}},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func annotated(key, value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations[key] = value }
}

func (w *world) update(p *corev1.Pod) {
	w.t.Helper()
	if _, err := w.clientset.CoreV1().Pods(p.Namespace).Update(w.t.Context(), p, metav1.UpdateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

// rulesOf are what a pod is to be enrolled with.
func rulesOf(t *testing.T, p *corev1.Pod) rules.Rules {
	t.Helper()
	d, err := mesh.Judge(meshPod(p), mesh.DefaultConfig())
	if err != nil || d.Skip != "" {
		t.Fatal(err, d.Skip)
	}
	return d.Rules
}
