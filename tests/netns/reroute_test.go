package netns

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// The machine behind the pod, and the pod's address on the wire between them.
var (
	machine4 = netip.MustParseAddr("10.88.0.2")
	inner4   = netip.MustParseAddr("10.88.0.1")
	machine6 = netip.MustParseAddr("fd88::2")
	inner6   = netip.MustParseAddr("fd88::1")
)

const (
	toMachine   = "vm0" // the pod's interface
	byReroute   = "captured-rerouted"
	notRerouted = "refused-rerouted"
)

// machineFamilies are those of a machine's clients: far is dialled.
var machineFamilies = []struct {
	name         string
	socket       int
	far, machine netip.Addr
	inner        netip.Addr // the pod's address that the machine is next to
	level        int
	wildcard     string
}{
	{"IPv4", unix.AF_INET, kit.Far4, machine4, inner4, unix.SOL_IP, "0.0.0.0"},
	{"IPv6", unix.AF_INET6, kit.Far6, machine6, inner6, unix.SOL_IPV6, "[::]"},
}

// newRouter makes a pod that forwards for what is behind it.
func newRouter(t *testing.T) *kit.Pod {
	t.Helper()
	p := &kit.Pod{NS: kit.NewNS(t, "pod"), Far: kit.NewNS(t, "far")}
	noDAD(p.NS, p.Far)
	p.Wire("eth0", netip.PrefixFrom(kit.Pod4, 24), netip.PrefixFrom(kit.Far4, 24),
		netip.PrefixFrom(kit.Pod6, 64), netip.PrefixFrom(kit.Far6, 64))
	p.AddRoute("0.0.0.0/0", kit.Far4)
	p.AddRoute("::/0", kit.Far6)
	p.Sysctl("ipv4/ip_forward", "1")
	p.Sysctl("ipv6/conf/all/forwarding", "1")
	p.Far.AddRoute("10.88.0.0/24", kit.Pod4)
	p.Far.AddRoute("fd88::/64", kit.Pod6)
	return p
}

// noDAD has the interfaces to come use their IPv6 addresses at once, the
// link-local ones by which routers look for neighbours too.
func noDAD(all ...*kit.NS) {
	for _, ns := range all {
		ns.Sysctl("ipv6/conf/default/accept_dad", "0")
	}
}

// newMachine is a machine without a wire.
func newMachine(t *testing.T, p *kit.Pod) *kit.Pod {
	t.Helper()
	vm := &kit.Pod{NS: kit.NewNS(t, "vm"), Far: p.NS}
	noDAD(vm.NS)
	return vm
}

// addMachine puts a machine behind the pod.
func addMachine(t *testing.T, p *kit.Pod) *kit.Pod {
	t.Helper()
	vm := newMachine(t, p)
	vm.Wire(toMachine, netip.PrefixFrom(machine4, 24), netip.PrefixFrom(inner4, 24),
		netip.PrefixFrom(machine6, 64), netip.PrefixFrom(inner6, 64))
	vm.AddRoute("0.0.0.0/0", inner4)
	vm.AddRoute("::/0", inner6)
	return vm
}

func rerouting(change ...func(*rules.Rules)) func(*datapath.Pod) {
	return func(p *datapath.Pod) {
		p.Rules.RerouteInterfaces = []string{toMachine}
		for _, c := range change {
			c(&p.Rules)
		}
	}
}

func TestWhatAMachineBehindThePodSendsGoesToTheProxyWithItsOriginalDestination(t *testing.T) {
	d := kit.Datapath(t)
	for _, attach := range []datapath.TCAttach{datapath.Clsact, datapath.TCX} {
		for _, f := range machineFamilies {
			t.Run(string(attach)+"/"+f.name, func(t *testing.T) {
				if attach == datapath.TCX && !hasTCX(t) {
					t.Skip("this kernel has no TCX links")
				}
				p := newRouter(t)
				vm := addMachine(t, p)
				server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
				direct, err := vm.Dial(kit.App, f.socket, ap(f.far, 80))
				if err != nil {
					t.Fatal("without Sluice:", err)
				}
				kit.Exchange(t, direct, server.MustAccept(), 1<<20)

				p.Enroll(d, rerouting(), func(pod *datapath.Pod) { pod.TC = attach })
				if _, err := vm.Dial(kit.App, f.socket, ap(f.far, 80)); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("without a proxy the dial ends with %v, want ECONNREFUSED", err)
				}
				out, _ := proxyListeners(p)
				for _, to := range []netip.AddrPort{ap(f.far, 80), ap(f.far, 81), ap(f.inner, 8080)} {
					client, err := vm.Dial(kit.App, f.socket, to)
					if err != nil {
						t.Fatal("dial:", err)
					}
					accepted := out[f.wildcard].MustAccept()
					if got, err := accepted.OrigDst(f.level); err != nil || got != to {
						t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, to)
					}
					if accepted.Peer() != client.Name() || client.Name().Addr() != f.machine {
						t.Errorf("the proxy's peer is %v, want the machine's %v", accepted.Peer(), client.Name())
					}
					if client.Peer() != to {
						t.Errorf("the machine's peer is %v, want %v", client.Peer(), to)
					}
					kit.Exchange(t, client, accepted, 8<<20)
					client.Close()
					accepted.Close()
				}
				if n := p.Stat(d, byReroute); n != 3 {
					t.Errorf("%d connections are counted as %s, want 3", n, byReroute)
				}
				if _, err := server.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
					t.Error("the far server got a connection behind the proxy's back")
				}
			})
		}
	}
}

