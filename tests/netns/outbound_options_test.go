package netns

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// both returns both ends of a connection.
func both(t *testing.T, p *kit.NS, f family, to netip.AddrPort, listener *kit.Sock, options ...kit.Option) connected {
	t.Helper()
	return take(t, way{dial: plain(options...)}, dialing{p, f, to, listener})
}

func TestOutboundSOOriginalDstAtTheWrongLevelIsTheKernelsError(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			// Open before enrolment, both ends stay what they are.
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			without := both(t, p.NS, f, ap(f.far, 80), server)
			p.Enroll(d)
			c := both(t, p.NS, f, ap(f.far, 80), p.Listen(kit.Proxy, at(f.wildcard, 15001)))
			wrong := unix.SOL_IP + unix.SOL_IPV6 - f.level
			for _, size := range []int{16, 28, 32, 128} {
				for end, pair := range map[string][2]*kit.Sock{
					"proxy": {without.accepted, c.accepted}, "client": {without.client, c.client},
				} {
					_, want := pair[0].Getsockopt(wrong, kit.SOOriginalDst, size)
					if want == nil {
						t.Fatal("the kernel itself has an answer: nothing to compare with")
					}
					if got, err := pair[1].Getsockopt(wrong, kit.SOOriginalDst, size); !errors.Is(err, want) {
						t.Errorf("the %s's SO_ORIGINAL_DST at level %d with %d bytes is % x, %v; without Sluice %v", end, wrong, size, got, err, want)
					}
				}
			}
		})
	}
}

func TestOutboundSOOriginalDstIntoATooShortBufferIsAnError(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Enroll(d)
			c := both(t, p.NS, f, ap(f.far, 80), p.Listen(kit.Proxy, at(f.wildcard, 15001)))
			sizes := []int{0, 1, 8, 15}
			if f.level == unix.SOL_IPV6 {
				sizes = append(sizes, 16, 24, 27)
			}
			for _, size := range sizes {
				got, err := c.accepted.Getsockopt(f.level, kit.SOOriginalDst, size)
				// EINVAL with netfilter's own answer loaded, else it does not know the option.
				if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOPROTOOPT) {
					t.Errorf("with %d bytes: % x, %v; want EINVAL or ENOPROTOOPT", size, got, err)
				}
			}
		})
	}
}

func TestOutboundNamesOfAV6SocketAreV4MappedOnes(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	p.Enroll(d)
	f := families[2]
	// Accepted by a dual-stack listener, the proxy's end is v4-mapped as well.
	c := both(t, p.NS, f, ap(f.far, 80), p.Listen(kit.Proxy, at("[::]", 15001)))
	checkCaptured(t, f, c, ap(f.far, 80), f.pod)
	for what, name := range map[string]func(int) (unix.Sockaddr, error){"getpeername": unix.Getpeername, "getsockname": unix.Getsockname} {
		for end, s := range map[string]*kit.Sock{"client": c.client, "proxy": c.accepted} {
			sa, err := name(s.FD)
			if a, ok := sa.(*unix.SockaddrInet6); err != nil || !ok || !netip.AddrFrom16(a.Addr).Is4In6() {
				t.Errorf("%s of the %s is %+v, %v; want a v4-mapped address", what, end, sa, err)
			}
		}
	}
}

func TestOutboundToAProxyThatAcceptsByIOURing(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Enroll(d)
			listener := p.Listen(kit.Proxy, at(f.wildcard, 15001))
			client, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
			if err != nil {
				t.Fatal("dial:", err)
			}
			c := connected{client: client}
			err = p.As(kit.Proxy, func() error {
				ring, err := kit.NewRing()
				if err != nil {
					return err
				}
				defer ring.Close()
				c.accepted, c.from, err = ring.Accept(listener)
				return err
			})
			if err != nil {
				t.Fatal("accept by io_uring:", err)
			}
			checkCaptured(t, f, c, ap(f.far, 80), f.pod)
			checkNoHandshakes(t, d, p)
		})
	}
}

// MPTCP on both sides is no plain TCP in disguise.
func TestOutboundMPTCPOnBothSidesDoesNotFallBack(t *testing.T) {
	needMPTCP(t)
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Enroll(d)
			c := both(t, p.NS, f, ap(f.far, 80), p.Listen(kit.Proxy, at(f.wildcard, 15001), kit.MPTCP), kit.MPTCP)
			checkCaptured(t, f, c, ap(f.far, 80), f.pod)
			const solMPTCP, mptcpInfo, flagsAt, fallback, keyReceived = 284, 1, 8, 1, 2
			for end, s := range map[string]*kit.Sock{"client": c.client, "proxy": c.accepted} {
				info, err := s.Getsockopt(solMPTCP, mptcpInfo, 64)
				if err != nil || len(info) <= flagsAt {
					t.Fatalf("MPTCP_INFO of the %s: %d bytes, %v", end, len(info), err)
				}
				if info[flagsAt]&fallback != 0 || info[flagsAt]&keyReceived == 0 {
					t.Errorf("the %s's MPTCP flags are %#x: it fell back to TCP", end, info[flagsAt])
				}
			}
		})
	}
}
