package netns

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
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
	p := kit.NewPod(t)
	p.Sysctl("ipv4/ip_forward", "1")
	p.Sysctl("ipv6/conf/all/forwarding", "1")
	p.Far.AddRoute("10.88.0.0/24", kit.Pod4)
	p.Far.AddRoute("fd88::/64", kit.Pod6)
	return p
}

// addMachine puts a machine behind the pod.
func addMachine(t *testing.T, p *kit.Pod) *kit.Pod {
	t.Helper()
	vm := &kit.Pod{NS: kit.NewNS(t, "vm"), Far: p.NS}
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

func unenroll(t *testing.T, d *datapath.Datapath, p *kit.Pod) {
	t.Helper()
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal("unenroll:", err)
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

// interfaceState is the sysctls of the interface, and the routes of the local table, to compare.
func interfaceState(t *testing.T, p *kit.Pod) (out []string) {
	t.Helper()
	for _, name := range []string{"route_localnet", "arp_announce", "rp_filter"} {
		value, err := p.ReadSysctl("ipv4/conf/" + toMachine + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, name+"="+value)
	}
	p.Netlink(func(h *netlink.Handle) error {
		routes, err := h.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		for _, r := range routes {
			if ones, _ := r.Dst.Mask.Size(); ones < 128 {
				out = append(out, r.Dst.String())
			}
		}
		return err
	})
	return out
}
