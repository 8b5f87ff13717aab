package netns

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// The proxy binds ::6 to call the app over IPv6, and reaches it without being
// captured. Enrolment adds the address, and removes only what it added.
func TestTheProxyCallsTheAppFromItsOwnLoopbackAddress(t *testing.T) {
	d := kit.Datapath(t)
	for name, source := range map[string]netip.AddrPort{
		"IPv4": netip.MustParseAddrPort("127.0.0.6:0"),
		"IPv6": netip.MustParseAddrPort("[::6]:0"),
	} {
		for _, there := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				p := kit.NewPod(t)
				if there {
					p.AddAddr("lo", netip.MustParsePrefix("::6/128"))
				}
				family, pod, wildcard := unix.AF_INET, kit.Pod4, "0.0.0.0"
				if source.Addr().Is6() {
					family, pod, wildcard = unix.AF_INET6, kit.Pod6, "[::]"
				}
				app := p.Listen(kit.App, at(wildcard, 8080))
				call := func() error {
					c, err := p.Dial(kit.Proxy, family, ap(pod, 8080), kit.Bind(source))
					if err != nil {
						return err
					}
					a := app.MustAccept()
					if a.Peer().Addr() != source.Addr() {
						t.Errorf("the app's peer is %v, want %v", a.Peer(), source.Addr())
					}
					kit.Exchange(t, c, a, 1<<16)
					return nil
				}
				usable := there || source.Addr().Is4()
				if err := call(); usable != (err == nil) {
					t.Errorf("without Sluice: %v", err)
				}
				p.Enroll(d)
				if err := call(); err != nil {
					t.Error("enrolled:", err)
				}
				if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
					t.Fatal(err)
				}
				if err := call(); usable && err != nil || !usable && !errors.Is(err, unix.EADDRNOTAVAIL) {
					t.Errorf("un-enrolled again: %v", err)
				}
			})
		}
	}
}
