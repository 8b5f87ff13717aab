package netns

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// inboundPorts are those that the app listens on in the tests of rules. It
// cannot have the proxy's own.
var inboundPorts = []int{8081, 8080, 9090, 15008, 15020, 15021, 15090}

func TestInboundRulesDecideByPort(t *testing.T) {
	d := kit.Datapath(t)
	tests := []struct {
		name   string
		change func(*rules.Rules)
		direct []int // the rest goes to the proxy
	}{
		{"the default", func(*rules.Rules) {}, []int{15008, 15020, 15021, 15090}},
		{"excludeInboundPorts", func(r *rules.Rules) {
			r.ExcludeInboundPorts = []uint16{8081, 9090}
		}, []int{8081, 9090, 15008, 15020, 15021, 15090}},
		{"includeInboundPorts is a list", func(r *rules.Rules) {
			r.IncludeInboundPorts = rules.Ports{List: []uint16{8080, 15020}}
		}, []int{8081, 9090, 15008, 15021, 15090}},
		{"a list makes excludes mean nothing", func(r *rules.Rules) {
			r.IncludeInboundPorts = rules.Ports{List: []uint16{8081, 8080}}
			r.ExcludeInboundPorts = []uint16{8080}
		}, []int{9090, 15008, 15020, 15021, 15090}},
		{"a list cannot include 15008", func(r *rules.Rules) {
			r.IncludeInboundPorts = rules.Ports{List: []uint16{15008}}
		}, inboundPorts},
		{"includeInboundPorts is empty", func(r *rules.Rules) {
			r.IncludeInboundPorts = rules.Ports{}
		}, inboundPorts},
	}
	for _, way := range inboundWays {
		for _, test := range tests {
			t.Run(fmt.Sprint(way, "/", test.name), func(t *testing.T) {
				decideByPort(t, d, func(pod *datapath.Pod) { pod.Inbound = way; test.change(&pod.Rules) }, test.direct)
			})
		}
	}
}

func decideByPort(t *testing.T, d *datapath.Datapath, change func(*datapath.Pod), wantDirect []int) {
	p := kit.NewPod(t)
	apps := map[int]*kit.Sock{}
	for _, port := range inboundPorts {
		apps[port] = p.Listen(kit.App, at("[::]", port))
		for _, f := range families {
			direct(t, p, f, apps[port], port)
		}
	}
	p.Enroll(d, change)
	proxy := p.Listen(kit.Proxy, "[::]:15006")
	for _, port := range inboundPorts {
		want, other := proxy, apps[port]
		if slices.Contains(wantDirect, port) {
			want, other = other, want
		}
		for _, f := range families {
			// Direct too: SO_ORIGINAL_DST is the local address, as
			// iptables and conntrack answer.
			arrives(t, p, f, port, want)
		}
		untouched(t, other)
	}
	wantStat(t, d, p, "direct-port-in", len(wantDirect)*len(families))
	wantStat(t, d, p, "captured-in", (len(inboundPorts)-len(wantDirect))*len(families))
}

func wantStat(t *testing.T, d *datapath.Datapath, p *kit.Pod, reason string, want int) {
	t.Helper()
	if n := p.Stat(d, reason); n != uint64(want) {
		t.Errorf("%s counts %d, want %d", reason, n, want)
	}
}

// As in Istio, the proxy's outbound port is no way in from the network: it is a
// port like any other, and so is the inbound one.
func TestTheProxysPortsFromTheNetworkGoToItsInboundPort(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		for _, f := range families {
			t.Run(fmt.Sprint(way, "/", f.name), func(t *testing.T) {
				p := kit.NewPod(t)
				before := p.Listen(kit.Proxy, at(f.wildcard, 15001))
				direct(t, p, f, before, 15001)
				before.Close()
				p.Enroll(d, inboundBy(way))
				out, in := proxyListeners(p)
				arrives(t, p, f, 15006, in[f.wildcard])
				client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 15001))
				if err != nil {
					t.Fatal(err)
				}
				accepted := in[f.wildcard].MustAccept()
				kit.Exchange(t, client, accepted, 1<<12)
				if accepted.Name() != ap(f.pod, 15001) {
					t.Errorf("the proxy's name is %v, want %v", accepted.Name(), ap(f.pod, 15001))
				}
				// A proxy that dialled what this says would dial itself.
				if got, err := accepted.OrigDst(f.level); !errors.Is(err, unix.ENOENT) {
					t.Errorf("SO_ORIGINAL_DST is %v, %v; want ENOENT", got, err)
				}
				untouched(t, out[f.wildcard])
			})
		}
	}
}
