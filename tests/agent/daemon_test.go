package agent

import (
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-mesh/sluice/tests/kit"
)

const excludePorts = "traffic.sidecar.istio.io/excludeOutboundPorts"

func injected(more ...string) map[string]string {
	out := map[string]string{"sidecar.istio.io/status": "{}"}
	for i := 0; i+1 < len(more); i += 2 {
		out[more[i]] = more[i+1]
	}
	return out
}

// direct proves that traffic flows, and returns the far server.
func direct(t *testing.T, p *kit.Pod) (server *kit.Sock, to netip.AddrPort) {
	t.Helper()
	server, to = p.Far.Listen(kit.Root, "0.0.0.0:80"), netip.AddrPortFrom(kit.Far4, 80)
	goesTo(t, p, server, to)
	return server, to
}

// goesTo dials and wants the connection to arrive at a listener.
func goesTo(t *testing.T, p *kit.Pod, listener *kit.Sock, to netip.AddrPort) (client, accepted *kit.Sock) {
	t.Helper()
	client, err := p.Dial(kit.App, unix.AF_INET, to)
	if err != nil {
		t.Fatal(err)
	}
	accepted = listener.MustAccept()
	kit.Exchange(t, client, accepted, 1<<12)
	return client, accepted
}

func TestADDThroughTheDaemonAndItsDeath(t *testing.T) {
	n := newNode(t)
	p, plain := kit.NewPod(t), kit.NewPod(t)
	_, to := direct(t, p)
	first := n.start().awaitReady()
	n.api.put("cart", "u1", injected())
	n.api.put("plain", "u2", nil, func(p *corev1.Pod) { p.Spec.Containers = p.Spec.Containers[:1] })
	n.mustAdd(p, "cart", "u1", nil) // the runtime gives no annotations: the API server knows
	n.mustAdd(plain, "plain", "u2", nil)
	if yes, doubt := n.enrolled(p); !yes || doubt {
		t.Fatal("the pod is enrolled:", yes, "in doubt:", doubt)
	}
	if yes, _ := n.enrolled(plain); yes {
		t.Error("a pod without a sidecar is enrolled")
	}
	proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
	client, accepted := goesTo(t, p, proxy, to)

	first.kill()
	goesTo(t, p, proxy, to) // nobody is needed
	second := n.start().awaitReady()
	if yes, _ := n.enrolled(p); !yes {
		t.Error("the next daemon has lost the pod")
	}
	kit.Exchange(t, client, accepted, 1<<12)
	goesTo(t, p, proxy, to)

	if err := second.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	second.ended = true
	if err := second.cmd.Wait(); err != nil {
		t.Error("SIGTERM:", err)
	}
	goesTo(t, p, proxy, to)
	if _, err := os.Stat(filepath.Join(n.dir, "agent.sock")); err == nil {
		t.Error("the socket is left behind")
	}
}

func TestAPodThatStartsWithoutADaemonIsJudgedOnItsReturn(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	_, to := direct(t, p)
	n.start().awaitReady().kill()
	n.mustAdd(p, "cart", "u1", injected())
	p.Hold(kit.App) // a process leads to the namespace, as in any pod
	if yes, doubt := n.enrolled(p); !yes || !doubt {
		t.Fatal("enrolled:", yes, "in doubt:", doubt)
	}
	proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
	goesTo(t, p, proxy, to)
	uid := int64(2000) // the proxy's, which no annotation told
	n.api.put("cart", "u1", injected(), func(p *corev1.Pod) {
		p.Spec.Containers[1].SecurityContext = &corev1.SecurityContext{RunAsUser: &uid}
	})
	n.start().awaitReady()
	began := time.Now()
	kit.Eventually(t, "the pod is judged again", func() bool { _, doubt := n.enrolled(p); return !doubt })
	t.Log("judged within", time.Since(began))
	kit.Eventually(t, "an Event says what changed", func() bool { return n.api.told("RedirectionJudged", "proxyUIDs") })
}