func hasTCX(t *testing.T) bool {
	t.Helper()
	features, err := datapath.Probe()
	if err != nil {
		t.Fatal(err)
	}
	return features.TCX
}

// reroutedBehind dials from the machine and expects the proxy to be told of it.
func reroutedBehind(t *testing.T, vm *kit.Pod, socket, level int, to netip.AddrPort, listener *kit.Sock) (client, accepted *kit.Sock) {
	t.Helper()
	client, err := vm.Dial(kit.App, socket, to)
	if err != nil {
		t.Fatalf("dial %v: %v", to, err)
	}
	accepted = listener.MustAccept()
	if got, err := accepted.OrigDst(level); err != nil || got != to {
		t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, to)
	}
	if accepted.Peer() != client.Name() {
		t.Errorf("the proxy's peer is %v, want the machine's %v", accepted.Peer(), client.Name())
	}
	kit.Exchange(t, client, accepted, 1<<20)
	return client, accepted
}

// passesThrough dials from the machine and expects somebody else than the proxy.
func passesThrough(t *testing.T, vm *kit.Pod, socket int, to netip.AddrPort, server *kit.Sock) {
	t.Helper()
	client, err := vm.Dial(kit.App, socket, to)
	if err != nil {
		t.Fatalf("dial %v: %v", to, err)
	}
	kit.Exchange(t, client, server.MustAccept(), 1<<16)
}

func TestOfAMachinesTrafficTheIncludesAloneDecide(t *testing.T) {
	d := kit.Datapath(t)
	lists := map[string][]netip.Prefix{
		"IPv4": prefixes("10.99.0.0/30"), "IPv6": prefixes("fd99::/126"),
	}
	excluded := prefixes("10.99.0.0/31", "fd99::/127")
	others := map[string]netip.Addr{"IPv4": netip.MustParseAddr("10.99.0.5"), "IPv6": netip.MustParseAddr("fd99::5")}
	for _, f := range machineFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := newRouter(t)
			vm := addMachine(t, p)
			other := others[f.name]
			p.Far.AddAddr("eth0", netip.PrefixFrom(other, other.BitLen()))
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			app := p.Listen(kit.App, at(f.wildcard, 8080))
			passesThrough(t, vm, f.socket, ap(f.far, 80), server)
			passesThrough(t, vm, f.socket, ap(other, 80), server)
			passesThrough(t, vm, f.socket, ap(f.inner, 8080), app)

			p.Enroll(d, kit.ByTC, rerouting(func(r *rules.Rules) {
				r.IncludeOutboundCIDRs = rules.CIDRs{List: lists[f.name]}
				r.ExcludeOutboundCIDRs = excluded // counts for the pod, not for the machine
				r.ExcludeOutboundPorts = []uint16{80}
			}))
			out, _ := proxyListeners(p)
			reroutedBehind(t, vm, f.socket, f.level, ap(f.far, 80), out[f.wildcard])
			passesThrough(t, vm, f.socket, ap(other, 80), server)
			passesThrough(t, vm, f.socket, ap(f.inner, 8080), app) // not captured inbound either

			client, err := p.Dial(kit.App, f.socket, ap(f.far, 80)) // the pod itself
			if err != nil {
				t.Fatal("dial from the pod:", err)
			}
			kit.Exchange(t, client, server.MustAccept(), 100)

			p.Enroll(d, rerouting(func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} }))
			passesThrough(t, vm, f.socket, ap(f.far, 80), server)
			passesThrough(t, vm, f.socket, ap(f.inner, 8080), app)
		})
	}
}

func TestAMachinesOtherTrafficAndItsOwnServersAreLeftAlone(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range machineFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := newRouter(t)
			vm := addMachine(t, p)
			served := vm.Listen(kit.Root, at(f.wildcard, 8080))
			check := func(when string) {
				t.Helper()
				if err := datagrams(t, vm.NS, p.Far, f.socket, f.machine, f.far); err != nil {
					t.Errorf("%s, UDP: %v", when, err)
				}
				if err := ping(vm.NS, f.socket, f.far); err != nil {
					t.Errorf("%s, ICMP: %v", when, err)
				}
				for _, from := range []*kit.NS{p.Far, p.NS} {
					client, err := from.Dial(kit.Proxy, f.socket, ap(f.machine, 8080))
					if err != nil {
						t.Fatalf("%s, dial the machine from %s: %v", when, from.Name, err)
					}
					kit.Exchange(t, client, served.MustAccept(), 1<<20)
				}
			}
			check("before enrolment")
			p.Enroll(d, rerouting())
			check("enrolled")
			out, _ := proxyListeners(p)
			reroutedBehind(t, vm, f.socket, f.level, ap(f.far, 80), out[f.wildcard])
			check("after a rerouted connection")
			if n := p.Stat(d, notRerouted); n != 0 {
				t.Errorf("%d packets are counted as %s", n, notRerouted)
			}
		})
	}
}

