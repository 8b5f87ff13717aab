package oracle

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

// comparison is of one probe: what iptables did, what is wanted of Sluice (the
// same, but for the differences that are listed), what Sluice did.
type comparison struct {
	config
	probe
	both      bool // Sluice on top of iptables
	want, got outcome
}

// listed are the differences, by the anchor of their row in
// docs/compatibility.md. Each says whether it is about this probe and, if so,
// changes what is wanted. In order: a later one sees what earlier ones want.
var listed = []struct {
	id    string
	about func(x *comparison) bool
}{
	{"port-taken", portTaken},
	{"no-route", noRoute},
	{"bound-loopback", boundLoopback},
	{"loop", loop},
	{"self-6", self6},
	{"device", device},
	{"in-name", inName},
	{"in-15001", inOutboundPort},
	{"own-port", ownPort},
	{"shown-source", shownSource},
	{"names", names},
}

// judge says whether Sluice did what it should, and which listed differences
// that took.
func judge(c config, p probe, both bool, iptables, got outcome) (ok bool, want outcome, ids []string) {
	x := comparison{config: c, probe: p, both: both, want: iptables, got: got}
	if p.Then.IsValid() && iptables.First != nil && got.First != nil {
		first := p
		first.Then = netip.AddrPort{}
		_, wantFirst, idsFirst := judge(c, first, both, *iptables.First, *got.First)
		if wantFirst.Result != "connected" && iptables.First.Result == "connected" {
			x.want = outcome{Result: "not tried"}
		}
		x.want.First = &wantFirst
		ids = idsFirst
		x.probe.To = p.Then
	}
	for _, l := range listed {
		before := x.want
		if l.about(&x); !x.want.equal(before) {
			ids = append(ids, l.id)
		}
	}
	return x.got.equal(x.want), x.want, ids
}

func (x *comparison) toLocal() bool {
	a := x.To.Addr()
	return a.IsLoopback() || a.IsUnspecified() || slices.Contains(own, a) || a == lo[4]
}

// captured: from the pod, by the proxy in place of who was called.
func (x *comparison) captured() bool {
	return x.From == inPod && !x.UDP && strings.HasPrefix(x.want.By, "proxy:") && x.want.Peer != x.want.ByName
}

// primary is the address that a pod's captured connections show as their source.
func (x *comparison) primary() netip.Addr {
	if x.To.Addr().Is4() {
		return own[0]
	}
	return own[4]
}

// portTaken: REDIRECT finds the client's port taken on the proxy's address, and
// gives it another one.
func portTaken(x *comparison) bool {
	was, taken := strings.CutSuffix(x.want.ByPeer, " other")
	if taken {
		x.want.ByPeer = was + " p"
	}
	return taken
}

func noRoute(x *comparison) bool {
	if !slices.Contains(lost, x.To.Addr()) || x.want.Result != "ENETUNREACH" || x.got.Result != "connected" {
		return false
	}
	x.want = outcome{Result: "connected", By: "proxy:out", Name: x.primary().String() + " p", Peer: x.To.String(), OrigDst: x.To.String()}
	x.want.ByPeer, x.want.ByName = x.want.Name, netip.AddrPortFrom(loopbackOf(x.To.Addr()), x.Rules.OutboundPort).String()
	return true
}

// boundLoopback: an IPv4 socket bound to 127.0.0.0/8 cannot leave the pod, and
// is captured all the same.
func boundLoopback(x *comparison) bool {
	if !x.Source.IsValid() || !x.Source.IsLoopback() || x.want.Result != "EINVAL" || x.got.Result != "connected" {
		return false
	}
	x.want = outcome{Result: "connected", By: "proxy:out", Name: x.Source.String() + " p", Peer: x.To.String(), OrigDst: x.To.String()}
	x.want.ByPeer, x.want.ByName = x.want.Name, netip.AddrPortFrom(loopbackOf(x.To.Addr()), x.Rules.OutboundPort).String()
	return true
}

// loop: the proxy, or who calls from its source, calls its own ports.
func loop(x *comparison) bool {
	port := x.To.Port()
	if x.From != inPod || x.UDP || !x.toLocal() || port != x.Rules.OutboundPort && port != x.Rules.InboundPort || slices.Contains(x.Rules.ExcludeOutboundPorts, port) {
		return false
	}
	if !x.Rules.IsProxy(uint32(x.ID.UID), uint32(x.ID.GID)) && x.Source != netip.MustParseAddr("127.0.0.6") && x.Source != netip.MustParseAddr("::6") {
		return false
	}
	x.want = outcome{Result: "ECONNREFUSED", First: x.want.First}
	return true
}

// self6: who calls ::6 without a source gets ::6 itself as one, so that to
// iptables it is the proxy calling the app.
func self6(x *comparison) bool {
	if x.UDP || x.To.Addr() != lo[4] || x.Source.IsValid() || x.got.By != "proxy:in" || !x.Rules.IsProxy(uint32(x.ID.UID), uint32(x.ID.GID)) {
		return false
	}
	x.want.By, x.want.ByName = "proxy:in", netip.AddrPortFrom(loopbackOf(x.To.Addr()), x.Rules.InboundPort).String()
	return true
}

// device: no answer in either way; over IPv6 the kernel says so at once.
func device(x *comparison) bool {
	if x.Device == "" || x.want.Result != "timed out" || x.To.Addr().Is4() || x.got.Result != "ENETUNREACH" {
		return false
	}
	x.want.Result = "ENETUNREACH"
	return true
}

func inName(x *comparison) bool {
	if x.both || x.From == inPod || x.want.By != "proxy:in" {
		return false
	}
	x.want.ByName = x.To.String()
	return true
}

func inOutboundPort(x *comparison) bool {
	if x.both || x.From == inPod || x.want.By != "proxy:in" || x.To.Port() != x.Rules.OutboundPort {
		return false
	}
	x.want.OrigDst = "ENOENT"
	return true
}

func ownPort(x *comparison) bool {
	if x.From != inPod || x.want.By != "proxy:out" || x.UDP || !x.toLocal() || x.captured() {
		return false
	}
	x.want.OrigDst = "ENOENT"
	return true
}

// shownSource: iptables leaves the source that the route gives; Sluice shows the
// pod's first address or, of a call to an own address, that one.
func shownSource(x *comparison) bool {
	if !x.captured() || x.Source.IsValid() {
		return false
	}
	shown := x.primary()
	if x.toLocal() {
		shown = x.To.Addr()
	}
	if shown.IsLoopback() || shown == lo[4] {
		return false
	}
	x.want.Name, x.want.ByPeer = shown.String()+" p", shown.String()+" p"
	return true
}

// names: the proxy's own end of a captured connection.
func names(x *comparison) bool {
	if !x.captured() || x.To.Addr().Is6() || x.want.By != "proxy:out" {
		return false
	}
	address, port, _ := strings.Cut(x.want.ByName, ":")
	if address != "127.0.0.1" {
		return false
	}
	x.want.ByName = "booked:" + port
	if x.Source.IsValid() {
		x.want.ByName = "announced:" + port
	}
	return true
}

func loopbackOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return lo[0]
	}
	return lo[3]
}

func TestEveryListedDifferenceIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listed {
		if !strings.Contains(string(text), `<a id="`+l.id+`"></a>`) {
			t.Errorf("docs/compatibility.md has no row with the anchor %q", l.id)
		}
	}
}
