package netns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// connected is both ends of a connection, and the address that accept() gave.
type connected struct {
	client, accepted *kit.Sock
	from             netip.AddrPort
}

func (c connected) close() {
	c.client.Close()
	c.accepted.Close()
}

// take dials in a way and accepts.
func take(t *testing.T, w way, d dialing) connected {
	t.Helper()
	client, err := w.dial(d)
	if err != nil {
		t.Fatal("dial:", err)
	}
	accepted, from, err := d.listener.AcceptFrom(kit.Patience)
	if err != nil {
		t.Fatal("accept:", err)
	}
	if w.sent {
		got := make([]byte, len(greeting))
		if err := accepted.ReadFull(got); err != nil || !bytes.Equal(got, greeting) {
			t.Fatalf("what was sent while connecting arrived as %q, %v", got, err)
		}
	}
	return connected{client, accepted, from}
}

// checkCaptured asserts everything that both ends of a captured connection can
// ask, and that content passes.
func checkCaptured(t *testing.T, f family, c connected, to netip.AddrPort, source netip.Addr) {
	t.Helper()
	if c.client.Peer() != to {
		t.Errorf("the client's peer is %v, want %v", c.client.Peer(), to)
	}
	if c.client.Name().Addr() != source || c.client.Name().Port() == 0 {
		t.Errorf("the client's name is %v, want address %v and a port", c.client.Name(), source)
	}
	if c.accepted.Peer() != c.client.Name() {
		t.Errorf("the proxy's peer is %v, want %v", c.accepted.Peer(), c.client.Name())
	}
	if c.from != c.client.Name() {
		t.Errorf("accept() gave %v, want %v", c.from, c.client.Name())
	}
	for end, s := range map[string]*kit.Sock{"proxy": c.accepted, "client": c.client} {
		for _, size := range []int{28, 32, 128} {
			checkOrigDst(t, end, s, f.level, size, to)
		}
		if f.level == unix.SOL_IP {
			checkOrigDst(t, end, s, f.level, 16, to)
		}
	}
	kit.Exchange(t, c.client, c.accepted, 1<<18)
}

func checkOrigDst(t *testing.T, end string, s *kit.Sock, level, size int, want netip.AddrPort) {
	t.Helper()
	got, err := s.Getsockopt(level, kit.SOOriginalDst, size)
	if err != nil {
		t.Errorf("the %s's SO_ORIGINAL_DST with %d bytes: %v", end, size, err)
		return
	}
	if !bytes.Equal(got, sockaddrBytes(want)) {
		t.Errorf("the %s's SO_ORIGINAL_DST with %d bytes is % x, want % x", end, size, got, sockaddrBytes(want))
	}
}

// sockaddrBytes is a struct sockaddr_in or sockaddr_in6 of an address, by its
// own family.
func sockaddrBytes(a netip.AddrPort) []byte {
	if a.Addr().Is4() {
		out := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		out = binary.BigEndian.AppendUint16(out, a.Port())
		return append(append(out, a.Addr().AsSlice()...), make([]byte, 8)...)
	}
	out := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	out = binary.BigEndian.AppendUint16(out, a.Port())
	out = append(append(out, make([]byte, 4)...), a.Addr().AsSlice()...)
	return append(out, make([]byte, 4)...)
}

// checkNoHandshakes waits until no handshake is left of the pod, nor counted.
func checkNoHandshakes(t *testing.T, d *datapath.Datapath, p *kit.Pod) {
	t.Helper()
	kit.Eventually(t, "handshakes is empty", func() bool {
		n, err := d.Handshakes()
		if err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
	if n, err := d.HandshakeUse(p.Cookie()); err != nil || n != 0 {
		t.Errorf("handshake_use is %d, %v; want 0", n, err)
	}
}

// checkNothingReached asserts that a far listener has nobody waiting. Its queue
// is filled before connect() returns: no wait is needed for what has connected.
func checkNothingReached(t *testing.T, server *kit.Sock) {
	t.Helper()
	if _, err := server.AcceptWithin(0); !errors.Is(err, kit.ErrNobody) {
		t.Error("the far server got a connection behind the proxy's back")
	}
}

func checkWays(t *testing.T, ways []way, proxy ...kit.Option) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			for _, w := range ways {
				if !w.captured {
					c := take(t, w, dialing{p.NS, f, ap(f.far, 80), server})
					kit.Exchange(t, c.client, c.accepted, 1<<10)
					c.client.Reset() // nothing is left in TIME_WAIT on a fixed port
					c.accepted.Close()
				}
			}
			p.Enroll(d)
			listener := p.Listen(kit.Proxy, at(f.wildcard, 15001), proxy...)
			for _, w := range ways {
				t.Run(w.name, func(t *testing.T) {
					dial := dialing{p.NS, f, ap(f.far, 80), listener}
					source := f.pod
					if w.source != nil {
						source = w.source(dial)
					}
					c := take(t, w, dial)
					defer c.close()
					checkCaptured(t, f, c, ap(f.far, 80), source)
					checkNothingReached(t, server)
					checkNoHandshakes(t, d, p)
				})
			}
			if _, err := server.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
				t.Error("the far server got a connection behind the proxy's back")
			}
		})
	}
}

func TestOutboundHoweverTheAppConnects(t *testing.T) { checkWays(t, ways) }

func TestOutboundOfAnMPTCPClient(t *testing.T) {
	needMPTCP(t)
	checkWays(t, mptcpWays)
}

func TestOutboundToAnMPTCPProxy(t *testing.T) {
	needMPTCP(t)
	checkWays(t, ways, kit.MPTCP)
}

func TestOutboundOfAnMPTCPClientToAnMPTCPProxy(t *testing.T) {
	needMPTCP(t)
	checkWays(t, mptcpWays, kit.MPTCP)
}

func needMPTCP(t *testing.T) {
	t.Helper()
	if features, err := datapath.Probe(); err != nil || !features.MPTCPSock {
		t.Skip("the kernel's programs cannot see an MPTCP socket (bpf_skc_to_mptcp_sock, 5.19):", err)
	}
}
