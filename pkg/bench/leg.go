package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

var (
	outboundPort  = netip.AddrPortFrom(netip.IPv4Unspecified(), rules.DefaultOutboundPort)
	inboundPort   = netip.AddrPortFrom(netip.IPv4Unspecified(), rules.DefaultInboundPort)
	outboundPort6 = netip.AddrPortFrom(netip.IPv6Unspecified(), rules.DefaultOutboundPort)
	farPort       = netip.AddrPortFrom(netip.IPv4Unspecified(), 9090)
)

// listenersOf are where the proxy stand-in listens.
func listenersOf(w world) []netip.AddrPort {
	if w.ipv6 {
		return []netip.AddrPort{outboundPort, inboundPort, outboundPort6}
	}
	return []netip.AddrPort{outboundPort, inboundPort}
}

// leg is one way to connect: who dials what, and who accepts it where.
type leg struct {
	client, server *process
	dial, accept   netip.AddrPort
	addrs          int
	redirected     bool
	delay          time.Duration // the stand-in is slower by this: the self-check's
}

// outbound: the app dials somewhere far; without redirection, the proxy itself.
func (b *backend) outbound() leg {
	l := leg{client: b.app, server: b.proxy, dial: netip.MustParseAddrPort("198.18.0.1:80"), accept: outboundPort, addrs: addrsInUse, redirected: b.redirects()}
	if !b.redirects() {
		l.dial = netip.MustParseAddrPort("127.0.1.1:15001")
	}
	return l
}

// inbound: a far client dials the app; without redirection, the proxy itself.
func (b *backend) inbound() leg {
	l := leg{client: b.far, server: b.proxy, dial: netip.AddrPortFrom(podPrefix.Addr(), 8080), accept: inboundPort, addrs: 1, redirected: b.redirects()}
	if !b.redirects() {
		l.dial = netip.AddrPortFrom(podPrefix.Addr(), inboundPort.Port())
	}
	return l
}

// direct: the proxy's own connection to a far server, which nothing redirects.
func (b *backend) direct() leg {
	return leg{client: b.proxy, server: b.far, dial: netip.AddrPortFrom(farPrefix.Addr(), farPort.Port()), accept: farPort, addrs: 1}
}

// prove makes a few connections each way; run checks where they went.
func (b *backend) prove() error {
	for _, l := range []leg{b.outbound(), b.inbound(), b.direct()} {
		if l.client == nil || l.server == nil {
			continue
		}
		if _, err := l.run(job{Kind: jobDial, Count: 3, Size: echoBytes}); err != nil {
			return err
		}
	}
	return nil
}

// run has the client do its job while the server serves it, and checks from
// what the server was told that the connections were redirected or were not.
func (l leg) run(j job) (reply, error) {
	j.Addr, j.Addrs = l.dial, l.addrs
	serve := job{Kind: jobServe, Addr: l.accept, Count: 1, Size: j.Size, Delay: l.delay}
	switch j.Kind {
	case jobDial:
		serve.Count = j.Warm + j.Count
	case jobStream:
		serve.Kind, serve.Count, serve.Down, serve.Time = jobServeStream, j.Clients, !j.Down, j.Time
	case jobRate:
		serve.Kind = jobServeRate
	}
	if err := l.server.send(serve); err != nil {
		return reply{}, err
	}
	out, err := l.client.call(j)
	if err != nil {
		l.server.kill() // it would wait for connections for ever
	}
	served, serveErr := l.server.receive()
	if err := errors.Join(err, serveErr); err != nil {
		return reply{}, err
	}
	out.CPU += served.CPU
	out.Bytes += served.Bytes
	conns := serve.Count
	if j.Kind == jobRate {
		conns = served.Accepted
	}
	return out, l.check(served, conns)
}

func (l leg) check(served reply, conns int) error {
	if !l.redirected {
		if served.Answered > 0 {
			return fmt.Errorf("nothing should redirect %s to %s, but SO_ORIGINAL_DST answered %d times", l.dial, l.accept, served.Answered)
		}
		return nil
	}
	if served.Answered != conns {
		return fmt.Errorf("%s should be redirected to %s, but SO_ORIGINAL_DST answered only %d of %d times (%s)", l.dial, l.accept, served.Answered, conns, served.Refused)
	}
	first, last := l.dial.Addr(), served.Original.Addr()
	if served.Original.Port() != l.dial.Port() || last.Less(first) || first.As4()[3]+byte(l.addrs) <= last.As4()[3] {
		return fmt.Errorf("%s should be redirected to %s, but SO_ORIGINAL_DST said %s", l.dial, l.accept, served.Original)
	}
	return nil
}
