package netns

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// A proxy that falls back to its socket's own address where SO_ORIGINAL_DST
// fails (HAProxy does) would call itself, over and over, after one direct call
// of its outbound port by anybody.
func TestTheProxyCannotCallItsOwnPorts(t *testing.T) {
	d := kit.Datapath(t)
	calls := map[string]struct {
		to      netip.AddrPort
		id      kit.ID
		options []kit.Option
	}{
		"outbound port of the pod":        {ap(kit.Pod4, 15001), kit.Proxy, nil},
		"outbound port on loopback":       {netip.MustParseAddrPort("127.0.0.1:15001"), kit.Proxy, nil},
		"outbound port, IPv6":             {ap(kit.Pod6, 15001), kit.Proxy, nil},
		"inbound port of the pod":         {ap(kit.Pod4, 15006), kit.ProxyGID, nil},
		"inbound port, from its source":   {ap(kit.Pod4, 15006), kit.Proxy, []kit.Option{kit.Bind(netip.MustParseAddrPort("127.0.0.6:0"))}},
		"outbound port, from that source": {ap(kit.Pod4, 15001), kit.App, []kit.Option{kit.Bind(netip.MustParseAddrPort("127.0.0.6:0"))}},
	}
	for name, c := range calls {
		t.Run(name, func(t *testing.T) {
			p := kit.NewPod(t)
			proxyListeners(p)
			family := unix.AF_INET
			if c.to.Addr().Is6() {
				family = unix.AF_INET6
			}
			if _, err := p.Dial(c.id, family, c.to, c.options...); err != nil {
				t.Fatal("without Sluice:", err)
			}
			p.Enroll(d)
			if _, err := p.Dial(c.id, family, c.to, c.options...); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("enrolled it ends with %v, want ECONNREFUSED", err)
			}
			if n := p.Stat(d, "refused-loop"); n != 1 {
				t.Errorf("refused-loop is %d, want 1", n)
			}
		})
	}
}