func TestWithoutAnAPIServerADDIsServedInDoubt(t *testing.T) {
	n := newNode(t)
	n.api.answer(http.StatusForbidden)
	p, other := kit.NewPod(t), kit.NewPod(t)
	direct(t, p)
	d := n.start().awaitReady()
	kit.Eventually(t, "it says so", func() bool { _, text := d.readyz(); return strings.Contains(text, "api server: it does not answer") })
	n.mustAdd(p, "cart", "u1", injected())
	if yes, doubt := n.enrolled(p); !yes || !doubt {
		t.Fatal("enrolled:", yes, "in doubt:", doubt)
	}
	if out, err := n.add(other, "other", "u2", nil); err == nil || !strings.Contains(out, `"code": 11`) {
		t.Error("a pod of which nothing is known:", err, out)
	}
	n.api.put("cart", "u1", injected())
	n.api.answer(0)
	kit.Eventually(t, "the pod is judged again", func() bool { _, doubt := n.enrolled(p); return !doubt })
	kit.Eventually(t, "readiness says nothing of it any more", func() bool { _, text := d.readyz(); return text == "ready\n" })
}

// Measured is the time from the API server's word to the first new connection that
// follows it; what is wanted is less than a second.
func TestARunningPodsRulesFollowItsAnnotations(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	server, to := direct(t, p)
	n.start().awaitReady()
	n.api.put("cart", "u1", injected())
	n.mustAdd(p, "cart", "u1", injected())
	p.Hold(kit.App) // a process leads to the namespace, as in any pod
	proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
	client, accepted := goesTo(t, p, proxy, to)
	var took []time.Duration
	for i := range 11 {
		want, annotations := server, injected(excludePorts, "80")
		if i%2 == 1 {
			want, annotations = proxy, injected()
		}
		began := time.Now()
		n.api.put("cart", "u1", annotations)
		kit.Eventually(t, "new connections follow the rules", func() bool { return arrivesAt(p.NS, to, proxy, server) == want })
		took = append(took, time.Since(began))
		kit.Exchange(t, client, accepted, 1<<12) // the open one goes on
	}
	t.Log("changed within", took)
	slices.Sort(took)
	t.Logf("p50 %v, most %v", took[len(took)/2], took[len(took)-1])
	if median, limit := took[len(took)/2], kit.Scaled(t, time.Second); median > limit {
		t.Errorf("a change takes %v, and may take %v on a machine as busy as this", median, limit)
	}

	for _, refused := range []struct {
		what, reason, says string
		annotations        map[string]string
		change             func(*corev1.Pod)
	}{
		{"an invalid value", "RedirectionInvalid", "eighty", injected(excludePorts, "eighty"), nil},
		{"an interception mode", "RedirectionKept", "interception mode", injected("sidecar.istio.io/interceptionMode", "TPROXY"), nil},
		{"no status", "RedirectionKept", "status", nil, nil},
		{"DNS capture", "RedirectionKept", "DNS capture", injected(), func(p *corev1.Pod) {
			p.Spec.Containers[1].Env = []corev1.EnvVar{{Name: "ISTIO_META_DNS_CAPTURE", Value: "true"}}
		}},
	} {
		var change []func(*corev1.Pod)
		if refused.change != nil {
			change = append(change, refused.change)
		}
		n.api.put("cart", "u1", refused.annotations, change...)
		kit.Eventually(t, refused.what+" is refused in an Event", func() bool { return n.api.told(refused.reason, refused.says) })
		goesTo(t, p, server, to) // as the last rules that could be followed say
		kit.Exchange(t, client, accepted, 1<<12)
	}
}

func TestASecondDaemonWaitsForTheFirstToEnd(t *testing.T) {
	n := newNode(t)
	first := n.start().awaitReady()
	second := n.start()
	kit.Eventually(t, "the second says who owns the node", func() bool {
		status, text := second.readyz()
		return status == http.StatusServiceUnavailable && strings.Contains(text, "process "+strconv.Itoa(first.cmd.Process.Pid)+" on ")
	})
	first.kill()
	second.awaitReady()
}
