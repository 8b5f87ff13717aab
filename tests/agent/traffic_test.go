package agent

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// traffic is that of an enrolled pod, which goes on while daemons die.
type traffic struct {
	t             *testing.T
	pod           *kit.Pod
	proxy, server *kit.Sock
	to            netip.AddrPort
	stop          chan struct{}
	ended         sync.WaitGroup
	mu            sync.Mutex
	done          int
	lost          []error // that were not captured
}

// startTraffic proves that traffic flows without Sluice, enrols a pod, and has it
// connect until its end, which fails the test where one connection was not
// captured.
func (n *node) startTraffic() *traffic {
	n.t.Helper()
	p := kit.NewPod(n.t)
	c := &traffic{t: n.t, pod: p, stop: make(chan struct{})}
	c.server, c.to = direct(n.t, p)
	d := n.start().awaitReady()
	n.mustAdd(p, "cart", "u1", injected())
	d.kill()
	p.Hold(kit.App) // a process leads to the namespace, as in any pod
	c.proxy = p.Listen(kit.Proxy, "0.0.0.0:15001")
	goesTo(n.t, p, c.proxy, c.to)
	c.ended.Go(func() {
		for {
			select {
			case <-c.stop:
				return
			case <-time.After(5 * time.Millisecond):
				c.connect()
			}
		}
	})
	return c
}

func (c *traffic) connect() {
	at := arrivesAt(c.pod.NS, c.to, c.proxy, c.server)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done++
	if at != c.proxy {
		c.lost = append(c.lost, fmt.Errorf("connection %d: escaped: %v", c.done, at == c.server))
	}
}

// goOn waits for a few more connections.
func (c *traffic) goOn() {
	c.t.Helper()
	count := func() int { c.mu.Lock(); defer c.mu.Unlock(); return c.done }
	want := count() + 3
	kit.Eventually(c.t, "the pod connects", func() bool { return count() >= want })
}

func (c *traffic) end() {
	close(c.stop)
	c.ended.Wait()
	c.t.Logf("%d connections while daemons died", c.done)
	if len(c.lost) > 0 {
		c.t.Errorf("%d of %d were not captured: %v", len(c.lost), c.done, c.lost[0])
	}
}
