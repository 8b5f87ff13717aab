package demo

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// equal tells a result: what was expected must be what was got.
func (n *node) equal(name, expected, got string) {
	n.tell(message{Result: &Result{Name: name, Expected: expected, Got: got, OK: expected == got}})
}

// families calls show for IPv4 and, if there is any, for IPv6.
func (n *node) families(show func(name string, v6 bool)) {
	show("IPv4", false)
	if n.ipv6 {
		show("IPv6", true)
	}
}

func directly(to netip.AddrPort) string   { return fmt.Sprintf("direct to %s, content intact", to) }
func byTheProxy(to netip.AddrPort) string { return fmt.Sprintf("by HAProxy to %s, content intact", to) }

// trip is one connection, as seen from everywhere.
type trip struct {
	client  called
	server  served  // zero if it did not get there
	carried carried // zero if the proxy did not carry it
	direct  bool
}

// call makes a connection and gathers what everybody saw of it.
func (n *node) call(ctx context.Context, from place, to *server, addr netip.AddrPort) trip {
	t := trip{client: n.client(ctx, from, addr.String())}
	if t.client.Error != "" {
		return t
	}
	t.server, _ = to.said.await(ctx, func(s served) bool { return s.ID == t.client.ID })
	t.direct = t.server.Peer == t.client.Local
	bySource := func(c carried) bool { return c.Src == t.client.Local }
	if t.direct {
		t.carried, _ = n.proxy.log.find(bySource)
	} else {
		t.carried, _ = n.proxy.log.await(ctx, bySource)
	}
	return t
}

// way says in a few words how a connection got where, in the words of directly
// and byTheProxy.
func (t trip) way() string {
	switch {
	case t.client.Refused:
		return "refused"
	case t.client.Error != "":
		return t.client.Error
	case !t.server.Local.IsValid():
		return "another server answered"
	case t.client.Sent != t.server.Received || t.client.Received != t.server.Sent:
		return fmt.Sprintf("to %s, but the content was changed", t.server.Local)
	}
	proxied := t.carried.Src.IsValid()
	switch {
	case t.direct && !proxied:
		return directly(t.server.Local)
	case !t.direct && proxied && t.carried.Up >= payloadSize && t.carried.Down >= payloadSize:
		return byTheProxy(t.server.Local)
	case t.direct:
		return fmt.Sprintf("to %s, directly and by HAProxy", t.server.Local)
	}
	return fmt.Sprintf("to %s from %s, and not seen by HAProxy", t.server.Local, t.server.Peer)
}

func (n *node) inWeb() place { return place{n.web.ns, appUID} }
func (n *node) inFar() place { return place{n.far.ns, appUID} }

func (n *node) outbound(ctx context.Context, v6 bool, port uint16) (trip, netip.AddrPort) {
	to := netip.AddrPortFrom(n.far.addr(v6), port)
	return n.call(ctx, n.inWeb(), n.server, to), to
}

func (n *node) inbound(ctx context.Context, v6 bool, port uint16) (trip, netip.AddrPort) {
	to := netip.AddrPortFrom(n.web.addr(v6), port)
	return n.call(ctx, n.inFar(), n.app, to), to
}

// both shows one outbound and one inbound connection of each family.
func (n *node) both(ctx context.Context, suffix string, expect func(netip.AddrPort) string) {
	n.families(func(family string, v6 bool) {
		t, to := n.outbound(ctx, v6, appPort)
		n.equal(family+" outbound"+suffix, expect(to), t.way())
		t, to = n.inbound(ctx, v6, appPort)
		n.equal(family+" inbound"+suffix, expect(to), t.way())
	})
}

func (n *node) before(ctx context.Context) error {
	n.step("Without Sluice, with the proxy already running")
	n.both(ctx, ", before", directly)
	return nil
}

// captured shows the way of captured connections, and the names that everybody
// on it sees.
func (n *node) captured(ctx context.Context) error {
	n.step("With Sluice: captured connections, %d KiB each way, compared by SHA-256", payloadSize>>10)
	n.families(func(family string, v6 bool) {
		web, far, proxySource := n.web.addr(v6), n.far.addr(v6), netip.MustParseAddr("127.0.0.6")
		if v6 {
			proxySource = netip.MustParseAddr("::6")
		}
		t, to := n.outbound(ctx, v6, appPort)
		name := family + " outbound"
		n.equal(name, byTheProxy(to), t.way())
		n.equal(name+", seen by the app", sees(web, to), sees(t.client.Local.Addr(), t.client.Peer))
		n.equal(name+", seen by HAProxy", carried{Src: t.client.Local, Dst: to}.String(), t.carried.String())
		n.equal(name+", seen by the server", sees(to, web), sees(t.server.Local, t.server.Peer.Addr()))

		t, to = n.inbound(ctx, v6, appPort)
		name = family + " inbound"
		n.equal(name, byTheProxy(to), t.way())
		n.equal(name+", seen by the client", sees(far, to), sees(t.client.Local.Addr(), t.client.Peer))
		n.equal(name+", seen by HAProxy", carried{Inbound: true, Src: t.client.Local, Dst: to}.String(), t.carried.String())
		n.equal(name+", seen by the app", sees(to, proxySource), sees(t.server.Local, t.server.Peer.Addr()))
	})
	return nil
}

