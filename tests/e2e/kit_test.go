package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// patience is how long anything may take on a machine that is busy; what must be
// quick measures itself.
const patience = 90 * time.Second

// eventually polls until it is so, or fails with the last reason why it was not.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	eventuallyWithin(t, patience, what, try)
}

func eventuallyWithin(t *testing.T, limit time.Duration, what string, try func() error) {
	t.Helper()
	var err error
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("not within %v: %s: %v", limit, what, err)
}

// space is a namespace of a test, which goes with it.
type space struct {
	t    *testing.T
	name string
}

// newSpace makes a namespace whose pods keep the restricted Pod Security Standard,
// unless labels say otherwise.
func newSpace(t *testing.T, labels ...string) *space {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-", Labels: map[string]string{
		"pod-security.kubernetes.io/enforce": "restricted",
	}}}
	for i := 0; i+1 < len(labels); i += 2 {
		ns.Labels[labels[i]] = labels[i+1]
	}
	ns, err := cluster.client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s := &space{t: t, name: ns.Name}
	t.Cleanup(func() {
		if t.Failed() {
			s.explain()
		}
		zero := int64(0)
		ctx := context.Background()
		if err := cluster.client.CoreV1().Pods(s.name).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &zero}, metav1.ListOptions{}); err != nil {
			t.Error(err)
		}
		if err := cluster.client.CoreV1().Namespaces().Delete(ctx, s.name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the namespace has its service account", func() error {
		_, err := cluster.client.CoreV1().ServiceAccounts(s.name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return s
}

// explain says what the pods and their Events say, for a test that has failed.
func (s *space) explain() {
	ctx := context.Background()
	if pods, err := cluster.client.CoreV1().Pods(s.name).List(ctx, metav1.ListOptions{}); err == nil && len(pods.Items) < 10 {
		for _, p := range pods.Items {
			s.t.Logf("pod %s: %s, %v", p.Name, p.Status.Phase, p.Status.PodIPs)
			for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
				state, _ := json.Marshal(c.State)
				s.t.Logf("  container %s: ready %v, restarts %d, %s", c.Name, c.Ready, c.RestartCount, state)
			}
		}
	}
	if events, err := cluster.client.CoreV1().Events(s.name).List(ctx, metav1.ListOptions{}); err == nil && len(events.Items) < 60 {
		for _, e := range events.Items {
			s.t.Logf("event: %s %s %s: %s", e.InvolvedObject.Name, e.Type, e.Reason, e.Message)
		}
	}
}

