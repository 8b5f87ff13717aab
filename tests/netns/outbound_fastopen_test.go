package netns

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// net.ipv4.tcp_fastopen: 1 as a client, 2 as a server, 4 and 0x200 without a cookie.
const (
	fastOpenCookie   = "3"
	fastOpenNoCookie = "519"
)

// synHadData says whether the client's data was in its SYN and was taken.
func synHadData(t *testing.T, s *kit.Sock) bool {
	t.Helper()
	info, err := unix.GetsockoptTCPInfo(s.FD, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		t.Fatal("TCP_INFO:", err)
	}
	const synData = 32 // TCPI_OPT_SYN_DATA
	return info.Options&synData != 0
}

func TestOutboundByTCPFastOpen(t *testing.T) {
	d := kit.Datapath(t)
	for _, mode := range []struct {
		name, sysctl string
		first        bool // the first connection's SYN has data already
	}{{"with a cookie", fastOpenCookie, false}, {"without a cookie", fastOpenNoCookie, true}} {
		for _, f := range families {
			for _, w := range fastOpenWays {
				t.Run(mode.name+"/"+f.name+"/"+w.name, func(t *testing.T) {
					p := kit.NewPod(t)
					for _, ns := range []*kit.NS{p.NS, p.Far} {
						ns.Sysctl("ipv4/tcp_fastopen", mode.sysctl)
					}
					queue := kit.Set(unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 16)
					server := p.Far.Listen(kit.Root, at(f.wildcard, 80), queue)
					twice := func(listener *kit.Sock, check func(connected)) {
						for i := range 2 {
							c := take(t, w, dialing{p.NS, f, ap(f.far, 80), listener})
							if want := mode.first || i > 0; synHadData(t, c.client) != want {
								t.Errorf("connection %d: data in the SYN is %v, want %v", i, !want, want)
							}
							check(c)
							c.close()
						}
					}
					twice(server, func(c connected) { kit.Exchange(t, c.client, c.accepted, 1<<10) })
					p.Enroll(d)
					twice(p.Listen(kit.Proxy, at(f.wildcard, 15001), queue), func(c connected) {
						checkCaptured(t, f, c, ap(f.far, 80), f.pod)
						checkNothingReached(t, server)
						checkNoHandshakes(t, d, p)
					})
				})
			}
		}
	}
}

// A proxy that does not take data in a SYN gets it after the handshake.
func TestOutboundByTCPFastOpenToAProxyWithoutIt(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		for _, w := range fastOpenWays {
			t.Run(f.name+"/"+w.name, func(t *testing.T) {
				p := kit.NewPod(t)
				p.Sysctl("ipv4/tcp_fastopen", fastOpenNoCookie)
				p.Enroll(d)
				c := take(t, w, dialing{p.NS, f, ap(f.far, 80), p.Listen(kit.Proxy, at(f.wildcard, 15001), kit.Set(unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 0))})
				checkCaptured(t, f, c, ap(f.far, 80), f.pod)
				checkNoHandshakes(t, d, p)
			})
		}
	}
}

// The SYN waits for data that never comes: nothing was sent, nothing is left.
func TestOutboundByTCPFastOpenConnectWithoutDataLeavesNothing(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	p.Sysctl("ipv4/tcp_fastopen", fastOpenNoCookie)
	p.Enroll(d)
	f := families[0]
	s, err := p.Socket(kit.App, f.socket, kit.Set(unix.IPPROTO_TCP, tcpFastOpenConnect, 1))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.As(kit.App, func() error { return s.Start(ap(f.far, 80)) }); err != nil {
		t.Fatal("connect:", err)
	}
	checkNoHandshakes(t, d, p)
	s.Close()
	checkNoHandshakes(t, d, p)
}
