package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/sluice-mesh/sluice/pkg/datapath"
)

// The backends. Each has namespaces and processes of its own; a later one needs
// a line in definitions and nothing in the harness.
const (
	none         = "none"
	legacy       = "iptables-legacy"
	nft          = "iptables-nft"
	sluice       = "sluice"
	sluiceNoTC   = "sluice-noguard"
	sluiceTC     = "sluice-tc"
	bystander    = "bystander" // not enrolled, but where Sluice's node programs run
	withoutHooks = "without"   // a process in a cgroup without programs
	withHooks    = "with"      // the same in a cgroup with Sluice's, not enrolled
)

const (
	proxyID = 1337
	appID   = 1000
	addrs   = 64 // destinations used in turn, alike for every backend
)

var (
	outboundPort = netip.AddrPortFrom(netip.IPv4Unspecified(), 15001)
	inboundPort  = netip.AddrPortFrom(netip.IPv4Unspecified(), 15006)
	farPort      = netip.AddrPortFrom(netip.IPv4Unspecified(), 9090)
)

type definition struct {
	name      string
	redirects bool
	meshed    bool // its processes are where Sluice's node programs run
	setUp     func(*node, *site) error
}

func iptables(kind string) func(*node, *site) error {
	return func(_ *node, s *site) error {
		command, err := restoreCommand(kind)
		if err != nil {
			return err
		}
		return restore(s.pod, command)
	}
}

func enrolled(noGuard bool, inbound datapath.Inbound) func(*node, *site) error {
	return func(n *node, s *site) error { return n.enroll(s.pod, noGuard, inbound) }
}

func definitions() []definition {
	nothing := func(*node, *site) error { return nil }
	return []definition{
		{none, false, false, nothing},
		{legacy, true, false, iptables("legacy")},
		{nft, true, false, iptables("nft")},
		{sluice, true, true, enrolled(false, datapath.InboundSKLookup)},
		{sluiceNoTC, true, true, enrolled(true, datapath.InboundSKLookup)},
		{sluiceTC, true, true, enrolled(false, datapath.InboundTC)},
		{bystander, false, true, nothing},
	}
}

// backend is a definition brought to life.
type backend struct {
	definition
	site            *site
	app, proxy, far *process
}

// start makes a backend's namespaces and processes. What it cannot have, such
// as a missing iptables, is an error that names it.
func start(ctx context.Context, def definition, n *node, cpu int) (*backend, error) {
	s, err := newSite()
	if err != nil {
		return nil, err
	}
	b := &backend{definition: def, site: s}
	if err := b.start(ctx, n, cpu); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func (b *backend) start(ctx context.Context, n *node, cpu int) error {
	if err := b.setUp(n, b.site); err != nil {
		return err
	}
	cgroup := n.plain
	if b.meshed {
		cgroup = n.mesh
	}
	var errs [3]error
	b.app, errs[0] = startWorker(ctx, b.name+"/app", b.site.pod, cgroup, Identity{appID, appID, cpu})
	b.proxy, errs[1] = startWorker(ctx, b.name+"/proxy", b.site.pod, cgroup, Identity{proxyID, proxyID, cpu})
	b.far, errs[2] = startWorker(ctx, b.name+"/far", b.site.far, n.plain, Identity{appID, appID, cpu})
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	for addr, p := range map[netip.AddrPort]*process{outboundPort: b.proxy, inboundPort: b.proxy, farPort: b.far} {
		if _, err := p.call(job{Kind: jobListen, Addr: addr}); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the processes; the namespaces go with them.
func (b *backend) Close() error {
	var errs error
	for _, p := range []*process{b.app, b.proxy, b.far} {
		if p != nil {
			errs = errors.Join(errs, p.Close())
		}
	}
	return errors.Join(errs, b.site.Close())
}

// leg is one way to connect: who dials what, and who accepts it where.
type leg struct {
	client, server *process
	dial, accept   netip.AddrPort
	addrs          int
	redirected     bool
}

// outbound: the app dials somewhere far; without redirection, the proxy itself.
func (b *backend) outbound() leg {
	l := leg{b.app, b.proxy, netip.MustParseAddrPort("198.18.0.1:80"), outboundPort, addrs, b.redirects}
	if !b.redirects {
		l.dial = netip.MustParseAddrPort("127.0.1.1:15001")
	}
	return l
}

// inbound: a far client dials the app; without redirection, the proxy itself.
func (b *backend) inbound() leg {
	l := leg{b.far, b.proxy, netip.AddrPortFrom(podPrefix.Addr(), 8080), inboundPort, 1, b.redirects}
	if !b.redirects {
		l.dial = netip.AddrPortFrom(podPrefix.Addr(), inboundPort.Port())
	}
	return l
}

// direct: the proxy's own connection to a far server, which nothing redirects.
func (b *backend) direct() leg {
	return leg{b.proxy, b.far, netip.AddrPortFrom(farPrefix.Addr(), farPort.Port()), farPort, 1, false}
}

// run has the client do its job while the server serves it, and checks from
// what the server was told that the connections were redirected or were not.
func (l leg) run(j job) (reply, error) {
	j.Addr, j.Addrs = l.dial, l.addrs
	conns := 1
	if j.Kind == jobDial {
		conns = j.Warm + j.Count
	}
	if err := l.server.send(job{Kind: jobServe, Addr: l.accept, Count: conns, Size: j.Size}); err != nil {
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
