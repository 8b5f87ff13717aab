package netns

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// listenerKind is how a proxy listens on its inbound port.
type listenerKind struct {
	name     string
	open     func(p *kit.Pod, id kit.ID) []*kit.Sock
	takes    func(datapath.Inbound, family) bool
	mappable bool // a socket hash can hold it
}

func always(datapath.Inbound, family) bool { return true }

var listenerKinds = []listenerKind{
	{"wildcard IPv4", func(p *kit.Pod, id kit.ID) []*kit.Sock {
		return []*kit.Sock{p.Listen(id, "0.0.0.0:15006")}
	}, func(_ datapath.Inbound, f family) bool { return f.pod.Is4() }, true},
	{"wildcard dual-stack", func(p *kit.Pod, id kit.ID) []*kit.Sock {
		return []*kit.Sock{p.Listen(id, "[::]:15006")}
	}, always, true},
	{"both wildcards", func(p *kit.Pod, id kit.ID) []*kit.Sock {
		return []*kit.Sock{p.Listen(id, "0.0.0.0:15006"), p.Listen(id, "[::]:15006", kit.V6Only)}
	}, always, true},
	{"only IPv6", func(p *kit.Pod, id kit.ID) []*kit.Sock {
		return []*kit.Sock{p.Listen(id, "[::]:15006", kit.V6Only)}
	}, func(_ datapath.Inbound, f family) bool { return f.pod.Is6() }, true},
	{"the pod's addresses", func(p *kit.Pod, id kit.ID) []*kit.Sock {
		return []*kit.Sock{
			p.Listen(id, at(kit.Pod4.String(), 15006)),
			p.Listen(id, at("["+kit.Pod6.String()+"]", 15006)),
		}
	}, always, true},
	{"loopback", func(p *kit.Pod, id kit.ID) []*kit.Sock {
		return []*kit.Sock{p.Listen(id, "127.0.0.1:15006"), p.Listen(id, "[::1]:15006")}
	}, func(datapath.Inbound, family) bool { return false }, true},
	{"reuseport, 4 workers", fourWorkers, always, true},
	{"MPTCP", func(p *kit.Pod, id kit.ID) []*kit.Sock {
		return []*kit.Sock{p.Listen(id, "[::]:15006", kit.MPTCP)}
	}, func(way datapath.Inbound, _ family) bool { return way == datapath.InboundTC }, false},
}

func fourWorkers(p *kit.Pod, id kit.ID) (out []*kit.Sock) {
	for range 4 {
		out = append(out, p.Listen(id, "[::]:15006", kit.ReusePort))
	}
	return out
}

// Who bound the proxy's listeners, and in whose hands they are when the pod is
// enrolled. The binder counts.
var owners = []struct {
	name           string
	binder, holder kit.ID
	ours           bool
}{
	{"the proxy's", kit.Proxy, kit.Proxy, true},
	{"the proxy's by its UID", kit.ProxyUID, kit.ProxyUID, true},
	{"the proxy's by its GID", kit.ProxyGID, kit.ProxyGID, true},
	{"somebody else's", kit.App, kit.App, false},
	{"the proxy's in other hands", kit.Proxy, kit.App, true},
	{"somebody else's in the proxy's hands", kit.App, kit.Proxy, false},
}

func TestInboundReachesEveryKindOfListenerFromEveryKindOfClient(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		for _, kind := range listenerKinds {
			for _, f := range families {
				t.Run(fmt.Sprint(way, "/", kind.name, "/", f.name), func(t *testing.T) {
					everyClient(t, d, way, kind, f, kit.Proxy, true)
				})
			}
		}
	}
}

func TestInboundReachesTheProxysListenersAlone(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		for _, kind := range listenerKinds {
			for _, owner := range owners[1:4] {
				t.Run(fmt.Sprint(way, "/", kind.name, "/", owner.name), func(t *testing.T) {
					everyClient(t, d, way, kind, families[0], owner.binder, owner.ours)
				})
			}
		}
	}
}

