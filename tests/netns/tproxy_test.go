package netns

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// byTProxy asks for TPROXY mode.
func byTProxy(p *datapath.Pod) { p.Rules.Mode = rules.TProxy }

// strictSources lets the kernel check the source of every packet as strictly as
// it can.
func strictSources(p *kit.Pod) {
	for _, link := range []string{"all", "lo", "eth0"} {
		p.Sysctl("ipv4/conf/"+link+"/rp_filter", "1")
	}
}

func TestByTPROXYTheAppSeesTheClientAndAnswersThroughTheProxy(t *testing.T) {
	for name, start := range map[string]func(*kit.Pod) func(){
		"marks its calls":         func(p *kit.Pod) func() { return p.StartTProxy() },
		"does not":                func(p *kit.Pod) func() { return p.StartTProxy(kit.Unmarked) },
		"calls the app at home":   func(p *kit.Pod) func() { return p.StartTProxy(kit.ToLoopback) },
		"in a pod with rp_filter": func(p *kit.Pod) func() { strictSources(p); return p.StartTProxy() },
	} {
		t.Run(name, func(t *testing.T) { appSeesTheClient(t, start) })
	}
}

func TestHAProxyByTPROXY(t *testing.T) {
	appSeesTheClient(t, func(p *kit.Pod) func() { return p.StartHAProxy(kit.HAProxyTransparent) })
}

// appSeesTheClient goes through a pod's life with a proxy that start starts.
func appSeesTheClient(t *testing.T, start func(*kit.Pod) (stop func())) {
	d := kit.Datapath(t)
	for _, way := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
		for _, f := range families {
			t.Run(fmt.Sprint(way, "/", f.name), func(t *testing.T) {
				p := kit.NewPod(t)
				app := p.BareListen(kit.App, at(f.wildcard, 8080))
				reachesTheApp(t, p, f, app, "without Sluice")
				before := waysOf(t, p)

				p.Enroll(d, byTProxy, func(pod *datapath.Pod) { pod.Inbound = way })
				mustRefuse(t, p, f, "without a proxy")
				stop := start(p)
				throughTheProxy(t, p, f, app)
				if n := p.Stat(d, "direct-proxy-source"); n != 1 {
					t.Errorf("%d calls of the app were counted, want 1", n)
				}
				stop()
				mustRefuse(t, p, f, "when the proxy has ended")

				if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
					t.Fatal(err)
				}
				if after := waysOf(t, p); after != before {
					t.Errorf("un-enrolment leaves\n%s\nwhere there was\n%s", after, before)
				}
				reachesTheApp(t, p, f, app, "un-enrolled again")
			})
		}
	}
}

func reachesTheApp(t *testing.T, p *kit.Pod, f family, app *kit.Sock, when string) {
	t.Helper()
	client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
	if err != nil {
		t.Fatal(when, err)
	}
	served := app.MustAccept()
	if served.Peer() != client.Name() {
		t.Errorf("%s the app's peer is %v, want the client itself, %v", when, served.Peer(), client.Name())
	}
	kit.Exchange(t, client, served, 1<<16)
	client.Close()
	served.Close()
}

func mustRefuse(t *testing.T, p *kit.Pod, f family, when string) {
	t.Helper()
	if _, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%s the dial ends with %v, want ECONNREFUSED", when, err)
	}
}

func throughTheProxy(t *testing.T, p *kit.Pod, f family, app *kit.Sock) {
	t.Helper()
	client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
	if err != nil {
		t.Fatal("by the proxy:", err)
	}
	served := app.MustAccept()
	if served.Peer().Addr() != client.Name().Addr() || served.Peer().Port() == client.Name().Port() {
		t.Errorf("the app's peer is %v, want the address of %v and another port", served.Peer(), client.Name())
	}
	if client.Peer() != ap(f.pod, 8080) {
		t.Errorf("the client's peer is %v", client.Peer())
	}
	kit.Exchange(t, client, served, 4<<20)
	client.Close()
	if _, err := served.ReadSome(); !errors.Is(err, io.EOF) {
		t.Errorf("after the client's end the app reads %v", err)
	}
	served.Close()
}

