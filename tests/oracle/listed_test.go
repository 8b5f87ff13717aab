package oracle

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/rules"
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
	about func(x *comparison)
}{
	{"port-taken", portTaken},
	{"no-route", noRoute},
	{"bound-loopback", boundLoopback},
	{"loop", loop},
	{"device", device},
	{"tproxy-rerouted", tproxyRerouted},
	{"forwarded", forwarded},
	{"in-name", inName},
	{"tproxy-hbone", tproxyHBONE},
	{"tproxy-unmarked", tproxyUnmarked},
	{"tproxy-for-client", tproxyForClient},
	{"tproxy-self-name", tproxySelfName},
	{"in-15001", inOutboundPort},
	{"rerouted-name", reroutedName},
	{"own-port", ownPort},
	{"shown-source", shownSource},
	{"names", names},
	{"both-loopback", bothLoopback},
	{"both-rerouted", bothRerouted},
	{"both-hbone", bothHBONE},
	{"dns-source", dnsSource},
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
		x.To = p.Then
	}
	for _, l := range listed {
		before := x.want
		if l.about(&x); !x.want.equal(before) {
			ids = append(ids, l.id)
		}
	}
	return x.got.equal(x.want), x.want, ids
}

func (x *comparison) toLocal() bool { return isLocal(x.To.Addr()) }

// captured: from the pod, by the proxy in place of who was called.
func (x *comparison) captured() bool {
	if x.From != inPod || x.UDP || !strings.HasPrefix(x.want.By, "proxy:") {
		return false
	}
	if x.byTProxy() && x.want.By == "proxy:in" {
		return x.To.Port() != x.Rules.InboundPort
	}
	// A captured call of 127.0.0.1:15001 itself cannot be told by the addresses.
	return x.want.Peer != x.want.ByName || strings.HasPrefix(x.got.ByName, "booked:")
}

// tried: Sluice has captured it, though iptables below may have refused it.
func (x *comparison) tried() bool {
	return x.got.Result == "connected" || x.both && x.got.Result == "ECONNREFUSED"
}

// captor is who gets a captured connection, and where it listens.
func (x *comparison) captor() (by, at string) {
	by, port := "proxy:out", x.Rules.OutboundPort
	if x.Rules.DNS && x.To.Port() == portDNS {
		by, port = "proxy:dns", x.Rules.DNSPort
	}
	if x.To.Addr().Is4() {
		return by, netip.AddrPortFrom(lo[0], port).String()
	}
	return by, netip.AddrPortFrom(lo[3], port).String()
}

// primary is the address that a pod's captured connections show as their source.
func (x *comparison) primary() netip.Addr {
	if x.To.Addr().Is4() {
		return own[0]
	}
	return own[4]
}

func (x *comparison) captureFrom(source netip.Addr) {
	by, at := x.captor()
	x.want = outcome{Result: "connected", Name: source.String() + " p", Peer: x.To.String(),
		By: by, ByName: at, ByPeer: source.String() + " p", OrigDst: x.To.String(), First: x.want.First}
}

// portTaken: REDIRECT finds the client's port taken on the proxy's address, and
// gives it another one.
func portTaken(x *comparison) {
	x.want.ByPeer = strings.Replace(x.want.ByPeer, " other", " p", 1)
	if x.both {
		x.got.ByPeer = strings.Replace(x.got.ByPeer, " other", " p", 1)
	}
}

func noRoute(x *comparison) {
	if !slices.Contains(lost, x.To.Addr()) || x.want.Result != "ENETUNREACH" || !x.tried() {
		return
	}
	x.captureFrom(x.primary())
}

// boundLoopback: an IPv4 socket bound to 127.0.0.0/8 cannot leave the pod, and
// is captured all the same.
func boundLoopback(x *comparison) {
	if !x.Source.IsValid() || !x.Source.IsLoopback() || x.want.Result != "EINVAL" || !x.tried() {
		return
	}
	x.captureFrom(x.Source)
}

