package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

// relayed gives the proxy a listener for outbound IPv6, which HAProxy cannot be alone.
func relayed(p *corev1.Pod) {
	p.Spec.Containers = append(p.Spec.Containers, container("relay", *appImage, proxyUser, "relay"))
}

// ip6 is the pod's IPv6 address.
func (s *space) ip6(pod string) string {
	s.t.Helper()
	for _, ip := range s.get(pod).Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil && a.Is6() {
			return a.String()
		}
	}
	s.t.Fatal(pod, "has no IPv6 address")
	return ""
}

// wantIPv6Redirected wants the traffic of three pods to be redirected by IPv6.
func (s *space) wantIPv6Redirected() {
	s.t.Helper()
	at := func(pod string) string { return "[" + s.ip6(pod) + "]:8080" }
	out := func(to string) string { return fmt.Sprintf("out client %s %s", s.ip6("client"), to) }
	in := func(from string) string { return fmt.Sprintf("in server %s %s", s.ip6(from), at("server")) }
	s.goesStraight("outside", "http://"+at("outside"))
	s.sees("client", "http://"+at("outside"), out(at("outside")))
	s.sees("outside", "http://"+at("server"), in("outside"))
	s.sees("client", "http://"+at("server"), out(at("server")), in("client"))
	service := s.service("outside", 8080, corev1.IPv6Protocol)
	s.goesStraight("server", "http://"+at("server"))
	s.sees("client", "http://"+service, out(service+":80"))
}

func TestDualStackPodsAreRedirectedByBothFamilies(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("outside"), meshed("client", relayed), meshed("server", relayed))
	s.goesThrough("client", s.appURL("server"), "out client", "in server")
	s.wantIPv6Redirected()
}

func TestIPv6OnlyPodsAreRedirected(t *testing.T) {
	needNode(t)
	needSluice(t)
	awaitChained := func() {
		eventually(t, "the plugin is chained", func() error {
			if text := mustRead(t, testbed.Conflist); !strings.Contains(text, "sluice-cni") {
				return errors.New(text)
			}
			return nil
		})
	}
	t.Cleanup(func() {
		overwrite(t, testbed.ConflistText(testbed.PodRanges()...))
		awaitChained()
		awaitSluice(t)
	})
	overwrite(t, testbed.ConflistText(testbed.PodRanges()[1]))
	awaitChained()
	s := newSpace(t)
	s.run(plain("outside"), meshed("client", relayed), meshed("server", relayed))
	for _, name := range []string{"client", "server"} {
		p := s.get(name)
		if len(p.Status.PodIPs) != 1 || !strings.Contains(p.Status.PodIP, ":") {
			t.Fatal(name, "has the addresses", p.Status.PodIPs)
		}
		wantValidated(t, p)
	}
	s.wantIPv6Redirected()
}
