package agent

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// A pod's calls to its own addresses are not captured. Which those are, the daemon
// keeps current.
func TestAnAddressThatARunningPodGainsIsItsOwn(t *testing.T) {
	n := newNode(t)
	p := kit.NewPod(t)
	_, far := direct(t, p)
	n.start().awaitReady()
	n.mustAdd(p, "cart", "u1", injected())
	p.Hold(kit.App) // a process leads to the namespace, as in any pod
	proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
	goesTo(t, p, proxy, far)
	gained := netip.MustParseAddr("10.99.7.7")
	app := p.Listen(kit.App, "0.0.0.0:8080")
	p.Netlink(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(gained.String() + "/32")
		if err != nil {
			return err
		}
		return h.AddrAdd(lo, addr)
	})
	kit.Eventually(t, "a call to it stays in the pod", func() bool {
		client, err := p.Dial(kit.App, unix.AF_INET, netip.AddrPortFrom(gained, 8080))
		if err != nil {
			return false
		}
		defer client.Close()
		accepted, err := kit.AcceptAny(kit.Patience, proxy, app)
		if err != nil {
			return false
		}
		defer accepted.Close()
		return accepted.Name() == netip.AddrPortFrom(gained, 8080)
	})
}

// The daemon hears of a pod's addresses by a socket in its namespace, which lives as
// long as that does. docs/daemon.md says for how long.
func TestANamespaceEndsSoonAfterItsLastProcess(t *testing.T) {
	for name, end := range map[string]struct {
		del   bool
		bound time.Duration
	}{"with a DEL": {true, time.Second}, "without one": {false, 6 * time.Second}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.start("--resync", "1h").awaitReady() // no sweep finds it
			p := kit.NewPod(t)
			n.mustAdd(p, "cart", "u1", injected())
			release := p.Hold(kit.App)
			n.isWatched(p)
			before := links(p.Far)
			if end.del {
				if out, err := n.runtimeCall("DEL", p, "cart", "u1", injected()).CombinedOutput(); err != nil {
					t.Fatalf("DEL: %v: %s", err, out)
				}
			}
			release()
			p.Close()
			ended := time.Now()
			kit.Eventually(t, "the kernel takes the namespace's end of the wire away, and so the other", func() bool { return links(p.Far) < before })
			took, limit := time.Since(ended), kit.Scaled(t, end.bound+time.Second) // the kernel has its own pace
			t.Log("it ended within", took)
			if took > limit {
				t.Errorf("it may take %v on a machine as busy as this", limit)
			}
		})
	}
}

// isWatched waits until the daemon has heard of an address.
func (n *node) isWatched(p *kit.Pod) {
	n.t.Helper()
	const probe = "10.92.0.1"
	p.AddAddr("lo", netip.MustParsePrefix(probe+"/32"))
	kit.Eventually(n.t, "the pod is watched", func() (heard bool) {
		n.look(func(d *datapath.Datapath) {
			pods, err := d.Pods()
			heard = err == nil && slices.ContainsFunc(pods, func(info datapath.PodInfo) bool { return slices.Contains(info.OwnAddrs, probe) })
		})
		return heard
	})
}

// links counts the interfaces of a namespace.
func links(ns *kit.NS) (count int) {
	ns.Netlink(func(h *netlink.Handle) error {
		all, err := h.LinkList()
		count = len(all)
		return err
	})
	return count
}
