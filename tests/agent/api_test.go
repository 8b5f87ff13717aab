package agent

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
)

// apiServer is as much of the API server as a node's daemon asks: pods to list and
// to watch, namespaces, and Events to be told.
type apiServer struct {
	*httptest.Server
	kubeconfig string

	mu      sync.Mutex
	version int
	pods    map[string]*corev1.Pod
	log     []metav1.WatchEvent // index + 1 is its version
	changed chan struct{}
	events  []corev1.Event
	status  int // of every answer, where not 0
	set     *daemonSet
}

func newAPI(t *testing.T) *apiServer {
	t.Helper()
	a := &apiServer{set: newDaemonSet(), pods: map[string]*corev1.Pod{}, changed: make(chan struct{})}
	a.Server = httptest.NewServer(a)
	t.Cleanup(func() { a.CloseClientConnections(); a.Close() })
	a.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\ncurrent-context: c\nusers: [{name: u, user: {token: t}}]\n", a.URL)
	if err := os.WriteFile(a.kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return a
}

// answer makes every answer be of this status; 0: answer as one should.
func (a *apiServer) answer(status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status = status
}

// put makes or changes a pod.
func (a *apiServer) put(name, uid string, annotations map[string]string, change ...func(*corev1.Pod)) {
	p := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(uid), Annotations: annotations},
		Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "app"}, {Name: "istio-proxy", Args: []string{"proxy", "sidecar"}}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.99.0.2"}}},
	}
	for _, c := range change {
		c(p)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	kind := "ADDED"
	if a.pods[name] != nil {
		kind = "MODIFIED"
	}
	a.version++
	p.ResourceVersion = strconv.Itoa(a.version)
	a.pods[name] = p
	event := metav1.WatchEvent{Type: kind}
	event.Object.Object = p
	a.log = append(a.log, event)
	close(a.changed)
	a.changed = make(chan struct{})
}

// told says whether an Event with this reason and text came.
func (a *apiServer) told(reason, text string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.events {
		if e.Reason == reason && strings.Contains(e.Message, text) {
			return true
		}
	}
	return false
}

// lastWords is the text of the last Event about a pod, if any.
func (a *apiServer) lastWords(pod string) (text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.events {
		if e.InvolvedObject.Name == pod {
			text = e.Message
		}
	}
	return text
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	status := a.status
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	query := r.URL.Query()
	switch {
	case status != 0:
		refuse(w, &metav1.Status{Code: int32(status), Message: "no"})
	case strings.HasPrefix(r.URL.Path, "/apis/apps/v1/"):
		a.set.ServeHTTP(w, r)
	case r.Method != http.MethodGet:
		a.take(w, r)
	case query.Get("watch") != "" && r.URL.Path == "/api/v1/pods":
		a.watch(w, r, query.Get("resourceVersion"))
	case query.Get("watch") != "":
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case r.URL.Path == "/api/v1/pods" && query.Get("fieldSelector") == "spec.nodeName=n1":
		a.list(w)
	default:
		_ = json.NewEncoder(w).Encode(corev1.NamespaceList{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NamespaceList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
			Items: []corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "plain", ResourceVersion: "1"}}},
		})
	}
}

// refuse answers with an error of the API's.
func refuse(w http.ResponseWriter, s *metav1.Status) {
	s.TypeMeta, s.Status = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, metav1.StatusFailure
	w.WriteHeader(int(s.Code))
	_ = json.NewEncoder(w).Encode(s)
}

// take takes an Event, in whichever encoding the client prefers.
func (a *apiServer) take(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	object, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
	e, ok := object.(*corev1.Event)
	if err != nil || !ok {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	a.mu.Lock()
	a.events = append(a.events, *e)
	a.mu.Unlock()
	e.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Event"}
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(e)
}

func (a *apiServer) list(w http.ResponseWriter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(a.version)}}
	for _, p := range a.pods {
		list.Items = append(list.Items, *p)
	}
	_ = json.NewEncoder(w).Encode(list)
}

func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, since string) {
	next, _ := strconv.Atoi(since)
	for {
		a.mu.Lock()
		changed, pending := a.changed, a.log[min(next, len(a.log)):]
		a.mu.Unlock()
		for _, e := range pending {
			_ = json.NewEncoder(w).Encode(e)
			next++
		}
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}
