package agent

import (
	"encoding/json"
	"net/http"
	"strconv"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The daemon's own DaemonSet, of which it is told by its flags.
const (
	setNamespace = "sluice-system"
	setName      = "sluiced"
)

// selfFlags tell the daemon who it is.
var selfFlags = []string{"--namespace", setNamespace, "--daemonset", setName, "--pod", "sluiced-abcde"}

// daemonSet is what the API server says of it.
type daemonSet struct {
	mu       sync.Mutex
	version  int
	oldest   int               // version that can be watched from
	object   *appsv1.DaemonSet // nil: it is gone
	events   []metav1.WatchEvent
	changed  chan struct{}
	watchers int
	get      http.HandlerFunc // in place of the right answer to a get, if not nil
}

func newDaemonSet() *daemonSet {
	s := &daemonSet{changed: make(chan struct{})}
	s.add()
	return s
}

// change has something happen to it.
func (s *daemonSet) change(kind string, edit func(*appsv1.DaemonSet)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	d := &appsv1.DaemonSet{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"},
		ObjectMeta: metav1.ObjectMeta{Namespace: setNamespace, Name: setName, UID: "ds", ResourceVersion: strconv.Itoa(s.version)},
	}
	edit(d)
	s.object = d
	if kind == "DELETED" {
		s.object = nil
	}
	event := metav1.WatchEvent{Type: kind}
	event.Object.Object = d
	s.events = append(s.events, event)
	close(s.changed)
	s.changed = make(chan struct{})
}

// add makes it, or makes it anew.
func (s *daemonSet) add() { s.change("ADDED", func(*appsv1.DaemonSet) {}) }

// remove is what kubectl delete does.
func (s *daemonSet) remove() { s.change("DELETED", func(*appsv1.DaemonSet) {}) }

// beingDeleted is the same while something still holds it.
func (s *daemonSet) beingDeleted() {
	s.change("MODIFIED", func(d *appsv1.DaemonSet) { d.DeletionTimestamp = &metav1.Time{Time: time.Now()} })
}

// vanish leaves it out of every list, without a word that it was deleted.
func (s *daemonSet) vanish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.object = nil
	s.version++
	s.oldest = s.version
	s.events = append(s.events, metav1.WatchEvent{}) // which nobody sees
}

// answerGet has every get answered by something else.
func (s *daemonSet) answerGet(with http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.get = with
}

// watched says whether somebody watches.
func (s *daemonSet) watched() bool { return s.watches() > 0 }

// watches counts those that have begun to.
func (s *daemonSet) watches() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.watchers
}

func (s *daemonSet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const all = "/apis/apps/v1/namespaces/" + setNamespace + "/daemonsets"
	only := r.URL.Query().Get("fieldSelector") == "metadata.name="+setName
	s.mu.Lock()
	object, version, get := s.object, s.version, s.get
	s.mu.Unlock()
	switch {
	case r.Method != http.MethodGet:
		refuse(w, &metav1.Status{Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden})
	case r.URL.Path == all && only && r.URL.Query().Get("watch") != "":
		s.watch(w, r)
	case r.URL.Path == all && only:
		list := appsv1.DaemonSetList{TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSetList"}, ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(version)}}
		if object != nil {
			list.Items = append(list.Items, *object)
		}
		_ = json.NewEncoder(w).Encode(list)
	case r.URL.Path != all+"/"+setName: // more than the daemon may ask
		refuse(w, &metav1.Status{Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden})
	case get != nil:
		get(w, r)
	case object == nil:
		notFound(w, r)
	default:
		_ = json.NewEncoder(w).Encode(object)
	}
}

// notFound is the API server's own 404.
func notFound(w http.ResponseWriter, _ *http.Request) {
	refuse(w, &metav1.Status{Code: http.StatusNotFound, Reason: metav1.StatusReasonNotFound, Details: &metav1.StatusDetails{Name: setName, Group: "apps", Kind: "daemonsets"}})
}

func (s *daemonSet) watch(w http.ResponseWriter, r *http.Request) {
	next, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	s.mu.Lock()
	oldest := s.oldest
	s.mu.Unlock()
	if next < oldest {
		refuse(w, &metav1.Status{Code: http.StatusGone, Reason: metav1.StatusReasonExpired})
		return
	}
	first := true
	for {
		s.mu.Lock()
		changed, pending := s.changed, s.events[min(next, len(s.events)):]
		if first {
			s.watchers++
			first = false
		}
		s.mu.Unlock()
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
