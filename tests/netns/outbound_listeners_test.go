package netns

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// listening is a way in which a proxy listens on its two ports.
type listening struct {
	name    string
	at      []string // hosts
	options []kit.Option
	takes   [3]bool // connections of each of the families
}

var listenings = []listening{
	{"wildcard v4", []string{"0.0.0.0"}, nil, [3]bool{true, false, true}},
	{"wildcard v6, V6ONLY", []string{"[::]"}, []kit.Option{kit.V6Only}, [3]bool{false, true, false}},
	{"wildcard v6, dual-stack", []string{"[::]"}, nil, [3]bool{true, true, true}},
	{"both, V6ONLY", []string{"0.0.0.0", "[::]"}, nil, [3]bool{true, true, true}},
	{"127.0.0.1 alone", []string{"127.0.0.1"}, nil, [3]bool{true, false, true}},
	{"::1 alone", []string{"[::1]"}, nil, [3]bool{false, true, false}},
	{"127.0.0.1 and ::1", []string{"127.0.0.1", "[::1]"}, nil, [3]bool{true, true, true}},
	{"the pod's IPv4 address alone", []string{"10.99.0.2"}, nil, [3]bool{true, false, true}},
	{"the pod's IPv6 address alone", []string{"[fd99::2]"}, nil, [3]bool{false, true, false}},
	{"MPTCP, dual-stack", []string{"[::]"}, []kit.Option{kit.MPTCP}, [3]bool{true, true, true}},
	{"MPTCP, 127.0.0.1 alone", []string{"127.0.0.1"}, []kit.Option{kit.MPTCP}, [3]bool{true, false, true}},
}

func (l listening) open(p *kit.Pod, port int) []*kit.Sock {
	var out []*kit.Sock
	for _, host := range l.at {
		options := l.options
		if len(l.at) > 1 && host == "[::]" {
			options = []kit.Option{kit.V6Only}
		}
		out = append(out, p.Listen(kit.Proxy, at(host, port), options...))
	}
	return out
}

// acceptAny takes a connection from whichever listener has one.
func acceptAny(t *testing.T, listeners []*kit.Sock) (c connected) {
	t.Helper()
	kit.Eventually(t, "a listener has a connection", func() bool {
		for _, l := range listeners {
			accepted, from, err := l.AcceptFrom(0)
			if err == nil {
				c.accepted, c.from = accepted, from
				return true
			}
			if !errors.Is(err, kit.ErrNobody) && !errors.Is(err, unix.EINVAL) { // EINVAL: shut down
				t.Fatal("accept:", err)
			}
		}
		return false
	})
	return c
}

// call is a captured connect: who calls, to where, and to which of the proxy's
// ports it must come.
type call struct {
	name string
	as   kit.ID
	port int // the proxy's
	to   func(f family) netip.AddrPort
}

// An app's call of a far host (O14) and the proxy's of its own pod (O3).
var calls = []call{
	{"outbound", kit.App, 15001, func(f family) netip.AddrPort { return ap(f.far, 80) }},
	{"self-call", kit.Proxy, 15006, func(f family) netip.AddrPort { return ap(f.pod, 8080) }},
}

// checkCall dials and asserts that the call is captured, or refused.
func (c call) check(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family, listeners []*kit.Sock, taken bool) {
	t.Helper()
	client, err := p.Dial(c.as, f.socket, c.to(f))
	if !taken {
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("the dial ends with %v, want ECONNREFUSED", err)
		}
		checkNoHandshakes(t, d, p)
		return
	}
	if err != nil {
		t.Fatal("dial:", err)
	}
	got := acceptAny(t, listeners)
	got.client = client
	defer got.close()
	checkCaptured(t, f, got, c.to(f), f.pod)
	checkNoHandshakes(t, d, p)
}

// provePlain proves that a call flows without Sluice, and returns whom it must
// not reach later.
func (c call) provePlain(t *testing.T, p *kit.Pod, f family) *kit.Sock {
	t.Helper()
	where := p.Far
	if c.to(f).Addr() == f.pod {
		where = p.NS
	}
	server := where.Listen(kit.Root, at(f.wildcard, int(c.to(f).Port())))
	client, err := p.Dial(c.as, f.socket, c.to(f))
	if err != nil {
		t.Fatal("without Sluice:", err)
	}
	accepted := server.MustAccept()
	kit.Exchange(t, client, accepted, 1<<10)
	client.Reset()
	accepted.Close()
	return server
}

func TestOutboundHoweverTheProxyListens(t *testing.T) {
	d := kit.Datapath(t)
	for _, c := range calls {
		for i, f := range families {
			t.Run(c.name+"/"+f.name, func(t *testing.T) {
				p := kit.NewPod(t)
				server := c.provePlain(t, p, f)
				p.Enroll(d)
				for _, l := range listenings {
					t.Run(l.name, func(t *testing.T) {
						listeners := l.open(p, c.port)
						c.check(t, d, p, f, listeners, l.takes[i])
						for _, s := range listeners {
							s.Close()
						}
						checkNothingReached(t, server)
					})
				}
				if _, err := server.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
					t.Error("the server got a connection behind the proxy's back")
				}
			})
		}
	}
}

func TestOutboundToAListenerThatWasShutDownAndToItsSuccessor(t *testing.T) {
	d := kit.Datapath(t)
	for _, c := range calls {
		for _, f := range families {
			t.Run(c.name+"/"+f.name, func(t *testing.T) {
				p := kit.NewPod(t)
				server := c.provePlain(t, p, f)
				p.Enroll(d)
				var all []*kit.Sock
				for range 3 {
					listener := p.Listen(kit.Proxy, at(f.wildcard, c.port))
					all = append(all, listener)
					c.check(t, d, p, f, all, true)
					if err := unix.Shutdown(listener.FD, unix.SHUT_RDWR); err != nil {
						t.Fatal("shutdown:", err)
					}
					c.check(t, d, p, f, all, false)
				}
				checkNothingReached(t, server)
			})
		}
	}
}

// Listeners that no callback saw: the kernel finds them on loopback by itself.
func TestOutboundToAProxyThatListenedBeforeEnrolment(t *testing.T) {
	d := kit.Datapath(t)
	for _, c := range calls {
		for i, f := range families {
			t.Run(c.name+"/"+f.name, func(t *testing.T) {
				p := kit.NewPod(t)
				server := c.provePlain(t, p, f)
				for _, l := range listenings {
					if l.at[0] == "10.99.0.2" || l.at[0] == "[fd99::2]" {
						continue // as with iptables, not on loopback: nobody
					}
					listeners := l.open(p, c.port)
					p.Enroll(d)
					c.check(t, d, p, f, listeners, l.takes[i])
					for _, s := range listeners {
						s.Close()
					}
					if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
						t.Fatal("unenroll:", err)
					}
				}
				checkNothingReached(t, server)
			})
		}
	}
}
