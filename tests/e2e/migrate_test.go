package e2e

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// istioRules are Istio's with the plugin's defaults, for IPv4.
const istioRules = `*nat
:ISTIO_INBOUND - [0:0]
:ISTIO_REDIRECT - [0:0]
:ISTIO_IN_REDIRECT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 9000 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
COMMIT
`

// addIstiosRules does what Istio's own CNI plugin does in a pod.
func (s *space) addIstiosRules(pod string) {
	s.t.Helper()
	pauses := pausesOf(s.t, s.get(pod))
	if len(pauses) != 1 {
		s.t.Fatalf("pod %s has %d sandboxes", pod, len(pauses))
	}
	cmd := exec.Command("nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", pauses[0]), "iptables-restore", "--noflush")
	cmd.Stdin = strings.NewReader(istioRules)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("write Istio's rules into pod %s: %v: %s", pod, err, out)
	}
}

// TestAPodThatHasIstiosRulesTooIsRedirectedOnce: as during a migration, or where a
// managed mesh keeps its own plugin in the chain.
func TestAPodThatHasIstiosRulesTooIsRedirectedOnce(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("outside"), meshed("both"), meshed("peer"),
		meshed("rules", unvalidated, func(p *corev1.Pod) { p.Labels["sidecar.istio.io/inject"] = "false" }))
	outside := s.appURL("outside")
	s.goesStraight("rules", outside) // it is none of Sluice's
	s.goesThrough("both", outside, "out both")
	s.addIstiosRules("rules")
	s.addIstiosRules("both")
	s.sees("rules", outside, s.out("rules", s.appAddress("outside"))) // the rules do redirect
	s.goesThrough("outside", s.appURL("rules"), "in rules")

	s.sees("both", outside, s.out("both", s.appAddress("outside")))
	s.goesThrough("outside", s.appURL("both"), "in both")
	s.goesThrough("both", s.appURL("peer"), "out both", "in peer")
	s.goesThrough("peer", s.appURL("both"), "out peer", "in both")
	s.goesThrough("both", "http://"+s.service("peer", 8080), "out both", "in peer")
	s.load("both", outside, func() {})
}
