package netns

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// An app calls its own pod's address freely (O4), and the proxy calls the app
// from 127.0.0.6 (O2): neither comes back to the proxy, in either inbound way.
// (The kernel says of such a SYN that it came in by the interface that has the
// address, not by lo.)
func TestOutboundToThePodsOwnAddressStaysDirect(t *testing.T) {
	d := kit.Datapath(t)
	for _, inbound := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
		for _, f := range families {
			t.Run(string(inbound)+"/"+f.name, func(t *testing.T) {
				p := kit.NewPod(t)
				app := p.Listen(kit.App, at(f.wildcard, 8080))
				callers := map[string]func() (*kit.Sock, error){
					"the app": func() (*kit.Sock, error) { return p.Dial(kit.App, f.socket, ap(f.pod, 8080)) },
				}
				if f.pod.Is4() { // ::6 is no address of lo before enrolment adds it
					callers["the proxy from 127.0.0.6"] = func() (*kit.Sock, error) {
						source := netip.MustParseAddrPort("127.0.0.6:0")
						return p.Dial(kit.Proxy, f.socket, ap(f.pod, 8080), kit.Bind(source))
					}
				}
				check := func(when string) {
					t.Helper()
					for who, dial := range callers {
						client, err := dial()
						if err != nil {
							t.Fatalf("%s, %s: %v", when, who, err)
						}
						accepted, err := app.AcceptWithin(kit.Quiet)
						if err != nil {
							t.Fatalf("%s, %s: the app's listener: %v", when, who, err)
						}
						if accepted.Peer() != client.Name() || accepted.Name() != ap(f.pod, 8080) || client.Peer() != ap(f.pod, 8080) {
							t.Errorf("%s, %s: client %v to %v, server %v to %v", when, who, client.Name(), client.Peer(), accepted.Name(), accepted.Peer())
						}
						kit.Exchange(t, client, accepted, 1<<10)
					}
				}
				check("without Sluice")
				p.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = inbound })
				_, in := proxyListeners(p)
				check("enrolled")
				for _, l := range in {
					checkNothingReached(t, l)
				}
			})
		}
	}
}

// What a captured connection showed is gone with it.
func TestOutboundASocketBoundAnewShowsItsOwnName(t *testing.T) {
	d := kit.Datapath(t)
	for _, ended := range []string{"AF_UNSPEC", "refused"} {
		for _, f := range families {
			t.Run(ended+"/"+f.name, func(t *testing.T) {
				p := kit.NewPod(t)
				p.Enroll(d)
				s, err := p.Socket(kit.App, f.socket)
				if err != nil {
					t.Fatal(err)
				}
				if ended == "AF_UNSPEC" {
					p.Listen(kit.Proxy, at(f.wildcard, 15001))
				}
				err = p.As(kit.App, func() error { return s.Connect(ap(f.far, 80)) })
				if ended == "AF_UNSPEC" {
					err = errors.Join(err, s.Disconnect())
				} else if errors.Is(err, unix.ECONNREFUSED) {
					err = nil
				}
				if err != nil {
					t.Fatal(err)
				}
				own := ap(dialing{to: ap(f.far, 80)}.loopback(), 9000)
				if err := p.As(kit.App, func() error { return s.Bind(own) }); err != nil {
					t.Fatal("bind:", err)
				}
				if s.Name() != own {
					t.Errorf("its name is %v, want %v", s.Name(), own)
				}
				if err := unix.Listen(s.FD, 1); err != nil {
					t.Fatal("listen:", err)
				}
				if s.Name() != own {
					t.Errorf("its name as a listener is %v, want %v", s.Name(), own)
				}
			})
		}
	}
}
