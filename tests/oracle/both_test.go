package oracle

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// TestBothByTPROXY takes a pod in TPROXY mode through a migration: Istio's rules alone,
// Sluice beside them while the proxy runs, a proxy that starts later, Istio's rules alone
// again.
func TestBothByTPROXY(t *testing.T) {
	markless := func(p *kit.Pod) func() { return p.StartHAProxy(kit.HAProxyTransparent) } // Sluice marks its calls for it
	marking := func(p *kit.Pod) func() { return p.StartTProxy() }
	for _, tt := range []struct {
		name  string
		start func(*kit.Pod) (stop func())
		whole bool // Istio's rules are for both families, and enough for this proxy
		only4 bool // as where Istio takes the pod for an IPv4 one
	}{
		{"HAProxy", markless, false, false},
		{"a proxy that marks its calls", marking, true, false},
		{"Istio's rules for IPv4 alone", marking, false, true},
	} {
		for _, backend := range []redirection{legacy, nft} {
			t.Run(fmt.Sprint(tt.name, "/", backend), func(t *testing.T) {
				p, r := byIstioAndTProxy(t, backend.iptables)
				if tt.only4 {
					forgetIPv6(t, p, backend.iptables)
				}
				stop := tt.start(p)
				if tt.whole {
					carried(t, p, "Istio's rules alone")
				}
				d := kit.Datapath(t)
				if _, err := d.Enroll(p.NetNS, datapath.Pod{Rules: r}); err != nil {
					t.Fatal(err)
				}
				carried(t, p, "Sluice beside them")
				stop()
				stop = tt.start(p)
				carried(t, p, "a proxy that starts later")
				forgotten(t, p, stop)
				if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
					t.Fatal(err)
				}
				tt.start(p)
				if tt.whole {
					carried(t, p, "Istio's rules alone again")
				}
			})
		}
	}
}

// byIstioAndTProxy is a pod with what Istio adds in TPROXY mode.
func byIstioAndTProxy(t *testing.T, backend string) (*kit.Pod, rules.Rules) {
	t.Helper()
	r, err := byTProxy(func(*rules.Rules) {}).Rules.Normalise()
	if err != nil {
		t.Fatal(err)
	}
	p := kit.NewPod(t)
	if err := restore(p.NS, backend, r, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := wayBack(p.NS); err != nil {
		t.Fatal(err)
	}
	return p, r
}

// forgetIPv6 takes away what Istio adds for IPv6.
func forgetIPv6(t *testing.T, p *kit.Pod, backend string) {
	t.Helper()
	for _, table := range []string{"nat", "mangle"} {
		if out, err := inNS(p.NS, exec.Command("ip6tables-"+backend, "-t", table, "-F")); err != nil {
			t.Fatal(err, out)
		}
	}
	if err := p.RemoveWayBack(netns.WayBackRule6 | netns.WayBackRoute6); err != nil {
		t.Fatal(err)
	}
}

// throughProxy is a connection from far to an app of the pod.
func throughProxy(t *testing.T, p *kit.Pod, pod netip.Addr, when string) (client, served *kit.Sock) {
	t.Helper()
	any, client4 := "0.0.0.0", kit.Far4
	if pod.Is6() {
		any, client4 = "::", kit.Far6
	}
	app := p.BareListen(kit.App, netip.AddrPortFrom(netip.MustParseAddr(any), 8080).String())
	defer app.Close()
	client, err := p.Far.Dial(kit.Root, family(pod), netip.AddrPortFrom(pod, 8080), kit.Impatient)
	if err != nil {
		t.Fatalf("%s, %s: %v", when, pod, err)
	}
	served = app.MustAccept()
	if served.Peer().Addr() != client4 || served.Peer() == client.Name() {
		t.Errorf("%s, %s: the app's peer is %v, want the address of %v and another port", when, pod, served.Peer(), client.Name())
	}
	return client, served
}

func carried(t *testing.T, p *kit.Pod, when string) {
	t.Helper()
	for _, pod := range []netip.Addr{kit.Pod4, kit.Pod6} {
		client, served := throughProxy(t, p, pod, when)
		kit.Exchange(t, client, served, 1<<20)
		client.Close()
		served.Close()
	}
}

// forgotten: who writes to a connection that the proxy has forgotten is told so.
func forgotten(t *testing.T, p *kit.Pod, stop func()) {
	t.Helper()
	var clients []*kit.Sock
	for _, pod := range []netip.Addr{kit.Pod4, kit.Pod6} {
		client, served := throughProxy(t, p, pod, "before the proxy ends")
		kit.Exchange(t, client, served, 100)
		clients = append(clients, client)
	}
	stop()
	for _, client := range clients {
		kit.Eventually(t, fmt.Sprint("a write to ", client.Peer(), " is answered with a reset"), func() bool {
			err := client.WriteAll([]byte("late"))
			return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
		})
	}
}
