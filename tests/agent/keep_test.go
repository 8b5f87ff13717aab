package agent

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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