func (s *space) create(p *corev1.Pod) {
	s.t.Helper()
	if _, err := cluster.client.CoreV1().Pods(s.name).Create(s.t.Context(), p, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *space) get(name string) *corev1.Pod {
	s.t.Helper()
	p, err := cluster.client.CoreV1().Pods(s.name).Get(s.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

// run creates pods and waits until each is ready.
func (s *space) run(pods ...*corev1.Pod) {
	s.t.Helper()
	for _, p := range pods {
		s.create(p)
	}
	for _, p := range pods {
		s.awaitReady(p.Name)
	}
}

func ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// awaitReady waits until the pod is ready and its app answers.
func (s *space) awaitReady(name string) *corev1.Pod {
	s.t.Helper()
	var p *corev1.Pod
	eventually(s.t, "pod "+name+" is ready", func() error {
		if p = s.get(name); !ready(p) {
			return fmt.Errorf("it is %s", p.Status.Phase)
		}
		return s.tryControl(name, "/capabilities", nil, &map[string]string{})
	})
	return p
}

// remove deletes a pod at once and waits until it is gone.
func (s *space) remove(name string) {
	s.t.Helper()
	zero := int64(0)
	if err := cluster.client.CoreV1().Pods(s.name).Delete(s.t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "pod "+name+" is gone", func() error {
		_, err := cluster.client.CoreV1().Pods(s.name).Get(s.t.Context(), name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.New("it is still there")
	})
}

// tryControl asks the app's control port, by the API server, which any cluster has.
func (s *space) tryControl(pod, path string, query url.Values, into any) error {
	if cluster.bed != nil {
		p := s.get(pod)
		return getJSON("http://"+net.JoinHostPort(p.Status.PodIP, "9000")+path+"?"+query.Encode(), into)
	}
	request := cluster.client.CoreV1().RESTClient().Get().Namespace(s.name).Resource("pods").Name(pod + ":9000").SubResource("proxy").Suffix(path)
	for name, values := range query {
		for _, value := range values {
			request = request.Param(name, value)
		}
	}
	text, err := request.DoRaw(s.t.Context())
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

func getJSON(url string, into any) error {
	client := http.Client{Timeout: 20 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

func (s *space) control(pod, path string, query url.Values, into any) {
	s.t.Helper()
	if err := s.tryControl(pod, path, query, into); err != nil {
		s.t.Fatalf("ask the app of %s for %s: %v", pod, path, err)
	}
}

// answer and fetched are podapp's.
type answer struct {
	Host   string   `json:"host"`
	Remote string   `json:"remote"`
	Path   []string `json:"path"`
}

type fetched struct {
	Answer *answer `json:"answer"`
	Local  string  `json:"local"`
	Peer   string  `json:"peer"`
	Error  string  `json:"error"`
}

// path is what the request met, or why it failed.
func (f fetched) path() string {
	if f.Error != "" {
		return "error: " + f.Error
	}
	if f.Answer == nil {
		return "no answer"
	}
	return strings.Join(f.Answer.Path, "; ")
}

// fetch has a pod's app make a request.
func (s *space) fetch(pod, to string) (out fetched) {
	s.t.Helper()
	s.control(pod, "/fetch", url.Values{"url": {to}}, &out)
	return out
}

// appURL is a pod's app by its first address.
func (s *space) appURL(pod string) string { return "http://" + s.appAddress(pod) }

func (s *space) appAddress(pod string) string {
	s.t.Helper()
	return net.JoinHostPort(s.get(pod).Status.PodIP, "8080")
}

// goesStraight wants a request to meet no proxy.
func (s *space) goesStraight(from, to string) {
	s.t.Helper()
	eventually(s.t, from+" reaches "+to+" without meeting a proxy", func() error {
		got := s.fetch(from, to)
		if got.Error != "" || got.Answer == nil || len(got.Answer.Path) > 0 {
			return errors.New(got.path())
		}
		return nil
	})
}

// goesThrough wants a request to meet exactly these: "out POD" or "in POD", with the
// caller's address and the destination as that proxy saw them.
func (s *space) goesThrough(from, to string, by ...string) {
	s.t.Helper()
	var got fetched
	eventually(s.t, fmt.Sprintf("%s reaches %s by %q", from, to, by), func() error {
		got = s.fetch(from, to)
		if got.Error != "" || got.Answer == nil || len(got.Answer.Path) != len(by) {
			return errors.New(got.path())
		}
		for i, want := range by {
			if !strings.HasPrefix(got.Answer.Path[i], want+" ") {
				return errors.New(got.path())
			}
		}
		return nil
	})
}

// out and in are what a request meets, in full.
func (s *space) out(pod, destination string) string {
	return fmt.Sprintf("out %s %s %s", pod, s.get(pod).Status.PodIP, destination)
}

// sees wants the last of a request's proxies to have seen exactly this.
func (s *space) sees(from, to string, want ...string) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("%s reaches %s by %q", from, to, want), func() error {
		got := s.fetch(from, to)
		if got.Error != "" || got.Answer == nil || !slices.Equal(got.Answer.Path, want) {
			return errors.New(got.path())
		}
		return nil
	})
}

// events are the Events about a pod, of one reason.
func (s *space) events(pod, reason string) (messages []string) {
	s.t.Helper()
	list, err := cluster.client.CoreV1().Events(s.name).List(s.t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + pod})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range list.Items {
		if e.Reason == reason {
			messages = append(messages, e.Message)
		}
	}
	return messages
}

func (s *space) awaitEvent(pod, reason string, words ...string) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("an Event %s about %s says %q", reason, pod, words), func() error {
		all := s.events(pod, reason)
		for _, message := range all {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(message, w) }) {
				return nil
			}
		}
		return fmt.Errorf("these are there: %q", all)
	})
}

func mustRead(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func httpOK(url string) error {
	_, err := httpGet(url)
	return err
}

func httpGet(url string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(string(text))
	}
	return string(text), err
}