// loop: the proxy, or who calls from its source, calls its own ports. (With lo
// excluded, nothing that goes there is looked at.)
func loop(x *comparison) {
	forClient := x.byTProxy() && (x.ForClient || x.Mark == clientMark)
	if slices.Contains(x.Rules.ExcludeInterfaces, "lo") && !forClient {
		return
	}
	port := x.To.Port()
	if x.From != inPod || x.UDP || x.want.Result == "ENETUNREACH" || !x.toLocal() || port != x.Rules.OutboundPort && port != x.Rules.InboundPort {
		return
	}
	if slices.Contains(x.Rules.ExcludeOutboundPorts, port) && !forClient && !x.comesBack() {
		return // direct, before who calls is asked
	}
	source := x.Source
	if !source.IsValid() && x.To.Addr() == lo[4] {
		source = lo[4] // the kernel's choice
	}
	if !x.isProxy(x.ID) && source != lo[2] && source != lo[4] {
		return
	}
	x.want = outcome{Result: "ECONNREFUSED", First: x.want.First}
}

// device: no answer in either way; over IPv6 the kernel says so at once.
func device(x *comparison) {
	if x.Device == "" || x.want.Result != "timed out" || x.To.Addr().Is4() || x.got.Result != "ENETUNREACH" {
		return
	}
	x.want.Result = "ENETUNREACH"
}

// forwarded: what goes through the pod to somebody else passes by Sluice. In TPROXY
// mode Istio's rules deliver the answers of what they do not capture to the pod.
func forwarded(x *comparison) {
	lost := x.byTProxy() && x.want.Result == "timed out"
	if x.both || !x.through() || x.want.By != "proxy:in" && !lost {
		return
	}
	results, by := plainly(x.Families, x.probe, x.To)
	if by == "" {
		x.want = outcome{Result: results[0]}
		return
	}
	at := map[place][]netip.Addr{inVM: machine, inFar: {far[0], far[2]}, inOther: other}[x.From]
	client := at[0].String() + " p"
	if x.To.Addr().Is6() {
		client = at[1].String() + " p"
	}
	x.want = outcome{Result: "connected", Name: client, Peer: x.To.String(), By: by, ByName: x.To.String(), ByPeer: client, OrigDst: "ENOENT"}
}

func inName(x *comparison) {
	if x.both || x.From == inPod || x.want.By != "proxy:in" {
		return
	}
	x.want.ByName = x.To.String()
}

// tproxyHBONE: Istio's line for the tunnel's port is in a chain that TPROXY mode
// does not come by.
func tproxyHBONE(x *comparison) {
	if x.both || !x.byTProxy() || x.To.Port() != portHBONE || x.want.By != "proxy:in" {
		return
	}
	x.want.By = "pod:15008"
}

// tproxyUnmarked: a call for a client without the mark, or of a loopback address,
// gets no answer by Istio's marks, nor for a client behind an excluded interface or
// with lo excluded: the answer passes by the line that restores the mark. Sluice marks
// it itself.
func tproxyUnmarked(x *comparison) {
	passed := x.answersByExcluded()
	if x.both && x.isSelf() || !x.ForClient || x.want.Result != "timed out" || x.Mark == clientMark && !x.To.Addr().IsLoopback() && !passed {
		return
	}
	x.reachesApp(x.Source.String() + " p")
	if x.both && passed && x.want.Result == "ECONNREFUSED" {
		x.want.Result = "timed out" // Istio's marks lead refusals back, not Sluice's
	}
}

// answersByExcluded: the app's answers to a client pass by the line that leads them back.
func (x *comparison) answersByExcluded() bool {
	return slices.ContainsFunc(x.Rules.ExcludeInterfaces, func(name string) bool { return name == "eth0" || name == "lo" })
}

// tproxyForClient: Istio's lines for an identity's calls to its own pod (O3, O6) do
// not ask for the mark. The call comes back to the proxy, to be made again; over IPv4
// from a client's address nobody answers. Beside Sluice it is refused, for on loopback only
// those get to the inbound port whom Sluice has sent there; over IPv4 nobody is told.
func tproxyForClient(x *comparison) {
	if !x.byTProxy() || !x.ForClient && x.Mark != clientMark || !x.isSelf() {
		return
	}
	source := x.want.Name
	switch {
	case x.both && (x.want.By == "proxy:in" || x.ForClient && x.To.Addr().Is6() && !x.answersByExcluded()):
		x.want = outcome{Result: "ECONNREFUSED"}
		return
	case x.want.By == "proxy:in":
	case !x.both && x.ForClient && x.want.Result == "timed out":
		source = x.Source.String() + " p"
	default:
		return
	}
	x.reachesApp(source)
}

