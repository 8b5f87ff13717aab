package agent

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// stays wants a pod without a proxy to be refused, as a captured one is, for as
// long as the daemon needs to compare everything a few times.
func stays(t *testing.T, n *node, p *kit.Pod, when string) {
	t.Helper()
	to := netip.AddrPortFrom(kit.Far4, 80)
	for until := time.Now().Add(3 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if s, err := p.Dial(kit.App, unix.AF_INET, to); !errors.Is(err, unix.ECONNREFUSED) {
			if err == nil {
				s.Close()
			}
			t.Fatalf("%s: the dial ends with %v, want ECONNREFUSED", when, err)
		}
	}
	if yes, _ := n.enrolled(p); !yes {
		t.Errorf("%s: the pod is un-enrolled", when)
	}
}

// No process and no name leads to the pod's namespace, which this process holds by
// a descriptor: the daemon may not take that for its end.
func TestAnEnrolledPodStaysWhateverTheAPIServerSays(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	direct(t, p)
	d := n.start("--resync", "1s").awaitReady()
	n.api.put("cart", "u1", injected())
	n.mustAdd(p, "cart", "u1", nil)
	stays(t, n, p, "enrolled")
	now := metav1.Now()
	n.api.put("cart", "u1", injected(), func(p *corev1.Pod) { p.DeletionTimestamp = &now })
	stays(t, n, p, "Terminating")
	n.api.put("cart", "u1", nil, func(p *corev1.Pod) {
		p.Status, p.Spec.Containers = corev1.PodStatus{Phase: corev1.PodSucceeded}, p.Spec.Containers[:1]
	})
	kit.Eventually(t, "the daemon says that it stays", func() bool { return n.api.told("RedirectionKept", "stays redirected") })
	stays(t, n, p, "Succeeded")
	n.api.remove("cart")
	stays(t, n, p, "deleted by force")
	for _, status := range []int{http.StatusForbidden, http.StatusGone, silent, http.StatusUnauthorized} {
		n.api.answer(status)
		n.api.cut()
		if status != silent {
			kit.Eventually(t, fmt.Sprint("the daemon hears ", status), func() bool { _, text := d.readyz(); return strings.Contains(text, "api server: it does not answer") })
		}
		stays(t, n, p, fmt.Sprint("when the API server answers ", status))
		n.api.answer(0) // with an empty list
		n.api.cut()
		kit.Eventually(t, "the API server is heard again", func() bool { _, text := d.readyz(); return text == "ready\n" })
		stays(t, n, p, "with an empty list")
	}
	if open := d.namespaces(); len(open) != 0 {
		t.Error("the daemon has namespaces open:", open)
	}
	d.kill()
	n.start("--resync", "1s").awaitReady()
	stays(t, n, p, "with the next daemon and an empty list")
}

// namespaces are the descriptors of network namespaces that the daemon has open.
func (d *daemon) namespaces() (out []string) {
	d.t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
	if err != nil || len(links) == 0 {
		d.t.Fatal("the daemon's descriptors:", err, links)
	}
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, "net:[") {
			out = append(out, to)
		}
	}
	return out
}

// awaitEmpty waits until no pod is enrolled, and nothing is recorded of any.
func (n *node) awaitEmpty() {
	n.t.Helper()
	kit.Eventually(n.t, "nothing is left of the pod", func() (empty bool) {
		n.look(func(d *datapath.Datapath) {
			pods, err1 := d.Pods()
			attachments, err2 := d.Attachments()
			empty = err1 == nil && err2 == nil && len(pods) == 0 && len(attachments) == 0
		})
		return empty
	})
}

func TestAPodWhoseDELWasMissedGoesWithItsNamespace(t *testing.T) {
	n := newNode(t)
	d := n.start("--resync", "1s").awaitReady()
	t.Run("life", func(t *testing.T) { // its end closes the namespaces
		p := kit.NewPod(t)
		n.api.put("cart", "u1", injected())
		n.mustAdd(p, "cart", "u1", nil)
		stays(t, n, p, "enrolled")
	})
	n.awaitEmpty()
	kit.Eventually(t, "the daemon says so", func() bool { return d.said("a network namespace is gone; its pod is un-enrolled", "shop/cart") == 1 })

	d.kill() // and the same while no daemon runs
	t.Run("life without a daemon", func(t *testing.T) {
		p := kit.NewPod(t)
		n.mustAdd(p, "cart", "u1", injected())
	})
	d = n.start("--resync", "1s").awaitReady()
	n.awaitEmpty()
	kit.Eventually(t, "the next daemon says so", func() bool { return d.said("a network namespace is gone; its pod is un-enrolled", "shop/cart") == 1 })
}