// sees is what getsockname and getpeername said, without ports that nobody can
// foretell.
func sees[S, P interface {
	IsValid() bool
	String() string
}](self S, peer P) string {
	if !self.IsValid() || !peer.IsValid() {
		return "no connection"
	}
	return fmt.Sprintf("self %s, peer %s", self, peer)
}

func (c carried) String() string {
	way := "outbound"
	if c.Inbound {
		way = "inbound"
	}
	switch {
	case !c.Dst.IsValid():
		return "nothing"
	case !c.Src.IsValid():
		return fmt.Sprintf("%s, a connection to %s", way, c.Dst)
	}
	return fmt.Sprintf("%s, %s to %s", way, c.Src, c.Dst)
}

// direct shows what Sluice leaves alone.
func (n *node) direct(ctx context.Context) error {
	n.step("With Sluice: connections that are to be left alone")
	n.families(func(family string, v6 bool) {
		to := netip.AddrPortFrom(n.far.addr(v6), appPort)
		t := n.call(ctx, place{n.web.ns, rules.DefaultProxyID}, n.server, to)
		n.equal(family+" from the proxy's own UID", directly(to), t.way())
		t, to = n.outbound(ctx, v6, excludedOut)
		n.equal(family+" to an excluded port", directly(to), t.way())
		gateway := netip.MustParseAddr(gateway4)
		if v6 {
			gateway = netip.MustParseAddr(gateway6)
		}
		to = netip.AddrPortFrom(gateway, appPort)
		n.equal(family+" to an excluded range", directly(to), n.call(ctx, n.inWeb(), n.host, to).way())
		t, to = n.inbound(ctx, v6, excludedIn)
		n.equal(family+" inbound, excluded port", directly(to), t.way())
	})
	return nil
}

// proxyStops shows that nothing passes when nobody can judge it.
func (n *node) proxyStops(ctx context.Context) error {
	n.step("Killing HAProxy: what was captured must now be refused, and must not reach anybody")
	n.proxy.stop()
	n.families(func(family string, v6 bool) {
		const expected = "refused, 0 connections got through"
		to := netip.AddrPortFrom(n.far.addr(v6), appPort)
		n.equal(family+" outbound, no proxy", expected, n.refused(ctx, n.inWeb(), to, n.server, n.inFar()))
		to = netip.AddrPortFrom(n.web.addr(v6), appPort)
		n.equal(family+" inbound, no proxy", expected, n.refused(ctx, n.inFar(), to, n.app, n.inWeb()))
	})
	return nil
}

// refused tries a connection and counts what its server accepted all the same.
// A listener accepts in the order of arrival: once it has accepted a connection
// of a neighbour's that was made later, nothing older is still on its way.
func (n *node) refused(ctx context.Context, from place, to netip.AddrPort, at *server, neighbour place) string {
	wildcard, loopback := netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.1")
	if to.Addr().Is6() {
		wildcard, loopback = netip.IPv6Unspecified(), netip.IPv6Loopback()
	}
	listener := netip.AddrPortFrom(wildcard, to.Port())
	accepted := func(s served) bool { return s.Listener == listener && s.ID == "" }
	before := at.said.count(accepted)
	attempt := n.client(ctx, from, to.String())
	// Over lo, within its own pod: not captured.
	marker := n.client(ctx, neighbour, netip.AddrPortFrom(loopback, to.Port()).String())
	if marker.Error != "" {
		return "the server is not reachable from its own pod: " + marker.Error
	}
	at.said.await(ctx, func(s served) bool { return s.ID == marker.ID })
	through := at.said.count(accepted) - before - 1
	how := "not refused"
	switch {
	case attempt.Refused:
		how = "refused"
	case attempt.Error != "":
		how = attempt.Error
	}
	return fmt.Sprintf("%s, %d connections got through", how, through)
}

func (n *node) proxyReturns(ctx context.Context) error {
	n.step("Starting HAProxy anew: its new listeners are found by themselves")
	var err error
	if n.proxy, err = n.startProxy(ctx, n.web); err != nil {
		return err
	}
	n.both(ctx, ", proxy is back", byTheProxy)
	return nil
}
