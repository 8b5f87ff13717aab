// Package netns tests the datapath in real network namespaces. Every redirect
// test first proves that its traffic flows without Sluice.
package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// family is one of the three ways in which a client can dial.
type family struct {
	name     string
	socket   int
	far, pod netip.Addr // as dialled
	level    int        // at which SO_ORIGINAL_DST is asked
	wildcard string
}

var families = []family{
	{"IPv4", unix.AF_INET, kit.Far4, kit.Pod4, unix.SOL_IP, "0.0.0.0"},
	{"IPv6", unix.AF_INET6, kit.Far6, kit.Pod6, unix.SOL_IPV6, "[::]"},
	{"v4-mapped", unix.AF_INET6, kit.Far4, kit.Pod4, unix.SOL_IP, "0.0.0.0"},
}

func at(host string, port int) string { return fmt.Sprintf("%s:%d", host, port) }

func ap(a netip.Addr, port int) netip.AddrPort { return netip.AddrPortFrom(a, uint16(port)) }

// proxyListeners opens the proxy's four listeners, as Envoy does.
func proxyListeners(p *kit.Pod) (out, in map[string]*kit.Sock) {
	out, in = map[string]*kit.Sock{}, map[string]*kit.Sock{}
	for port, to := range map[int]map[string]*kit.Sock{15001: out, 15006: in} {
		to["0.0.0.0"] = p.Listen(kit.Proxy, at("0.0.0.0", port))
		to["[::]"] = p.Listen(kit.Proxy, at("[::]", port), kit.V6Only)
	}
	return out, in
}

func TestOutboundGoesToTheProxyWithItsOriginalDestination(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			direct, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
			if err != nil {
				t.Fatal("without Sluice:", err)
			}
			kit.Exchange(t, direct, server.MustAccept(), 1<<16)

			p.Enroll(d)
			out, _ := proxyListeners(p)
			client, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
			if err != nil {
				t.Fatal("dial:", err)
			}
			accepted := out[f.wildcard].MustAccept()
			got, err := accepted.OrigDst(f.level)
			if err != nil || got != ap(f.far, 80) {
				t.Errorf("SO_ORIGINAL_DST of the proxy's socket is %v, %v; want %v", got, err, ap(f.far, 80))
			}
			if got, err := client.OrigDst(f.level); err != nil || got != ap(f.far, 80) {
				t.Errorf("SO_ORIGINAL_DST of the client's socket is %v, %v; want %v", got, err, ap(f.far, 80))
			}
			if client.Peer() != ap(f.far, 80) {
				t.Errorf("the client's peer is %v, want %v", client.Peer(), ap(f.far, 80))
			}
			if client.Name().Addr() != f.pod {
				t.Errorf("the client's name is %v, want address %v", client.Name(), f.pod)
			}
			if accepted.Peer() != client.Name() {
				t.Errorf("the proxy's peer is %v, want %v", accepted.Peer(), client.Name())
			}
			kit.Exchange(t, client, accepted, 1<<20)
			if _, err := server.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
				t.Error("the far server got a connection behind the proxy's back")
			}
		})
	}
}

func TestInboundGoesToTheProxyWithItsOriginalDestination(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
		for _, f := range families {
			t.Run(fmt.Sprint(way, "/", f.name), func(t *testing.T) {
				p := kit.NewPod(t)
				app := p.Listen(kit.App, at(f.wildcard, 8080))
				direct, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
				if err != nil {
					t.Fatal("without Sluice:", err)
				}
				kit.Exchange(t, direct, app.MustAccept(), 1<<16)

				p.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = way })
				if _, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080)); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("without a proxy the dial ends with %v, want ECONNREFUSED", err)
				}
				_, in := proxyListeners(p)
				client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
				if err != nil {
					t.Fatal("dial:", err)
				}
				accepted := in[f.wildcard].MustAccept()
				if got, err := accepted.OrigDst(f.level); err != nil || got != ap(f.pod, 8080) {
					t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, ap(f.pod, 8080))
				}
				if accepted.Peer() != client.Name() {
					t.Errorf("the proxy's peer is %v, want the client's %v", accepted.Peer(), client.Name())
				}
				kit.Exchange(t, client, accepted, 1<<20)
				if _, err := app.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
					t.Error("the app got a connection behind the proxy's back")
				}
			})
		}
	}
}
