package netns

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// handshakePod is an enrolled pod whose app has reached the far server.
func handshakePod(t *testing.T, d *datapath.Datapath, f family) *kit.Pod {
	t.Helper()
	p := kit.NewPod(t)
	server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
	c, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
	if err != nil {
		t.Fatal("without Sluice:", err)
	}
	kit.Exchange(t, c, server.MustAccept(), 1<<10)
	p.Sysctl("ipv4/tcp_syncookies", "0")
	// What nobody answers ends within a second or two.
	p.Sysctl("ipv4/tcp_syn_retries", "1")
	p.Sysctl("ipv4/tcp_synack_retries", "1")
	p.Sysctl("ipv4/tcp_orphan_retries", "1")
	p.Enroll(d)
	return p
}

// announcing makes a connect need an entry in handshakes. IPv4 needs one where
// the source is bound; otherwise the address book says it all (ADR 2).
func announcing(f family) []kit.Option {
	if f.far.Is4() {
		return []kit.Option{kit.Bind(ap(kit.Pod4, 0))}
	}
	return nil
}

// dialFar dials a destination of the far host as the app, by way of handshakes.
func dialFar(p *kit.Pod, f family) (*kit.Sock, error) {
	return p.Dial(kit.App, f.socket, ap(f.far, 80), announcing(f)...)
}

func pending(t *testing.T, d *datapath.Datapath, p *kit.Pod) int {
	t.Helper()
	n, err := d.HandshakeUse(p.Cookie())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// fullBacklog opens the proxy's listener and fills it: from now on SYNs are
// dropped. It returns the client that fills it.
func fullBacklog(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family, backlog int) (listener *kit.Sock) {
	t.Helper()
	listener = p.Listen(kit.Proxy, at(f.wildcard, 15001))
	if err := unix.Listen(listener.FD, backlog); err != nil {
		t.Fatal(err)
	}
	for range backlog + 1 {
		if _, err := dialFar(p, f); err != nil {
			t.Fatal("fill the backlog:", err)
		}
	}
	if n := pending(t, d, p); n != 0 {
		t.Fatalf("connections that wait for accept() hold %d handshakes", n)
	}
	return listener
}

// waiting begins a dial that cannot be answered, and sees that it is announced.
func waiting(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) *kit.Sock {
	t.Helper()
	before := pending(t, d, p)
	c, err := begin(p.NS, kit.App, f, ap(f.far, 80), announcing(f)...)
	if err != nil {
		t.Fatal(err)
	}
	if n := pending(t, d, p); n != before+1 {
		t.Fatalf("%d handshakes after a SYN that nobody answers, want %d", n, before+1)
	}
	return c
}

func endsWith(t *testing.T, c *kit.Sock, want error) {
	t.Helper()
	if err := c.Finish(); !errors.Is(err, want) {
		t.Errorf("the connect ends with %v, want %v", err, want)
	}
}

// Each makes handshakes fail; none may leave an entry.
var handshakeFailures = []struct {
	name string
	slow bool // waits for the kernel's timers
	fail func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family)
}{
	{"no listener", false, func(t *testing.T, _ *datapath.Datapath, p *kit.Pod, f family) {
		if _, err := dialFar(p, f); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("the dial ends with %v, want ECONNREFUSED", err)
		}
	}},
	{"the client resets before accept", false, func(t *testing.T, _ *datapath.Datapath, p *kit.Pod, f family) {
		p.Listen(kit.Proxy, at(f.wildcard, 15001))
		c, err := dialFar(p, f)
		if err != nil {
			t.Fatal(err)
		}
		c.Reset()
	}},
	{"the client gives up in SYN_SENT", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 0)
		waiting(t, d, p, f).Close()
	}},
	{"the client resets in SYN_SENT", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 0)
		waiting(t, d, p, f).Reset()
	}},
	{"the client disconnects in SYN_SENT", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 0)
		if err := waiting(t, d, p, f).Disconnect(); err != nil {
			t.Error("AF_UNSPEC:", err)
		}
	}},
	{"the client shuts down in SYN_SENT", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 0)
		if err := unix.Shutdown(waiting(t, d, p, f).FD, unix.SHUT_RDWR); err != nil {
			t.Error("shutdown:", err)
		}
	}},
	{"the client is killed in SYN_SENT", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 0)
		c := waiting(t, d, p, f)
		kill := p.Hold(kit.App, c)
		c.Close() // the process has it alone
		if n := pending(t, d, p); n != 1 {
			t.Errorf("%d handshakes while the process lives, want 1", n)
		}
		kill()
	}},
	{"the SYN is never answered", true, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 0)
		endsWith(t, waiting(t, d, p, f), unix.ETIMEDOUT)
	}},
	{"the listener is closed before it answers", true, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		l := fullBacklog(t, d, p, f, 0)
		c := waiting(t, d, p, f)
		l.Close()
		endsWith(t, c, unix.ECONNREFUSED)
	}},
	{"the listener is closed with a full queue", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 8).Close()
	}},
	{"the proxy waits for data that never comes", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		l := p.Listen(kit.Proxy, at(f.wildcard, 15001), kit.Set(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 1))
		c, err := dialFar(p, f)
		if err != nil {
			t.Fatal(err)
		}
		if n := pending(t, d, p); n != 1 {
			t.Errorf("%d handshakes before the data, want 1", n)
		}
		c.Close()
		l.Close()
	}},
	{"the proxy dies", true, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		l := fullBacklog(t, d, p, f, 0)
		kill := p.Hold(kit.Proxy, l)
		l.Close()
		c := waiting(t, d, p, f)
		kill()
		endsWith(t, c, unix.ECONNREFUSED)
	}},
	{"the pod is un-enrolled meanwhile", false, func(t *testing.T, d *datapath.Datapath, p *kit.Pod, f family) {
		fullBacklog(t, d, p, f, 0)
		c := waiting(t, d, p, f)
		if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
			t.Error(err)
		}
		p.Enroll(d)
		c.Close()
	}},
}

func TestHandshakesThatFailLeaveNothing(t *testing.T) {
	d := kit.Datapath(t)
	for _, test := range handshakeFailures {
		for _, f := range families {
			if test.slow && f.name == "v4-mapped" {
				continue
			}
			t.Run(fmt.Sprint(test.name, "/", f.name), func(t *testing.T) {
				if test.slow {
					t.Parallel() // they only wait
				}
				p := handshakePod(t, d, f)
				test.fail(t, d, p, f)
				kit.Eventually(t, "no handshake is left", func() bool {
					n, err := d.Handshakes()
					if err != nil {
						t.Fatal(err)
					}
					return (n == 0 || test.slow) && pending(t, d, p) == 0
				})
			})
		}
	}
}