// ping sends an ICMP echo request and waits for the answer.
func ping(from *kit.NS, family int, to netip.Addr) error {
	return from.Do(func() error {
		protocol, request, answer := unix.IPPROTO_ICMP, byte(8), byte(0)
		if family == unix.AF_INET6 {
			protocol, request, answer = unix.IPPROTO_ICMPV6, 128, 129
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		tv := unix.NsecToTimeval(kit.Patience.Nanoseconds())
		packet := []byte{request, 0, 0, 0, 0x51, 0x51, 0, 1}
		if family == unix.AF_INET { // the kernel computes ICMPv6's
			sum := ^(uint16(request)<<8 + 0x5151 + 1)
			packet[2], packet[3] = byte(sum>>8), byte(sum)
		}
		err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.Sendto(fd, packet, 0, sockaddrOf(ap(to, 0))))
		buf := make([]byte, 200)
		for err == nil {
			var n int
			if n, err = unix.Read(fd, buf); errors.Is(err, unix.EINTR) {
				err = nil
				continue
			}
			if family == unix.AF_INET && n > 20 && buf[20] == answer || family == unix.AF_INET6 && n > 0 && buf[0] == answer {
				return nil
			}
		}
		return err
	})
}

// The far end may call the machine from an address and port that the machine
// has called: such packets look like those of a rerouted connection.
func TestAConnectionFromWhereTheMachineHasCalledIsNotRerouted(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range machineFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := newRouter(t)
			vm := addMachine(t, p)
			served := vm.Listen(kit.Root, at(f.wildcard, 8080))
			server := p.Far.Listen(kit.Root, at(f.wildcard, 8000), kit.ReusePort)
			old, err := vm.Dial(kit.App, f.socket, ap(f.far, 8000))
			if err != nil {
				t.Fatal("without Sluice:", err)
			}
			oldServer := server.MustAccept()
			server.Close()

			p.Enroll(d, rerouting())
			out, _ := proxyListeners(p)
			client, accepted := reroutedBehind(t, vm, f.socket, f.level, ap(f.far, 8000), out[f.wildcard])
			kit.Exchange(t, oldServer, old, 1<<20) // opened before: the far end speaks first

			// A stray segment, as if the far end had such a connection itself.
			stray := kit.Segment(ap(f.far, 8000), client.Name(), kit.ACK, "")
			if err := p.Far.SendRaw(kit.IP(f.far, f.machine, unix.IPPROTO_TCP, stray)); err != nil {
				t.Fatal(err)
			}
			if err := ping(p.Far, f.socket, f.machine); err != nil { // it has arrived
				t.Fatal(err)
			}
			kit.Exchange(t, client, accepted, 1<<20)

			for _, from := range []*kit.NS{p.Far, p.NS} {
				local := f.far
				if from == p.NS {
					local = f.inner
					reroutedBehind(t, vm, f.socket, f.level, ap(local, 8000), out[f.wildcard])
				}
				caller, err := from.Dial(kit.Proxy, f.socket, ap(f.machine, 8080),
					kit.Set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), kit.Bind(ap(local, 8000)))
				if err != nil {
					t.Fatalf("call the machine from port 8000 of %s: %v", from.Name, err)
				}
				answering := served.MustAccept()
				kit.Exchange(t, caller, answering, 1<<20)
				kit.Exchange(t, answering, caller, 1<<20)
				kit.Exchange(t, client, accepted, 1<<20) // the rerouted one goes on beside it
				caller.Reset()
			}
		})
	}
}

func TestAMachinesConnectionsByTheHundredFindTheirDestinations(t *testing.T) {
	d := kit.Datapath(t)
	for _, cookies := range []string{"1", "2"} {
		for _, f := range machineFamilies {
			t.Run(f.name+"/tcp_syncookies="+cookies, func(t *testing.T) {
				p := newRouter(t)
				p.Sysctl("ipv4/tcp_syncookies", cookies)
				vm := addMachine(t, p)
				server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
				passesThrough(t, vm, f.socket, ap(f.far, 80), server)
				p.Enroll(d, rerouting())
				out, _ := proxyListeners(p)
				const dials = 200
				type ends struct{ source, destination netip.AddrPort } // ports are used twice
				clients := map[ends]*kit.Sock{}
				for i := range dials {
					c, err := vm.Dial(kit.App, f.socket, ap(f.far, 1000+i))
					if err != nil {
						t.Fatal("dial:", err)
					}
					clients[ends{c.Name(), c.Peer()}] = c
				}
				for range dials {
					a := out[f.wildcard].MustAccept()
					to, err := a.OrigDst(f.level)
					c := clients[ends{a.Peer(), to}]
					if err != nil || c == nil {
						t.Fatalf("nobody dialled %v from %v; %v", to, a.Peer(), err)
					}
					kit.Exchange(t, c, a, 10)
				}
			})
		}
	}
}
