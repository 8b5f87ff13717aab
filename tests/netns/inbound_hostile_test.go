package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// spreadOf is where a captured connect to an IPv4 destination goes from a bound
// source (spread4 in bpf/connect.c); others go to 127.192.0.1 and those after it,
// in the order of their first connects. Whoever listens exactly there must not
// get them.
func spreadOf(to netip.AddrPort) netip.Addr {
	a := to.Addr().As4()
	port := uint32(to.Port())
	h := binary.BigEndian.Uint32(a[:]) ^ (port<<16 | port)
	h ^= h >> 16
	h *= 0x7feb352d
	h ^= h >> 15
	h *= 0x846ca68b
	h ^= h >> 16
	var out [4]byte
	binary.BigEndian.PutUint32(out[:], 0x7f800000|h&0x003fffff)
	return netip.AddrFrom4(out)
}

// proxyKind is how a proxy listens on a port.
type proxyKind struct {
	name    string
	at      []string
	options []kit.Option
	inbound bool // also from the network
}

var proxyKinds = []proxyKind{
	{"both wildcards", []string{"0.0.0.0", "[::]"}, []kit.Option{kit.V6Only}, true},
	{"reuseport", []string{"[::]", "[::]"}, []kit.Option{kit.ReusePort}, true},
	{"the pod's addresses", []string{kit.Pod4.String(), "[" + kit.Pod6.String() + "]"}, nil, true},
	{"loopback", []string{"127.0.0.1", "[::1]"}, nil, false},
}

// open is nil if the address is taken.
func (k proxyKind) open(t *testing.T, p *kit.Pod, port int) (out []*kit.Sock) {
	t.Helper()
	for _, host := range k.at {
		options := k.options
		if k.name == "both wildcards" && host == "0.0.0.0" {
			options = nil
		}
		s, err := p.TryListen(kit.Proxy, at(host, port), options...)
		if errors.Is(err, unix.EADDRINUSE) {
			for _, o := range out {
				o.Close()
			}
			return nil
		}
		if err != nil {
			t.Fatal("the proxy listens:", err)
		}
		out = append(out, s)
	}
	return out
}

func TestAnotherProcessThatListensThereTakesNothing(t *testing.T) {
	d := kit.Datapath(t)
	places := []string{
		"[::1]:15006", "127.0.0.1:15006", "127.0.0.1:15001", "[::1]:15001", "0.0.0.0:15006", "0.0.0.0:15001", "[::]:15006",
		at(kit.Pod4.String(), 15006), at("["+kit.Pod6.String()+"]", 15006), at(kit.Pod4.String(), 15001),
		at(spreadOf(ap(kit.Far4, 80)).String(), 15001), at(spreadOf(ap(kit.Pod4, 8080)).String(), 15006),
		"127.192.0.1:15001", "127.192.0.2:15001", "127.192.0.1:15006", "127.192.0.2:15006",
	}
	met := 0
	for _, way := range inboundWays {
		for _, kind := range proxyKinds {
			for _, first := range []bool{false, true} {
				name := fmt.Sprint(way, "/", kind.name, "/", map[bool]string{true: "they come first", false: "the proxy comes first"}[first])
				t.Run(name, func(t *testing.T) { met += strangers(t, d, way, kind, places, first) })
			}
		}
	}
	if met < 30 {
		t.Errorf("only %d times did a stranger listen beside the proxy: the test shows little", met)
	}
}

// strangers tries one place after another, and returns at how many both could
// listen. Where the address is taken, whoever came first has it, as ever.
func strangers(t *testing.T, d *datapath.Datapath, way datapath.Inbound, kind proxyKind, places []string, first bool) (met int) {
	p := kit.NewPod(t)
	app := p.Listen(kit.App, "[::]:8080")
	server := p.Far.Listen(kit.Root, "[::]:80")
	for _, f := range families {
		direct(t, p, f, app, 8080)
		c, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
		if err != nil {
			t.Fatal("without Sluice:", err)
		}
		kit.Exchange(t, c, server.MustAccept(), 1<<10)
	}
	p.Enroll(d, inboundBy(way))
	for _, place := range places {
		var stranger *kit.Sock
		if first {
			stranger = p.Listen(kit.App, place, kit.ReusePort)
		}
		in, out := kind.open(t, p, 15006), kind.open(t, p, 15001)
		if !first {
			stranger, _ = p.TryListen(kit.App, place, kit.ReusePort)
		}
		if stranger != nil && in != nil && out != nil {
			met++
			beside(t, p, kind, place, stranger, in, out)
		}
		untouched(t, app)
		untouched(t, server)
		for _, s := range append(append(in, out...), stranger) {
			if s != nil {
				s.Close()
			}
		}
	}
	return met
}

