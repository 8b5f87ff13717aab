package oracle

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

const (
	publishedPort = plainPort // handed on to the machine behind the pod
	excludedPort  = otherPort // the same, and excluded inbound
	machinePort   = portDNS   // the machine's, of what the pod itself calls alone
)

// TestAPodThatRewritesDestinations: a pod hands ports of its own on to a machine behind it.
// What comes from the network Istio's lines take first, for they are there first. Sluice's
// turn comes after the kernel has rewritten: the difference "rewritten". What the proxy
// calls in the pod gets to the machine in both.
func TestAPodThatRewritesDestinations(t *testing.T) {
	c := with(func(r *rules.Rules) { r.ExcludeInboundPorts = []uint16{excludedPort} })
	for _, r := range []redirection{nothing, legacy, nft, sluice, legacy.and(), nft.and()} {
		t.Run(r.String(), func(t *testing.T) {
			s := newSite(t, r, dualStack)
			s.rewrites = func() { s.publish() }
			want := map[probe]string{}
			for i, pod := range []netip.Addr{own[0], own[3]} {
				published, captured := "vm:%d", "pod:%d"
				if r.iptables != "" {
					published = "proxy:in"
				}
				if r != nothing {
					captured = "proxy:in"
				}
				for port, by := range map[uint16]string{publishedPort: published, excludedPort: "vm:%d", machinePort: captured} {
					if strings.Contains(by, "%") {
						by = fmt.Sprintf(by, port)
					}
					want[probe{From: inFar, ID: kit.App, To: netip.AddrPortFrom(pod, port)}] = by
				}
				source := [...]netip.Addr{lo[2], lo[4]}[i]
				want[probe{From: inPod, ID: kit.Proxy, To: netip.AddrPortFrom(pod, machinePort), Source: source}] = fmt.Sprintf("vm:%d", machinePort)
			}
			var all []probe
			for p := range want {
				all = append(all, p)
			}
			got, err := s.try(c, "", all)
			if err != nil {
				t.Fatal(err)
			}
			for p, by := range want {
				if got[p].By != by {
					t.Errorf("%s: %s, want by %s", p, got[p], by)
				}
			}
		})
	}
}

// publish hands two ports on wherever they are called from outside, as Docker does for
// "docker run -p"; of a third one only what the pod itself calls, so that the proxy is
// between the network and the machine.
func (s *site) publish() {
	s.t.Helper()
	backend := s.iptables
	if backend == "" {
		backend = "legacy"
	}
	s.pod.Sysctl("ipv4/conf/all/route_localnet", "1") // or 127.0.0.6 is no source of what leaves by vm0
	for i, name := range []string{"iptables-" + backend, "ip6tables-" + backend} {
		pod, to := own[3*i], machine[i]
		s.addRule(name, "-A PREROUTING -i eth0 -p tcp -m multiport --dports %d,%d -j DNAT --to-destination %s", publishedPort, excludedPort, to)
		s.addRule(name, "-A OUTPUT -p tcp -d %s --dport %d -j DNAT --to-destination %s", pod, machinePort, to)
		s.addRule(name, "-A POSTROUTING -o vm0 -p tcp -j MASQUERADE")
	}
}

// addRule adds one rule to the nat table.
func (s *site) addRule(iptables, rule string, args ...any) {
	s.t.Helper()
	cmd := exec.Command(iptables, append([]string{"-t", "nat"}, strings.Fields(fmt.Sprintf(rule, args...))...)...)
	if out, err := inNS(s.pod, cmd); err != nil {
		s.t.Fatalf("%s: %v: %s", cmd, err, out)
	}
}