func everyClient(t *testing.T, d *datapath.Datapath, way datapath.Inbound, kind listenerKind, f family, id kit.ID, ours bool) {
	takes := ours && kind.takes(way, f)
	p := kit.NewPod(t)
	allowFastOpen(p)
	app := p.Listen(kit.App, at(f.wildcard, 8080))
	for _, c := range clientKinds {
		client, err := c.open(p.Far, f, ap(f.pod, 8080))
		if err != nil {
			t.Fatalf("without Sluice, %s: %v", c.name, err)
		}
		converse(t, c.early, client, app.MustAccept())
	}
	p.Enroll(d, inboundBy(way))
	listeners := kind.open(p, id)
	for _, c := range clientKinds {
		client, err := c.open(p.Far, f, ap(f.pod, 8080))
		if !takes {
			if !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: the dial ends with %v, want ECONNREFUSED", c.name, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		accepted, err := kit.AcceptAny(kit.Patience, listeners...)
		if err != nil {
			t.Fatalf("%s: at the proxy: %v", c.name, err)
		}
		checkInbound(t, f, client, accepted, 8080)
		converse(t, c.early, client, accepted)
		if c.name == "MPTCP" && kind.name == "MPTCP" && protocolOf(t, accepted) != unix.IPPROTO_MPTCP {
			t.Error("MPTCP on both sides fell back to TCP")
		}
	}
	untouched(t, app)
	checkInboundStats(t, d, p, ours && !kind.mappable, takes)
}

func checkInboundStats(t *testing.T, d *datapath.Datapath, p *kit.Pod, notMappable, takes bool) {
	t.Helper()
	counted, not := "captured-in", "refused-no-listener"
	if !takes {
		counted, not = not, counted
	}
	if n := p.Stat(d, counted); n < uint64(len(clientKinds)) {
		t.Errorf("%s counts %d connections, want %d", counted, n, len(clientKinds))
	}
	if n := p.Stat(d, not); n != 0 {
		t.Errorf("%s counts %d connections, want none", not, n)
	}
	want := uint64(0)
	if notMappable {
		want = 1
	}
	if n := p.Stat(d, "listener-not-mappable"); n != want {
		t.Errorf("listener-not-mappable counts %d, want %d", n, want)
	}
}

func protocolOf(t *testing.T, s *kit.Sock) int {
	t.Helper()
	protocol, err := unix.GetsockoptInt(s.FD, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		t.Fatal(err)
	}
	return protocol
}

func TestInboundReachesListenersThatWereOpenBeforeEnrolment(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		for _, kind := range listenerKinds {
			for _, owner := range owners {
				if owner.name != "the proxy's" && kind.name != "wildcard dual-stack" && kind.name != "MPTCP" {
					continue
				}
				if owner.binder != owner.holder && !kind.mappable {
					continue // an MPTCP socket does not show who bound its first subflow
				}
				t.Run(fmt.Sprint(way, "/", kind.name, "/", owner.name), func(t *testing.T) {
					openedBefore(t, func() *datapath.Datapath { return d }, way, kind, owner.binder, owner.holder, owner.ours)
				})
			}
		}
	}
}

// A proxy that is older than Sluice: nobody saw who bound its sockets, so those
// who have them are taken for it.
func TestInboundReachesListenersThatWereOpenBeforeSluice(t *testing.T) {
	for _, way := range inboundWays {
		for _, kind := range listenerKinds {
			if kind.name != "wildcard dual-stack" && kind.name != "MPTCP" {
				continue
			}
			for _, owner := range owners[2:4] {
				t.Run(fmt.Sprint(way, "/", kind.name, "/", owner.name), func(t *testing.T) {
					up := func() *datapath.Datapath { return kit.OwnDatapath(t, datapath.Options{}) }
					openedBefore(t, up, way, kind, owner.binder, owner.holder, owner.ours)
				})
			}
		}
	}
}

func openedBefore(t *testing.T, up func() *datapath.Datapath, way datapath.Inbound, kind listenerKind, binder, holder kit.ID, ours bool) {
	p := kit.NewPod(t)
	apps := map[string]*kit.Sock{"0.0.0.0": p.Listen(kit.App, "0.0.0.0:8080"), "[::]": p.Listen(kit.App, "[::]:8080", kit.V6Only)}
	for _, f := range families {
		direct(t, p, f, apps[f.wildcard], 8080)
	}
	listeners := kind.open(p, binder)
	p.Hold(holder, listeners...)
	d := up()
	e := p.Enroll(d, inboundBy(way))
	for _, f := range families {
		if ours && kind.takes(way, f) {
			arrives(t, p, f, 8080, listeners...)
		} else {
			refused(t, p, f, 8080, f.name)
		}
		untouched(t, apps[f.wildcard])
	}
	wantNote := ours && !kind.mappable && way == datapath.InboundSKLookup
	note := len(e.Notes) == 1 && strings.Contains(e.Notes[0], "MPTCP") && strings.Contains(e.Notes[0], "--inbound=tc")
	if note != wantNote || !wantNote && len(e.Notes) != 0 {
		t.Errorf("the notes are %q; want one about MPTCP: %v", e.Notes, wantNote)
	}
	want := 0
	if ours && kind.mappable && kind.name != "loopback" {
		want = len(listeners)
	}
	if e.Listeners != want {
		t.Errorf("enrolment found %d listeners, want %d", e.Listeners, want)
	}
}
