package netns

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// An address of the book is the DNS proxy's alone to answer from: who could
// choose it as a source would answer in a server's name.
func TestDNSNobodyElseAnswersFromTheAddressBook(t *testing.T) {
	d := kit.Datapath(t)
	booked := netip.MustParseAddrPort("127.192.0.1:15053")
	p := newDNSPod(t)
	for _, enrolled := range []bool{false, true} {
		want := error(nil)
		if enrolled {
			enrollDNS(p, d)
			startDNSProxy(t, p)
			want = unix.EPERM
		}
		client := newAsker(t, p, kit.App, unix.AF_INET)
		if _, _, err := client.ask(ap(kit.Far4, 53)); err != nil { // is in the book now
			t.Fatal(err)
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			s, err := p.UDPSocket(kit.App, family, kit.Bind(booked))
			if !errors.Is(err, want) {
				t.Errorf("enrolled %v, family %d: bind ends with %v, want %v", enrolled, family, err, want)
			}
			s.Close()
		}
		// Another port, or TCP, is nobody's business.
		newAsker(t, p, kit.App, unix.AF_INET, kit.Bind(ap(booked.Addr(), 15054))).Close()
		p.Listen(kit.App, booked.String()).Close()
		forger := newAsker(t, p, kit.App, unix.AF_INET, kit.Bind(netip.MustParseAddrPort("127.0.0.9:15053")))
		oob := unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: booked.Addr().As4()})
		to := &unix.SockaddrInet4{Port: int(client.Name().Port()), Addr: [4]byte{127, 0, 0, 1}}
		if err := unix.Sendmsg(forger.FD, []byte("forged"), oob, to, 0); !errors.Is(err, want) {
			t.Errorf("enrolled %v: sendmsg with IP_PKTINFO ends with %v, want %v", enrolled, err, want)
		}
		// Its own address it may use, and is shown with it.
		for _, to := range []netip.Addr{lo4, booked.Addr()} {
			if err := forger.SendTo(ap(to, int(client.Name().Port())), []byte("honest")); err != nil {
				t.Fatal(err)
			}
		}
		arrives := []string{"honest 127.0.0.9:15053", "honest 127.0.0.9:15053"}
		if !enrolled {
			arrives = append([]string{"forged 127.192.0.1:15053"}, arrives...)
		}
		for _, want := range arrives {
			got, from, err := client.RecvFrom(kit.Patience)
			if err != nil || string(got)+" "+from.String() != want {
				t.Errorf("enrolled %v: it gets %q from %v, %v; want %s", enrolled, got, from, err, want)
			}
		}
		forger.Close()
	}
}

// A socket that asked a server last is not answered in its name by a stranger
// that has the DNS proxy's port on another loopback address.
func TestDNSAStrangersDatagramIsShownAsItIs(t *testing.T) {
	d := kit.Datapath(t)
	p := newDNSPod(t)
	enrollDNS(p, d)
	startDNSProxy(t, p)
	bound := newAsker(t, p, kit.App, unix.AF_INET, kit.Bind(ap(kit.Pod4, 5353)))
	if _, from, err := bound.ask(ap(kit.Far4, 53)); err != nil || from != ap(kit.Far4, 53) {
		t.Fatalf("the answer is from %v, %v", from, err)
	}
	stranger := netip.MustParseAddrPort("127.0.0.9:15053")
	if err := newAsker(t, p, kit.App, unix.AF_INET, kit.Bind(stranger)).SendTo(ap(kit.Pod4, 5353), []byte("strange")); err != nil {
		t.Fatal(err)
	}
	if got, from, err := bound.RecvFrom(kit.Patience); err != nil || string(got) != "strange" || from != stranger {
		t.Errorf("it gets %q from %v, %v", got, from, err)
	}
}

// A full address book leaves the way by record: the answer is from the server
// asked last.
func TestDNSWithAFullAddressBook(t *testing.T) {
	d := kit.OwnDatapath(t, datapath.Options{TargetShare: 1})
	p := newDNSPod(t)
	enrollDNS(p, d)
	startDNSProxy(t, p)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		a := newAsker(t, p, kit.App, family)
		for _, s := range []netip.Addr{servers4[0], servers4[1], servers4[0], servers4[2]} {
			if who, from, err := a.ask(ap(s, 53)); err != nil || who != "proxy" || from != ap(s, 53) {
				t.Errorf("family %d: asking %v, %s answers from %v, %v", family, s, who, from, err)
			}
		}
	}
}

// Two pods ask the same server: each has a book of its own.
func TestDNSOfTwoPods(t *testing.T) {
	d := kit.Datapath(t)
	for _, servers := range [][]netip.Addr{servers4, {servers4[2], servers4[0], servers4[1]}} {
		p := newDNSPod(t)
		enrollDNS(p, d)
		startDNSProxy(t, p)
		for s, from := range newAsker(t, p, kit.App, unix.AF_INET).askAll(servers) {
			if from != ap(s, 53) {
				t.Errorf("the answer of %v is from %v", s, from)
			}
		}
	}
}