// A running pod: its proxy listens before it is enrolled, on several addresses.
func TestByTPROXYOfARunningPod(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	second := map[int]netip.Prefix{unix.AF_INET: netip.MustParsePrefix("10.99.0.77/24"), unix.AF_INET6: netip.MustParsePrefix("fd99::77/64")}
	for _, prefix := range second {
		p.AddAddr("eth0", prefix)
	}
	p.StartTProxy()
	if e := p.Enroll(d, byTProxy); e.Listeners != 2 {
		t.Errorf("%d listeners of the proxy are known, want 2", e.Listeners)
	}
	for _, f := range families[:2] {
		for _, pod := range []netip.Addr{f.pod, second[f.socket].Addr()} {
			app := p.BareListen(kit.App, at(f.wildcard, 8080))
			client, err := p.Far.Dial(kit.Root, f.socket, ap(pod, 8080))
			if err != nil {
				t.Fatal(f.name, err)
			}
			served := app.MustAccept()
			if served.Name() != ap(pod, 8080) || served.Peer().Addr() != f.far || served.Peer() == client.Name() {
				t.Errorf("%s: the app is called at %v from %v", f.name, served.Name(), served.Peer())
			}
			kit.Exchange(t, client, served, 1<<20)
			app.Close()
		}
	}
}

func TestByTPROXYHoweverAConnectionEnds(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		p := kit.NewPod(t)
		app := p.BareListen(kit.App, at(f.wildcard, 8080))
		connect := func() (client, served *kit.Sock) {
			client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
			if err != nil {
				t.Fatal("dial:", err)
			}
			served = app.MustAccept()
			kit.Exchange(t, client, served, 100)
			return client, served
		}
		ends := map[string]func(t *testing.T, closes, other *kit.Sock){
			"closes": func(t *testing.T, closes, other *kit.Sock) {
				closes.Close()
				if _, err := other.ReadSome(); !errors.Is(err, io.EOF) {
					t.Errorf("the other end reads %v, want the end", err)
				}
			},
			"closes one way": func(t *testing.T, closes, other *kit.Sock) {
				if err := unix.Shutdown(closes.FD, unix.SHUT_WR); err != nil {
					t.Fatal(err)
				}
				if _, err := other.ReadSome(); !errors.Is(err, io.EOF) {
					t.Errorf("the other end reads %v, want the end", err)
				}
				if err := other.WriteAll([]byte("late")); err != nil {
					t.Error(err)
				}
				other.Close()
				late := make([]byte, 4)
				if err := closes.ReadFull(late); err != nil || string(late) != "late" {
					t.Errorf("read %q, %v after closing one way", late, err)
				}
			},
			"resets": func(t *testing.T, closes, other *kit.Sock) {
				closes.Reset()
				if _, err := other.ReadSome(); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the other end reads %v, want a reset", err)
				}
			},
		}
		all := func(t *testing.T) {
			for name, end := range ends {
				client, served := connect()
				t.Run(f.name+"/the client "+name, func(t *testing.T) { end(t, client, served) })
				client, served = connect()
				t.Run(f.name+"/the app "+name, func(t *testing.T) { end(t, served, client) })
			}
		}
		t.Run("without Sluice", all)
		p.Enroll(d, byTProxy)
		p.StartTProxy()
		t.Run("by the proxy", all)
	}
}

// Many at once, from one client: each app's peer has a port of its own, and each
// answer finds its way.
func TestByTPROXYManyConnectionsOfOneClient(t *testing.T) {
	const many = 100
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	app := p.BareListen(kit.App, "0.0.0.0:8080")
	p.Enroll(d, byTProxy)
	p.StartTProxy()
	peers := map[netip.AddrPort]bool{}
	var all sync.WaitGroup
	for range many {
		client, err := p.Far.Dial(kit.Root, unix.AF_INET, ap(kit.Pod4, 8080))
		if err != nil {
			t.Fatal("dial:", err)
		}
		served := app.MustAccept()
		peers[served.Peer()] = true
		all.Go(func() { kit.Exchange(t, client, served, 1<<16) })
	}
	all.Wait()
	if len(peers) != many {
		t.Errorf("the app saw %d peers, want %d", len(peers), many)
	}
	if n := p.Stat(d, "captured-in"); n != many {
		t.Errorf("%d connections were captured, want %d", n, many)
	}
}
