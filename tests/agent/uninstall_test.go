package agent

import (
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// status answers with an error of the API's.
func status(code int, reason metav1.StatusReason) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, &metav1.Status{Code: int32(code), Reason: reason})
	}
}

func TestAnUninstallIsWhatTheAPIServerSaysIsOne(t *testing.T) {
	for name, say := range map[string]func(*daemonSet){
		"gone":                              func(s *daemonSet) { s.remove() },
		"being deleted":                     func(s *daemonSet) { s.beingDeleted() },
		"gone, and our rights with it, 401": func(s *daemonSet) { s.remove(); s.answerGet(status(401, metav1.StatusReasonUnauthorized)) },
		"gone, and our rights with it, 403": func(s *daemonSet) { s.remove(); s.answerGet(status(403, metav1.StatusReasonForbidden)) },
	} {
		t.Run(name, func(t *testing.T) {
			n, h := newNode(t), newHost(t)
			d := n.start(h.flags(selfFlags...)...).awaitReady()
			kit.Eventually(t, "the DaemonSet is watched", n.api.set.watched)
			say(n.api.set)
			kit.Eventually(t, "the daemon knows", func() bool {
				code, text := d.readyz()
				return code == http.StatusOK && strings.Contains(text, "daemonset: it is gone or being deleted")
			})
			if h.entry() == nil {
				t.Fatal("the entry is gone before the daemon is told to end")
			}
			d.end()
			h.isClean()
			n.isGone()
			n.isDown() // nobody is enrolled
		})
	}
}

func TestWhateverElseTheAPIServerSaysIsAnUpgrade(t *testing.T) {
	for name, say := range map[string]func(*testing.T, *apiServer){
		"there":     func(_ *testing.T, _ *apiServer) {},
		"401":       func(_ *testing.T, a *apiServer) { a.answer(401) },
		"403":       func(_ *testing.T, a *apiServer) { a.answer(403) },
		"500":       func(_ *testing.T, a *apiServer) { a.answer(500) },
		"no server": func(_ *testing.T, a *apiServer) { a.Listener.Close(); a.CloseClientConnections() },
		"no answer": func(_ *testing.T, a *apiServer) {
			a.set.answerGet(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		},
		"the 404 of something else": func(_ *testing.T, a *apiServer) {
			a.set.answerGet(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/plain")
				w.WriteHeader(http.StatusNotFound)
				_, _ = w.Write([]byte("404 page not found"))
			})
		},
		"an empty list, then 403": func(t *testing.T, a *apiServer) {
			a.set.vanish()
			before := a.set.watches()
			a.CloseClientConnections()
			kit.Eventually(t, "it has listed", func() bool { return a.set.watches() > before })
			a.answer(403)
		},
		"it is made anew": func(_ *testing.T, a *apiServer) { a.set.remove(); a.set.add() },
	} {
		t.Run(name, func(t *testing.T) {
			n, h := newNode(t), newHost(t)
			p := kit.NewPod(t)
			_, to := direct(t, p)
			d := n.start(h.flags(selfFlags...)...).awaitReady()
			kit.Eventually(t, "the DaemonSet is watched", n.api.set.watched)
			n.mustAdd(p, "cart", "u1", injected())
			say(t, n.api)
			d.end()
			if h.entry() == nil {
				t.Error("the entry is gone")
			}
			if _, err := os.Stat(h.plugged); err != nil {
				t.Error("the plugin is gone:", err)
			}
			goesTo(t, p, p.Listen(kit.Proxy, "0.0.0.0:15001"), to)
		})
	}
}

func TestAfterAnUninstallRunningPodsStayRedirected(t *testing.T) {
	n, h := newNode(t), newHost(t)
	p := kit.NewPod(t)
	_, to := direct(t, p)
	d := n.start(h.flags(selfFlags...)...).awaitReady()
	n.mustAdd(p, "cart", "u1", injected())
	p.Hold(kit.App) // a process leads to the namespace, as in any pod
	n.api.set.remove()
	d.end()
	h.isClean()
	n.isGone()
	goesTo(t, p, p.Listen(kit.Proxy, "0.0.0.0:15001"), to)
}

func TestAnUninstallMayLetRunningPodsGo(t *testing.T) {
	n, h := newNode(t), newHost(t)
	p := kit.NewPod(t)
	server, to := direct(t, p)
	d := n.start(h.flags(append(selfFlags, "--uninstall-running-pods", "direct")...)...).awaitReady()
	n.mustAdd(p, "cart", "u1", injected())
	p.Hold(kit.App)
	goesTo(t, p, p.Listen(kit.Proxy, "0.0.0.0:15001"), to)
	n.api.set.remove()
	d.end()
	h.isClean()
	n.isGone()
	goesTo(t, p, server, to)
	n.isDown()
}

func TestAnUninstallWaitsForTheADDThatRuns(t *testing.T) {
	n, h := newNode(t), newHost(t)
	d := n.start(h.flags(selfFlags...)...).awaitReady()
	// An ADD that waits for its stdin.
	add := addCommand(h.plugged, kit.NewPod(t), "cart", "u1")
	in, err := add.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := add.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = add.Wait() })
	n.api.set.remove()
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	kit.Eventually(t, "the entry goes first", func() bool { return h.entry() == nil })
	// Without an ADD it would be over after a second.
	for until := time.Now().Add(4 * time.Second); time.Now().Before(until) && !t.Failed(); time.Sleep(50 * time.Millisecond) {
		for _, path := range []string{h.plugged, n.socket()} {
			if _, err := os.Stat(path); err != nil {
				t.Error("gone while an ADD runs:", err)
			}
		}
	}
	in.Close()
	_ = add.Wait()
	d.ended = true
	if err := d.cmd.Wait(); err != nil {
		t.Error(err)
	}
	h.isClean()
	n.isGone()
}
