package oracle

import (
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// place is where a probe starts.
type place string

const (
	inPod   place = "pod"
	inFar   place = "far"
	inOther place = "far2" // behind the pod's second interface
	inVM    place = "vm"   // a machine behind the pod
)

// probe is one connection, or one datagram and its answer.
type probe struct {
	From      place
	ID        kit.ID
	To        netip.AddrPort
	Then      netip.AddrPort // the same socket, after To: disconnected, connected there
	Source    netip.Addr     // bound before, if valid
	Device    string         // SO_BINDTODEVICE, if not empty
	Mapped    bool           // an AF_INET6 socket to an IPv4 address
	UDP       bool
	Sendto    bool // UDP: sendto() without connect()
	ForClient bool // the source is not the pod's: IP_TRANSPARENT
	Mark      int  // SO_MARK, if not 0
	MayVanish bool // may time out; then it is waited for less
}

func (p probe) family() int {
	if p.Mapped {
		return unix.AF_INET6
	}
	return family(p.To.Addr())
}

func family(a netip.Addr) int {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func (p probe) String() string {
	text := fmt.Sprintf("%s %d:%d -> %s", p.From, p.ID.UID, p.ID.GID, p.To)
	if p.Then.IsValid() {
		text += fmt.Sprintf(", then %s", p.Then)
	}
	if p.Source.IsValid() {
		text += fmt.Sprintf(" from %s", p.Source)
	}
	if p.Device != "" {
		text += " by " + p.Device
	}
	if p.Mark != 0 {
		text += fmt.Sprint(" mark ", p.Mark)
	}
	if p.Mapped {
		text += " v4-mapped"
	}
	switch {
	case p.Sendto:
		text += " udp sendto"
	case p.UDP:
		text += " udp"
	}
	return text
}

// outcome is what became of a probe. Ports that the kernel chose are shown as
// "p", being the client's, or "other".
type outcome struct {
	Result string // "connected", "answered" (UDP), an errno, or what else went wrong
	// What the client sees: getsockname, getpeername; of a datagram the source
	// of the answer.
	Name, Peer string
	// What who answered sees.
	By             string // "far:80", "pod:80", "proxy:out"
	ByName, ByPeer string
	OrigDst        string   // SO_ORIGINAL_DST, or its errno
	First          *outcome // of a probe with Then: the first connection's
}

func (o outcome) String() string {
	text := o.Result
	if o.By != "" {
		text += fmt.Sprintf(", name %s, peer %s; by %s, name %s, peer %s, original destination %s", o.Name, o.Peer, o.By, o.ByName, o.ByPeer, o.OrigDst)
	}
	if o.First != nil {
		text = fmt.Sprintf("[%s] then [%s]", o.First, text)
	}
	return text
}

func (o outcome) equal(other outcome) bool {
	a, b := o.First, other.First
	o.First, other.First = nil, nil
	if o != other || (a == nil) != (b == nil) {
		return false
	}
	return a == nil || a.equal(*b)
}

// The ports of every server. One has nobody: nobodyPort.
const (
	plainPort  = 80
	otherPort  = 81
	nobodyPort = 82
	loPort     = 9080 // an app on 127.0.0.1 and ::1 alone
	portDNS    = 53
	portHBONE  = 15008
)

var ports = []uint16{plainPort, otherPort, portDNS, 15001, 15006, portHBONE, 15020, 15021, 15090, 15053}

// Who probes. The groups 2000 and 2001 are for owner groups.
var (
	secondUID = kit.ID{UID: 1338, GID: 1000}
	secondGID = kit.ID{UID: 1000, GID: 1339}
	member    = kit.ID{UID: 1000, GID: 2000}
	outsider  = kit.ID{UID: 1001, GID: 2001}
	everybody = []kit.ID{kit.App, kit.Proxy, kit.ProxyUID, kit.ProxyGID, kit.Root, secondUID, secondGID, member, outsider}
)

func addrs(texts ...string) (out []netip.Addr) {
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

var (
	own     = addrs("10.99.0.2", "10.99.0.3", "10.98.0.2", "fd99::2", "fd99::3", "fd98::2")
	far     = addrs("10.99.0.1", "10.96.0.10", "fd99::1", "fd96::10") // the second of each is a service's address
	other   = addrs("10.98.0.1", "fd98::1")
	inner   = addrs("10.88.0.1", "fd88::1") // the pod's, towards the machine
	machine = addrs("10.88.0.2", "fd88::2")
	lo      = addrs("127.0.0.1", "127.0.0.2", "127.0.0.6", "::1", "::6")
	lost    = addrs("192.0.2.1", "2001:db8::1") // no route
	hole    = addrs("10.95.0.1", "fd95::1")     // who gets it says nothing
	farAll  = append(append([]netip.Addr{}, far...), other...)
)

// probes is every probe of a configuration. Slow ones, which may wait for an
// answer that does not come, only if asked.
func probes(c config, slow bool) []probe {
	var all []probe
	all = append(all, tcpOut()...)
	all = append(all, tcpEdges()...)
	all = append(all, udpOut()...)
	all = append(all, inbound()...)
	all = append(all, throughPod()...)
	all = append(all, twice()...)
	if c.byTProxy() && c.isProxy(kit.TProxy) {
		all = append(all, forClients()...)
	}
	if slow {
		all = append(all, vanishing()...)
	}
	var out []probe
	for _, p := range all {
		if p.possible(c.Families) {
			p.MayVanish = p.MayVanish || c.byTProxy() && !p.UDP && p.vanishesByTProxy(c)
			out = append(out, p)
		}
	}
	return out
}

// vanishesByTProxy: marks lead it, or its answers, nowhere (the differences "forwarded"
// and "both-hbone").
func (p probe) vanishesByTProxy(c config) bool {
	return p.through() && !c.capturesIn(p.To.Port()) || p.From == inPod && p.To.Port() == portHBONE && isLocal(p.To.Addr())
}

// through: it goes through the pod to somebody else.
func (p probe) through() bool { return p.From != inPod && !isLocal(p.To.Addr()) }

// capturesIn: is a port captured inbound?
func (c config) capturesIn(port uint16) bool {
	r, err := c.Rules.Normalise()
	if err != nil {
		return false // which whoever runs it says
	}
	if r.IncludeInboundPorts.All {
		return !slices.Contains(r.ExcludeInboundPorts, port)
	}
	return slices.Contains(r.IncludeInboundPorts.List, port)
}

// possible: a pod without a family cannot be called by it, nor bind to it.
func (p probe) possible(f families) bool {
	if f == dualStack {
		return true
	}
	has := p.To.Addr().Is4() == (f == only4)
	return has || p.From == inPod && p.Mark == 0 && !p.Source.IsValid() && p.Device == ""
}

func tcpOut() (out []probe) {
	everywhere := concat(own, inner, farAll, lo, lost)
	for _, id := range everybody {
		for _, to := range everywhere {
			out = append(out, probe{From: inPod, ID: id, To: netip.AddrPortFrom(to, plainPort)})
			if to.Is4() && (id == kit.App || id == kit.Proxy) {
				out = append(out, probe{From: inPod, ID: id, To: netip.AddrPortFrom(to, plainPort), Mapped: true})
			}
		}
	}
	for _, id := range []kit.ID{kit.App, kit.Proxy, kit.ProxyGID} {
		for _, to := range concat(own[:1], own[3:4], far[:1], far[2:3], lo[:2], lo[3:4]) {
			for _, port := range ports[1:] {
				out = append(out, probe{From: inPod, ID: id, To: netip.AddrPortFrom(to, port)})
			}
		}
	}
	return out
}

func tcpEdges() (out []probe) {
	sources := addrs("127.0.0.6", "::6", "127.0.0.1", "::1", "10.99.0.3", "fd99::3")
	for _, id := range []kit.ID{kit.App, kit.Proxy} {
		for _, source := range sources {
			for _, to := range concat(own, lo, far[:1], far[2:3]) {
				if to.Is4() != source.Is4() || to == far[2] && (source == sources[1] || source == sources[3]) {
					continue // over IPv6 the kernel sends it, and no answer finds the way
				}
				for _, port := range []uint16{plainPort, portDNS, portHBONE} {
					out = append(out, probe{From: inPod, ID: id, To: netip.AddrPortFrom(to, port), Source: source})
				}
			}
		}
		for _, to := range concat(own[:1], own[3:4], far, lo[:1], lo[3:4]) {
			out = append(out, probe{From: inPod, ID: id, To: netip.AddrPortFrom(to, nobodyPort)})
		}
		for _, to := range addrs("127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", "::") {
			out = append(out, probe{From: inPod, ID: id, To: netip.AddrPortFrom(to, loPort)})
		}
	}
	return out
}

func udpOut() (out []probe) {
	for _, id := range []kit.ID{kit.App, kit.Proxy, kit.ProxyGID, member} {
		for _, to := range concat(own[:1], own[3:4], far, other, lo[:2], lo[3:4]) {
			for _, port := range []uint16{portDNS, plainPort} {
				p := probe{From: inPod, ID: id, To: netip.AddrPortFrom(to, port), UDP: true}
				q := p
				q.Sendto = true
				out = append(out, p, q)
				if id == kit.App && to.Is4() && port == portDNS {
					p.Mapped, q.Mapped = true, true
					out = append(out, p, q)
				}
			}
		}
	}
	return out
}

func inbound() (out []probe) {
	for _, to := range own {
		from := inFar
		if to == own[2] || to == own[5] {
			from = inOther
		}
		for _, port := range append([]uint16{nobodyPort, loPort}, ports...) {
			out = append(out, probe{From: from, ID: kit.App, To: netip.AddrPortFrom(to, port)})
		}
		for _, port := range []uint16{plainPort, portDNS} {
			out = append(out, probe{From: from, ID: kit.App, To: netip.AddrPortFrom(to, port), UDP: true})
		}
	}
	return out
}

// throughPod is what the machine behind the pod sends, and is sent.
func throughPod() (out []probe) {
	for _, to := range concat(own, inner, farAll) {
		all := []uint16{plainPort, otherPort, nobodyPort, portDNS, 15001, 15006, portHBONE, 15021}
		if to == own[1] || to == own[4] || to == other[0] || to == other[1] {
			all = all[:1]
		}
		for _, port := range all {
			out = append(out, probe{From: inVM, ID: kit.App, To: netip.AddrPortFrom(to, port)})
		}
		for _, port := range []uint16{plainPort, portDNS} {
			out = append(out, probe{From: inVM, ID: kit.App, To: netip.AddrPortFrom(to, port), UDP: true})
		}
	}
	for _, to := range machine {
		for _, from := range []place{inPod, inFar, inOther} {
			p := probe{From: from, ID: kit.App, To: netip.AddrPortFrom(to, plainPort)}
			q := p
			q.UDP = true
			out = append(out, p, q)
		}
		out = append(out, probe{From: inPod, ID: kit.Proxy, To: netip.AddrPortFrom(to, plainPort)})
	}
	return out
}

// twice: what a socket's first connection was must not matter for its second.
func twice() (out []probe) {
	pairs := [][2]string{
		{"10.99.0.1:80", "10.99.0.1:81"}, {"10.99.0.1:80", "127.0.0.1:80"}, {"127.0.0.1:80", "10.99.0.1:80"},
		{"10.99.0.1:80", "10.99.0.2:80"}, {"10.99.0.2:80", "10.99.0.1:80"}, {"10.99.0.1:15008", "10.98.0.1:80"},
		{"[fd99::1]:80", "[fd99::1]:81"}, {"[fd99::1]:80", "[::1]:80"}, {"[::1]:80", "[fd99::1]:80"},
		{"[fd99::1]:80", "[fd99::2]:80"}, {"[fd99::2]:80", "[fd99::1]:80"},
	}
	for _, pair := range pairs {
		for _, id := range []kit.ID{kit.App, kit.Proxy} {
			out = append(out, probe{From: inPod, ID: id, To: netip.MustParseAddrPort(pair[0]), Then: netip.MustParseAddrPort(pair[1])})
		}
	}
	servers := [][2]string{
		{"10.99.0.1:53", "10.96.0.10:53"}, {"10.99.0.1:53", "10.99.0.1:80"}, {"10.99.0.1:80", "10.98.0.1:53"}, {"10.99.0.1:53", "127.0.0.1:53"},
		{"[fd99::1]:53", "[fd96::10]:53"}, {"[fd99::1]:53", "[fd99::1]:80"}, {"[fd99::1]:80", "[fd98::1]:53"},
	}
	for _, pair := range servers {
		p := probe{From: inPod, ID: kit.App, To: netip.MustParseAddrPort(pair[0]), Then: netip.MustParseAddrPort(pair[1]), UDP: true}
		q := p
		q.Sendto = true
		out = append(out, p, q)
	}
	return out
}

func vanishing() (out []probe) {
	add := func(p probe) {
		p.From, p.MayVanish = inPod, true
		out = append(out, p)
	}
	for _, id := range []kit.ID{kit.App, kit.Proxy} {
		for _, to := range hole {
			add(probe{ID: id, To: netip.AddrPortFrom(to, plainPort)})
		}
		for _, to := range concat(own[:1], own[3:4], lo[:1], lo[3:4], far[:1], far[2:3], other) {
			add(probe{ID: id, To: netip.AddrPortFrom(to, plainPort), Device: "eth0"})
		}
		add(probe{ID: id, To: netip.AddrPortFrom(far[2], plainPort), Source: netip.MustParseAddr("::6")})
		add(probe{ID: id, To: netip.AddrPortFrom(far[2], plainPort), Source: netip.MustParseAddr("::1")})
	}
	return out
}

func concat(lists ...[]netip.Addr) (out []netip.Addr) {
	for _, list := range lists {
		out = append(out, list...)
	}
	return out
}
