package bench

import (
	"net/netip"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

var dnsPort = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), rules.DefaultDNSPort)

func dnsSections() []section {
	return []section{{name: "dns", workloads: []string{"dns_query"}, quick: 2, open: openDNS}}
}

// openDNS: a query by UDP to a server that does not exist, answered by the proxy's
// stand-in; without redirection, a query to the stand-in itself.
func openDNS(s *stage) ([]workload, error) {
	var defs []definition
	for _, d := range append(of(definitions(), floor, rival, ours), named(definitions(), noGuard)...) {
		if d.udp {
			defs = append(defs, d)
		}
	}
	r := rules.Default()
	r.DNS = true
	f, err := s.fleet(defs, world{rules: r, noFar: true}, func(b *backend) error {
		if _, err := b.proxy.call(job{Kind: jobListenUDP, Addr: dnsPort}); err != nil {
			return err
		}
		_, err := b.queries(job{Count: 3})
		return err
	})
	if err != nil {
		return nil, err
	}
	s.closing(f.Close)
	return []workload{{name: "dns_query", backends: f.names(defs), ratios: standardRatios, slice: func(name string) (sample, error) {
		r, err := f[name].queries(job{Warm: warmEchoes, Count: turnEchoes})
		return sample{total: r.Total, cpu: {r.CPU / (warmEchoes + turnEchoes)}}, err
	}}}, nil
}

// queries are answered by the stand-in alone: the server that is asked does not
// exist, so an answer means that the query was redirected. The socket is
// connected, so an answer from another address would not arrive.
func (b *backend) queries(j job) (reply, error) {
	j.Kind, j.Size, j.Addr = jobQuery, echoBytes, netip.MustParseAddrPort("198.18.0.53:53")
	if !b.redirects() {
		j.Addr = dnsPort
	}
	if err := b.proxy.send(job{Kind: jobServeQuery, Addr: dnsPort, Count: j.Warm + j.Count, Size: j.Size}); err != nil {
		return reply{}, err
	}
	out, err := b.app.call(j)
	if err != nil {
		b.proxy.kill()
		return reply{}, err
	}
	served, err := b.proxy.receive()
	out.CPU += served.CPU
	return out, err
}