// The pins go while the daemon runs, and while none does: as by a reboot, but for
// the pods, which run on.
func TestLostPinsAreMadeAnewAndPodsEnrolledAgain(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	server, to := direct(t, p)
	runsIn(t, drivers["systemd"], p.Do)
	d := n.start("--resync", "1s").awaitReady()
	n.api.put("cart", podUID, injected())
	n.mustAdd(p, "cart", podUID, nil)
	stays(t, n, p, "enrolled")
	for _, runs := range []bool{true, false} {
		if !runs {
			d.kill()
		}
		if err := os.RemoveAll(filepath.Join(n.bpffs, datapath.Layout)); err != nil {
			t.Fatal(err)
		}
		before := d.said("a running pod is enrolled", "shop/cart")
		if runs {
			kit.Eventually(t, "the daemon says so", func() bool { return d.said("what was pinned is gone", "") == 1 })
		} else {
			kit.Eventually(t, "nothing redirects", func() bool {
				s, err := p.Dial(kit.App, unix.AF_INET, to)
				if err == nil {
					server.MustAccept().Close()
					s.Close()
				}
				return err == nil
			})
			d, before = n.start("--resync", "1s").awaitReady(), 0
		}
		kit.Eventually(t, "the pod is repaired", func() bool { return d.said("a running pod is enrolled", "shop/cart") > before })
		stays(t, n, p, "after the loss")
		d.awaitReady()
	}
}

// After a reboot there is a state file and nothing else: no pin, no pod's process,
// no namespace. The kubelet makes a new sandbox for the same pod.
func TestAfterARebootTheSamePodIsEnrolledInItsNewNamespace(t *testing.T) {
	n := newNode(t)
	n.api.put("cart", "u1", injected())
	t.Run("before", func(t *testing.T) {
		p := kit.NewPod(t)
		d := n.start().awaitReady()
		n.mustAdd(p, "cart", "u1", nil)
		stays(t, n, p, "enrolled")
		d.kill()
	})
	if err := os.RemoveAll(filepath.Join(n.bpffs, datapath.Layout)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "state.json")); err != nil {
		t.Fatal("the state file:", err)
	}
	n.start("--resync", "1s").awaitReady()
	p := kit.NewPod(t)
	direct(t, p)
	n.mustAdd(p, "cart", "u1", nil)
	stays(t, n, p, "enrolled again")
	n.look(func(d *datapath.Datapath) {
		if pods, err := d.Pods(); err != nil || len(pods) != 1 {
			t.Error("enrolled are:", pods, err)
		}
	})
}

// ADD's decision, made late: the one time that a living namespace is let go.
func TestAPodThatWasEnrolledInDoubtAndIsNotInTheMeshIsLetGo(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	server, to := direct(t, p)
	n.start().awaitReady().kill()
	n.mustAdd(p, "cart", "u1", injected())
	p.Hold(kit.App)
	if yes, doubt := n.enrolled(p); !yes || !doubt {
		t.Fatal("enrolled:", yes, "in doubt:", doubt)
	}
	if _, err := p.Dial(kit.App, unix.AF_INET, to); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal("enrolled in doubt, it is not captured:", err)
	}
	n.api.put("cart", "u1", injected(), func(p *corev1.Pod) {
		p.Spec.Containers[1].Env = []corev1.EnvVar{{Name: "DISABLE_ENVOY", Value: "true"}}
	})
	d := n.start().awaitReady()
	began := time.Now()
	kit.Eventually(t, "the pod is let go", func() bool { yes, _ := n.enrolled(p); return !yes })
	t.Log("within", time.Since(began), "of the daemon's return")
	goesTo(t, p, server, to)
	kit.Eventually(t, "an Event says so", func() bool { return n.api.told("RedirectionJudged", "not redirected any more") })
	if d.said("is not in the mesh, and un-enrolled", "shop/cart") != 1 {
		t.Error("the log does not say so")
	}
	n.awaitEmpty()
}

// Rules of a pod in a user namespace are written with the machine's IDs. An event
// that changes nothing changes nothing.
func TestAPodInAUserNamespaceIsNotEnrolledAnewAtEachEvent(t *testing.T) {
	n := newNode(t)
	p, inside := kit.NewUserPod(t, syscall.SysProcIDMap{ContainerID: 0, HostID: 20 << 16, Size: 1 << 16})
	defer inside.Kill()
	n.start("--resync", "1s").awaitReady()
	n.api.put("cart", "u1", injected())
	n.mustAdd(p, "cart", "u1", nil)
	program := func() ebpf.ProgramID {
		l, err := link.LoadPinnedLink(filepath.Join(n.bpffs, datapath.Layout, "links", "pods", fmt.Sprint(p.Cookie()), "inbound"), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		return info.Program
	}
	before := program()
	n.api.put("cart", "u1", injected())
	for until := time.Now().Add(3 * time.Second); time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if now := program(); now != before {
			t.Fatal("its program was replaced")
		}
	}
	n.api.put("cart", "u1", injected(excludePorts, "80"))
	kit.Eventually(t, "a change is applied", func() bool { return program() != before })
	kit.Eventually(t, "an Event says so", func() bool { return n.api.told("RedirectionChanged", "excludeOutboundPorts") })
	if got := n.api.count("RedirectionChanged"); got != 1 {
		t.Error("Events of changes:", got)
	}
}