// isSelf: Istio's nat table redirects it as a call of the proxy to its own pod.
func (x *comparison) isSelf() bool {
	if slices.Contains(x.Rules.ExcludeInterfaces, "lo") || slices.Contains(x.Rules.ExcludeOutboundPorts, x.To.Port()) || x.toLoopback() {
		return false
	}
	c, what := x.Rules.Compile(), rules.Self
	id := c.UIDs[uint32(x.ID.UID)]
	if id == 0 {
		id = c.GIDs[uint32(x.ID.GID)]
	}
	if x.Rules.DNS && x.To.Port() == portDNS {
		what = rules.SelfDNS
	}
	return id&what != 0 && x.To.Port() != portHBONE
}

// reachesApp: the call gets where it is sent, from this source.
func (x *comparison) reachesApp(source string) {
	p := x.probe
	p.MayVanish = false
	results, by := plainly(x.Families, p, x.To)
	if strings.HasPrefix(by, "proxy:") && !slices.Contains([]uint16{x.Rules.OutboundPort, x.Rules.InboundPort, x.Rules.DNSPort}, x.To.Port()) {
		results, by = []string{"ECONNREFUSED"}, "" // it listens elsewhere
	}
	x.want = outcome{Result: results[0]}
	if by != "" {
		x.want = outcome{Result: results[0], Name: source, Peer: x.To.String(), By: by, ByName: x.To.String(), ByPeer: source, OrigDst: x.To.String()}
	}
}

// tproxyRerouted: the mangle table gives a machine's packets to the inbound port
// before the nat table, which alone knows of rerouted interfaces, sees them.
func tproxyRerouted(x *comparison) {
	switch {
	case !x.byTProxy() || !x.entersRerouted() || x.want.By != "proxy:in":
	case x.rerouted():
		x.want.By = "proxy:out"
	case x.toLocal():
		x.reachesApp(x.want.Name)
	}
}

// comesBack: in TPROXY mode, a call of the proxy's to its own pod which Istio's
// mangle table sends to the inbound port, whatever is excluded outbound.
func (x *comparison) comesBack() bool {
	fromProxy := x.Source == lo[2] || x.Source == lo[4] || !x.Source.IsValid() && x.To.Addr() == lo[4]
	return x.byTProxy() && x.isProxy(x.ID) && x.capturesIn(x.To.Port()) && !fromProxy && !x.toLoopback()
}

// toLoopback: to what counts as 127.0.0.1 or ::1.
func (x *comparison) toLoopback() bool {
	a := x.To.Addr()
	return a.IsUnspecified() || a == lo[3] || x.Rules.Loopback.Contains(a)
}

// tproxySelfName: in TPROXY mode the proxy sees of its own pod's calls too where
// they went.
func tproxySelfName(x *comparison) {
	if x.byTProxy() && x.From == inPod && x.want.By == "proxy:in" && x.captured() {
		x.want.ByName = x.want.OrigDst // where 0.0.0.0 was called: 127.0.0.1
	}
}

func inOutboundPort(x *comparison) {
	translated := x.both && !x.byTProxy()
	if translated || x.From == inPod || x.want.By != "proxy:in" || x.To.Port() != x.Rules.OutboundPort {
		return
	}
	x.want.OrigDst = "ENOENT"
}

func ownPort(x *comparison) {
	if x.want.By == "proxy:out" && !x.UDP && !x.captured() && !x.rerouted() {
		x.want.OrigDst = "ENOENT"
	}
}

// rerouted: from a machine behind the pod, by the proxy in place of who was called.
func (x *comparison) rerouted() bool {
	r := x.Rules.IncludeOutboundCIDRs
	return x.entersRerouted() && (r.All || holds(r.List, x.To.Addr()))
}

// entersRerouted: it comes in by a rerouted interface.
func (x *comparison) entersRerouted() bool {
	by := map[place]string{inVM: "vm0", inOther: "net1", inFar: "eth0"}[x.From]
	return !x.UDP && slices.Contains(x.Rules.RerouteInterfaces, by)
}