// beside checks both directions while a stranger listens too.
func beside(t *testing.T, p *kit.Pod, kind proxyKind, place string, stranger *kit.Sock, in, out []*kit.Sock) {
	t.Helper()
	for _, f := range families {
		if kind.inbound {
			arrives(t, p, f, 8080, in...)
		} else {
			refused(t, p, f, 8080, "without a listener for the network")
		}
		for _, options := range [][]kit.Option{nil, announcing(f)} {
			captured(t, p, kit.App, f, ap(f.far, 80), options, out...)
			captured(t, p, kit.Proxy, f, ap(f.pod, 8080), options, in...) // a self-call
		}
	}
	if _, err := stranger.AcceptWithin(0); !errors.Is(err, kit.ErrNobody) {
		t.Errorf("the process that listens on %s got a connection", place)
	}
}

// captured dials from the pod and wants the proxy to get it.
func captured(t *testing.T, p *kit.Pod, id kit.ID, f family, to netip.AddrPort, options []kit.Option, listeners ...*kit.Sock) {
	t.Helper()
	client, err := p.Dial(id, f.socket, to, options...)
	if err != nil {
		t.Fatalf("dial %v: %v", to, err)
	}
	accepted, err := kit.AcceptAny(kit.Quiet, listeners...)
	if err != nil {
		t.Errorf("the proxy's part of a dial to %v: %v", to, err)
		return
	}
	if got, err := accepted.OrigDst(f.level); err != nil || got != to {
		t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, to)
	}
	kit.Exchange(t, client, accepted, 1<<10)
}

// Who dials the proxy's ports without having been captured gets there, and the
// proxy is told nothing false.
func TestADirectDialToACapturePortHasNoFalseDestination(t *testing.T) {
	d := kit.Datapath(t)
	tests := []struct {
		family int
		to     string
		level  int
		none   bool // no SO_ORIGINAL_DST at all
	}{
		{unix.AF_INET, "127.128.1.2:15001", unix.SOL_IP, true},
		{unix.AF_INET, "127.0.0.1:15001", unix.SOL_IP, true},
		{unix.AF_INET6, "127.0.0.1:15001", unix.SOL_IP, true},
		{unix.AF_INET, kit.Pod4.String() + ":15001", unix.SOL_IP, true},
		{unix.AF_INET6, "[::1]:15001", unix.SOL_IPV6, true},
		{unix.AF_INET6, "[" + kit.Pod6.String() + "]:15001", unix.SOL_IPV6, true},
		{unix.AF_INET, "127.128.1.2:15006", unix.SOL_IP, true},
		{unix.AF_INET, "127.0.0.1:15006", unix.SOL_IP, false},
		{unix.AF_INET, "127.0.0.2:15006", unix.SOL_IP, false},
		{unix.AF_INET, kit.Pod4.String() + ":15006", unix.SOL_IP, false},
		{unix.AF_INET6, "[::1]:15006", unix.SOL_IPV6, false},
		{unix.AF_INET6, "[" + kit.Pod6.String() + "]:15006", unix.SOL_IPV6, false},
	}
	p := kit.NewPod(t)
	p.Enroll(d)
	out, in := proxyListeners(p)
	for _, test := range tests {
		t.Run(test.to, func(t *testing.T) {
			to := netip.MustParseAddrPort(test.to)
			before := p.Stat(d, "refused-no-record")
			client, err := p.Dial(kit.App, test.family, to)
			if err != nil {
				t.Fatal("dial:", err)
			}
			accepted, err := kit.AcceptAny(kit.Patience, out["0.0.0.0"], out["[::]"], in["0.0.0.0"], in["[::]"])
			if err != nil {
				t.Fatal("accept:", err)
			}
			kit.Exchange(t, client, accepted, 1<<10)
			got, err := accepted.OrigDst(test.level)
			counted := p.Stat(d, "refused-no-record") - before
			switch {
			case test.none && !errors.Is(err, unix.ENOENT):
				t.Errorf("SO_ORIGINAL_DST is %v, %v; want ENOENT", got, err)
			case test.none && counted != 1:
				t.Errorf("refused-no-record counts %d, want 1", counted)
			case !test.none && (err != nil || got != to || counted != 0):
				t.Errorf("SO_ORIGINAL_DST is %v, %v, and refused-no-record counts %d; want %v and 0", got, err, counted, to)
			}
		})
	}
	if n, err := d.HandshakeUse(p.Cookie()); err != nil || n != 0 {
		t.Errorf("%d handshakes are left, %v", n, err)
	}
}
