package netns

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// nameServer answers every question, and says in the answer who it is: address
// questions with its own address, TXT questions with its name. A question for
// NUMBER.big.test is answered with about as many bytes.
type nameServer struct {
	name   string
	v4, v6 netip.Addr
}

var (
	farServer   = nameServer{"far", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	proxyServer = nameServer{"proxy", netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8::2")}
)

func (n nameServer) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	question := q.Question[0]
	head := dns.RR_Header{Name: question.Name, Rrtype: question.Qtype, Class: dns.ClassINET, Ttl: 1}
	switch question.Qtype {
	case dns.TypeA:
		m.Answer = []dns.RR{&dns.A{Hdr: head, A: n.v4.AsSlice()}}
	case dns.TypeAAAA:
		m.Answer = []dns.RR{&dns.AAAA{Hdr: head, AAAA: n.v6.AsSlice()}}
	case dns.TypeTXT:
		m.Answer = []dns.RR{&dns.TXT{Hdr: head, Txt: []string{n.name}}}
		if size, ok := strings.CutSuffix(question.Name, ".big.test."); ok {
			if bytes, err := strconv.Atoi(size); err == nil {
				m.Answer = append(m.Answer, filling(head, bytes)...)
			}
		}
	}
	if e := q.IsEdns0(); e != nil {
		m.SetEdns0(e.UDPSize(), false)
		if w.RemoteAddr().Network() == "udp" {
			m.Truncate(int(e.UDPSize()))
		}
	}
	_ = w.WriteMsg(m)
}

// filling are TXT records of about so many bytes together.
func filling(head dns.RR_Header, bytes int) []dns.RR {
	var out []dns.RR
	for i := 0; bytes > 0; i++ {
		n := min(bytes, 250)
		out = append(out, &dns.TXT{Hdr: head, Txt: []string{fmt.Sprintf("%05d", i) + strings.Repeat("x", n)}})
		bytes -= n + 18 // with what is around it
	}
	return out
}

// serve starts it at an address of a namespace, UDP and TCP, until stop is
// called or the test ends.
func (n nameServer) serve(t *testing.T, ns *kit.NS, id kit.ID, at string) (stop func()) {
	t.Helper()
	servers := []*dns.Server{
		{PacketConn: ns.ListenUDP(id, at), Handler: n},
		{Listener: ns.ListenTCP(id, at), Handler: n},
	}
	var done []chan struct{}
	for _, s := range servers {
		started, ended := make(chan struct{}), make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() {
			defer close(ended)
			_ = s.ActivateAndServe()
		}()
		<-started
		done = append(done, ended)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		for i, s := range servers {
			_ = s.Shutdown()
			<-done[i]
		}
	}
	t.Cleanup(stop)
	return stop
}

// The far host's DNS servers: one that answers at all of them.
var (
	servers4 = []netip.Addr{kit.Far4, netip.MustParseAddr("10.99.0.53"), netip.MustParseAddr("10.99.0.54")}
	servers6 = []netip.Addr{kit.Far6, netip.MustParseAddr("fd99::53"), netip.MustParseAddr("fd99::54")}
)

// newDNSPod is a pod whose DNS servers are on the far host.
func newDNSPod(t *testing.T) *kit.Pod {
	t.Helper()
	p := kit.NewPod(t)
	for _, a := range servers4[1:] {
		p.Far.AddAddr("eth0", netip.PrefixFrom(a, 24))
	}
	for _, a := range servers6[1:] {
		p.Far.AddAddr("eth0", netip.PrefixFrom(a, 64))
	}
	farServer.serve(t, p.Far, kit.Root, "[::]:53")
	return p
}

// enrollDNS enrols with DNS capture.
func enrollDNS(p *kit.Pod, d *datapath.Datapath, change ...func(*datapath.Pod)) {
	with := []func(*datapath.Pod){func(pod *datapath.Pod) { pod.Rules.DNS = true }}
	p.Enroll(d, append(with, change...)...)
}

// startDNSProxy starts the DNS proxy where Istio's is.
func startDNSProxy(t *testing.T, p *kit.Pod) (stop func()) {
	t.Helper()
	stop4 := proxyServer.serve(t, p.NS, kit.Proxy, "127.0.0.1:15053")
	stop6 := proxyServer.serve(t, p.NS, kit.Proxy, "[::1]:15053")
	return func() { stop4(); stop6() }
}

// query is a TXT question, and the bytes that carry it.
func query(t *testing.T, name string) []byte {
	t.Helper()
	b, err := new(dns.Msg).SetQuestion(name, dns.TypeTXT).SetEdns0(65000, false).Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// answeredBy reads an answer, and who gives it.
func answeredBy(t *testing.T, b []byte) (id uint16, who string) {
	t.Helper()
	var m dns.Msg
	if err := m.Unpack(b); err != nil {
		t.Fatal("unpack an answer:", err)
	}
	for _, rr := range m.Answer {
		if txt, ok := rr.(*dns.TXT); ok {
			return m.Id, txt.Txt[0]
		}
	}
	t.Fatalf("no TXT record in %v", &m)
	return 0, ""
}

// asker is a UDP socket that asks DNS servers.
type asker struct {
	*kit.Sock
	t  *testing.T
	p  *kit.Pod
	id kit.ID
}

func newAsker(t *testing.T, p *kit.Pod, id kit.ID, family int, options ...kit.Option) asker {
	t.Helper()
	s, err := p.UDPSocket(id, family, options...)
	if err != nil {
		t.Fatal(err)
	}
	return asker{s, t, p, id}
}

func (a asker) connect(to netip.AddrPort) error {
	return a.p.As(a.id, func() error { return a.Connect(to) })
}

// ask sends a question to a server, or to the peer if it is not valid, and says
// who answers and from where.
func (a asker) ask(to netip.AddrPort) (who string, from netip.AddrPort, err error) {
	a.t.Helper()
	if err := a.p.As(a.id, func() error { return a.SendTo(to, query(a.t, "who.test.")) }); err != nil {
		return "", from, fmt.Errorf("send: %w", err)
	}
	b, from, err := a.RecvFrom(kit.Patience)
	if err != nil {
		return "", from, fmt.Errorf("receive: %w", err)
	}
	_, who = answeredBy(a.t, b)
	return who, from, nil
}

// dnsFamilies are the ways to name a server: by IPv4, by IPv6, and v4-mapped.
type dnsFamily struct {
	family
	servers []netip.Addr
}

var dnsFamilies = []dnsFamily{{families[0], servers4}, {families[1], servers6}, {families[2], servers4}}

func (f dnsFamily) server() netip.AddrPort { return ap(f.servers[0], 53) }

// source is the pod's address in this family.
func (f dnsFamily) source() netip.Addr { return f.pod }

// wildcardOf is the any address as a socket of this family shows it, v4-mapped
// ones unmapped.
func (f dnsFamily) any() netip.Addr {
	if f.socket == unix.AF_INET {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