func holds(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// reroutedName: the proxy's own end of a machine's connection.
func reroutedName(x *comparison) {
	if x.rerouted() && x.want.By == "proxy:out" {
		x.want.ByName = fmt.Sprint("booked:", x.Rules.OutboundPort)
	}
}

// bothRerouted: Istio's P0 line takes what Sluice has sent to an address of the
// book, and redirects it to one that Sluice does not know.
func bothRerouted(x *comparison) {
	book := netip.MustParseAddr("127.192.0.1")
	if x.To.Addr().Is6() {
		book = netip.MustParseAddr("fd73:6c75:6963:6500::1")
	}
	r := x.Rules.IncludeOutboundCIDRs
	if x.both && x.rerouted() && x.want.By == "proxy:out" && (r.All || holds(r.List, book)) {
		x.want = outcome{Result: "ECONNREFUSED"}
	}
}

// shownSource: iptables leaves the source that the route gives; Sluice shows the
// pod's first address or, of a call to an own address, that one.
func shownSource(x *comparison) {
	a := x.To.Addr()
	query := x.UDP && !x.Sendto && x.want.By == "proxy:dns"
	if !x.captured() && !query || x.Source.IsValid() || a.IsLoopback() || a.IsUnspecified() {
		return
	}
	shown := x.primary()
	if x.toLocal() {
		shown = a
	}
	x.want.Name, x.want.ByPeer = shown.String()+" p", shown.String()+" p"
}

// names: the proxy's own end of a captured connection.
func names(x *comparison) {
	if !x.captured() || x.To.Addr().Is6() || x.want.By != "proxy:out" {
		return
	}
	address, port, _ := strings.Cut(x.want.ByName, ":")
	if address != "127.0.0.1" {
		return
	}
	x.want.ByName = "booked:" + port
	if x.Source.IsValid() {
		x.want.ByName = "announced:" + port
	}
}

// bothLoopback: where an include range is loopback, Istio's O4 line is left out,
// and its O13 or O14 line redirects to 127.0.0.1:15001 what Sluice has sent to
// another address, or to the DNS proxy.
func bothLoopback(x *comparison) {
	r := x.Rules
	if slices.Contains(r.ExcludeInterfaces, "lo") {
		return // Istio's lines let everything over lo pass
	}
	if !x.both || x.Source == lo[2] || !slices.ContainsFunc(r.IncludeOutboundCIDRs.List, func(p netip.Prefix) bool { return p.Addr().IsLoopback() }) {
		return
	}
	sent, ok := x.sent()
	holds := func(p netip.Prefix) bool { return p.Contains(sent.Addr()) }
	if !ok || slices.Contains(r.ExcludeOutboundPorts, sent.Port()) || holds(r.Loopback) || slices.ContainsFunc(r.ExcludeOutboundCIDRs, holds) {
		return
	}
	if slices.Contains(r.IncludeOutboundPorts, sent.Port()) || slices.ContainsFunc(r.IncludeOutboundCIDRs.List, holds) {
		x.want = outcome{Result: "ECONNREFUSED", First: x.want.First}
	}
}

// bothHBONE: the TPROXY target of Istio's rules asks for a listener at 127.0.0.1, the
// first address of lo, and Sluice lets nobody in there whom it has not sent.
func bothHBONE(x *comparison) {
	if x.both && x.byTProxy() && x.From == inPod && x.To.Port() == portHBONE && x.want.By == "proxy:in" && x.To.Addr().Is4() {
		x.want = outcome{Result: "timed out"}
	}
}

// sent is where Sluice sends a captured connection of an app over IPv4.
func (x *comparison) sent() (netip.AddrPort, bool) {
	kind, _, _ := strings.Cut(x.want.ByName, ":")
	switch {
	case x.To.Addr().Is6():
	case kind == "booked", x.To.String() == x.want.ByName && x.got.Result == "ECONNREFUSED": // captured or not looks alike
		return netip.AddrPortFrom(netip.MustParseAddr("127.192.0.1"), x.Rules.OutboundPort), true
	case kind == "announced":
		return netip.AddrPortFrom(netip.MustParseAddr("127.128.0.1"), x.Rules.OutboundPort), true
	case x.captured() && x.want.By == "proxy:dns":
		return netip.AddrPortFrom(lo[0], x.Rules.DNSPort), true
	}
	return netip.AddrPort{}, false
}

// dnsSource: what the DNS proxy sees as the source of a query over UDP. By IPv4 a
// connected socket shows the pod's address, an unconnected one the address that
// stands for the server it asks; IPv6 has one loopback address.
func dnsSource(x *comparison) {
	if !x.UDP || x.want.By != "proxy:dns" {
		return
	}
	switch {
	case x.To.Addr().Is6():
		x.want.ByPeer = "::1 p"
	case x.Sendto:
		x.want.ByPeer = "booked p"
	}
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
