package netns

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// interfaceState is the sysctls of the interface and the prefixes that are
// local, to compare.
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

func TestReroutingLeavesNothingBehindWhicheverWayItEnds(t *testing.T) {
	ends := map[string]func(t *testing.T, d *datapath.Datapath, opts datapath.Options, p *kit.Pod){
		"un-enrolled": func(t *testing.T, d *datapath.Datapath, _ datapath.Options, p *kit.Pod) {
			if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
				t.Fatal(err)
			}
		},
		"enrolled without": func(_ *testing.T, d *datapath.Datapath, _ datapath.Options, p *kit.Pod) {
			p.Enroll(d)
		},
		"down": func(t *testing.T, _ *datapath.Datapath, opts datapath.Options, p *kit.Pod) {
			p.Hold(kit.Root) // down looks for namespaces in processes
			if _, err := datapath.Down(opts.Dir); err != nil {
				t.Fatal(err)
			}
		},
		"renamed, enrolled": func(_ *testing.T, d *datapath.Datapath, _ datapath.Options, p *kit.Pod) {
			renameLink(p, toMachine, "other0")
			p.Enroll(d, rerouting())
			renameLink(p, "other0", toMachine)
			p.Enroll(d)
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			d, opts := ownDatapath(t)
			p := newRouter(t)
			vm := addMachine(t, p)
			p.Sysctl("ipv4/conf/"+toMachine+"/arp_announce", "1")
			server := p.Far.Listen(kit.Root, "0.0.0.0:80")
			server6 := p.Far.Listen(kit.Root, "[::]:80", kit.V6Only)
			before := interfaceState(t, p)
			pod := datapath.Pod{Rules: rules.Default()}
			rerouting()(&pod)
			for range 2 {
				if _, err := d.Enroll(p.NetNS, pod); err != nil {
					t.Fatal(err)
				}
			}
			out, _ := proxyListeners(p)
			reroutedBehind(t, vm, unix.AF_INET, unix.SOL_IP, ap(kit.Far4, 80), out["0.0.0.0"])
			if cmp.Equal(before, interfaceState(t, p)) {
				t.Error("nothing was changed: then this test shows nothing")
			}
			end(t, d, opts, p)
			if diff := cmp.Diff(before, interfaceState(t, p)); diff != "" {
				t.Error("before and after:", diff)
			}
			if n := tcxPrograms(t, p, toMachine); n > 1 { // the guard may be there
				t.Errorf("%d TCX programs are left", n)
			}
			passesThrough(t, vm, unix.AF_INET, ap(kit.Far4, 80), server)
			passesThrough(t, vm, unix.AF_INET6, ap(kit.Far6, 80), server6)
			if _, err := os.Stat(filepath.Join(opts.Dir, datapath.Layout, "maps")); err != nil {
				return // all of it is gone
			}
			for table, n := range stateOf(t, opts.Dir).Entries {
				if slices.Contains([]string{"reroutes", "interfaces", "forwarded"}, table) && n != 0 {
					t.Errorf("%s has %d entries", table, n)
				}
			}
		})
	}
}

func renameLink(p *kit.Pod, from, to string) {
	p.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(from)
		if err != nil {
			return err
		}
		return errors.Join(h.LinkSetDown(l), h.LinkSetName(l, to), h.LinkSetUp(l))
	})
	if to == toMachine { // its addresses of IPv6 went with it
		p.AddAddr(toMachine, netip.PrefixFrom(inner6, 64))
	}
}

// sendFromMachine sends a packet, and says whether it, or what it makes the
// pod forward, is seen on an interface of a namespace.
func sendFromMachine(t *testing.T, vm *kit.Pod, packet []byte, at *kit.NS, link string, marker func()) bool {
	t.Helper()
	sniffer := at.Sniff(link)
	defer sniffer.Close()
	if err := vm.SendFrame(toMachine, packet); err != nil {
		t.Fatal("send:", err)
	}
	marker()
	return sniffer.SawBefore(handMade, "and then")
}

func TestWhatCannotBeReroutedIsDropped(t *testing.T) {
	d := kit.Datapath(t)
	const tcp = unix.IPPROTO_TCP
	src4, dst4, src6, dst6 := machine4, kit.Far4, machine6, kit.Far6
	tcp4 := kit.Segment(ap(src4, 4711), ap(dst4, 80), kit.SYN, handMade)
	tcp6 := kit.Segment(ap(src6, 4711), ap(dst6, 80), kit.SYN, handMade)
	fragment6 := func(offset byte) []byte {
		return kit.IP(src6, dst6, 44, append([]byte{tcp, 0, 5, offset, 0, 0, 0, 1}, tcp6...))
	}
	for _, tt := range []struct {
		name   string
		packet []byte
		stops  bool
	}{
		{"first fragment", kit.Fragment(kit.IP(src4, dst4, tcp, tcp4), 0, true), true},
		{"later fragment", kit.Fragment(kit.IP(src4, dst4, tcp, tcp4), 1480, false), true},
		{"later fragment of UDP", kit.Fragment(kit.IP(src4, dst4, unix.IPPROTO_UDP, tcp4), 1480, false), false},
		{"later IPv6 fragment", fragment6(0xc8), true},
		{"an ACK of a connection from outside", kit.IP(src4, dst4, tcp, kit.Segment(ap(src4, 4711), ap(dst4, 80), kit.ACK, handMade)), false},
		{"a SYN and ACK", kit.IP(src6, dst6, tcp, kit.Segment(ap(src6, 4711), ap(dst6, 80), kit.SYN|kit.ACK, handMade)), false},
		{"IPv4 in IPv4", kit.IP(src4, dst4, unix.IPPROTO_IPIP, kit.IP(src4, dst4, tcp, tcp4)), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newRouter(t)
			vm := addMachine(t, p)
			if err := ping(vm.NS, unix.AF_INET, kit.Far4); err != nil { // and the neighbours know each other
				t.Fatal(err)
			}
			marker := func() {
				datagram := kit.IP(src4, dst4, unix.IPPROTO_UDP, kit.Datagram(ap(src4, 9), ap(dst4, 9), "and then"))
				if err := vm.SendFrame(toMachine, datagram); err != nil {
					t.Fatal(err)
				}
			}
			if err := ping(vm.NS, unix.AF_INET6, kit.Far6); err != nil {
				t.Fatal(err)
			}
			if !sendFromMachine(t, vm, tt.packet, p.Far, "eth0", marker) {
				t.Fatal("without Sluice it does not arrive")
			}
			p.Enroll(d, rerouting())
			if sendFromMachine(t, vm, tt.packet, p.Far, "eth0", marker) == tt.stops {
				t.Errorf("arrives: %v, want %v", tt.stops, !tt.stops)
			}
			if counted := p.Stat(d, notRerouted); (counted == 1) != tt.stops {
				t.Errorf("%d are counted as %s", counted, notRerouted)
			}
		})
	}
}

// With route_localnet the kernel takes packets to 127.0.0.0/8 from a wire.
func TestThePodsLoopbackIsNotOpenToAMachine(t *testing.T) {
	d := kit.Datapath(t)
	p := newRouter(t)
	vm := addMachine(t, p)
	lo := netip.MustParseAddr("127.0.0.1")
	fd := raw(t, p, unix.AF_INET, unix.SOCK_DGRAM)
	if err := unix.Bind(fd, sockaddrOf(ap(lo, 5353))); err != nil {
		t.Fatal(err)
	}
	tv := unix.NsecToTimeval(kit.Patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	packets := [][]byte{
		kit.IP(machine4, lo, unix.IPPROTO_UDP, kit.Datagram(ap(machine4, 1), ap(lo, 5353), "from outside")),
		kit.IP(lo, lo, unix.IPPROTO_UDP, kit.Datagram(ap(lo, 1), ap(lo, 5353), "from outside")),
	}
	marker := func() { // a datagram that comes over lo
		err := p.Do(func() error {
			return unix.Sendto(fd, []byte("and then"), 0, sockaddrOf(ap(lo, 5353)))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	gets := func() (out []string) {
		for {
			buf := make([]byte, 100)
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				t.Fatal("receive:", err)
			}
			if out = append(out, string(bytes.TrimRight(buf[:n], "\x00"))); out[len(out)-1] == "and then" {
				return out
			}
		}
	}
	send := func() {
		for _, packet := range packets {
			if err := vm.SendFrame(toMachine, packet); err != nil {
				t.Fatal(err)
			}
		}
	}
	localnet := "ipv4/conf/" + toMachine + "/route_localnet"
	p.Sysctl(localnet, "1")
	send()
	marker()
	if got := gets(); !slices.Contains(got, "from outside") {
		t.Fatalf("without Sluice, and with route_localnet, none arrives: then this test shows nothing (%v)", got)
	}
	p.Sysctl(localnet, "0")

	p.Enroll(d, rerouting())
	send()
	marker()
	if got := gets(); slices.Contains(got, "from outside") {
		t.Error("a machine's packet reaches the pod's loopback")
	}
	if n := p.Stat(d, notRerouted); n != uint64(len(packets)) {
		t.Errorf("%d are counted, want %d", n, len(packets))
	}
	// Nor does the pod's loopback reach out.
	sniffer := vm.Sniff(toMachine)
	err := p.Do(func() error { return unix.Sendto(fd, []byte(handMade), 0, sockaddrOf(ap(machine4, 9))) })
	if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINVAL) {
		t.Fatal("send from 127.0.0.1:", err)
	}
	back := &kit.Pod{NS: p.NS, Far: vm.NS}
	if err := back.SendFrame(toMachine, kit.IP(inner4, machine4, unix.IPPROTO_UDP, kit.Datagram(ap(inner4, 9), ap(machine4, 9), "and then"))); err != nil {
		t.Fatal(err)
	}
	if sniffer.SawBefore(handMade, "and then") {
		t.Error("a packet with a source of 127.0.0.0/8 is on the wire")
	}
}

// A machine that asks by ARP for nobody (its neighbours are fixed) has to be
// asked for: not from an address of 127.0.0.0/8, which it would not answer.
func TestARerouterAsksForTheMachineFromAnAddressOfItsOwn(t *testing.T) {
	d := kit.Datapath(t)
	p := newRouter(t)
	vm := addMachine(t, p)
	server := p.Far.Listen(kit.Root, "0.0.0.0:80")
	var gateway *netlink.LinkAttrs
	p.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(toMachine)
		if err == nil {
			gateway = l.Attrs()
		}
		return err
	})
	vm.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(toMachine)
		if err != nil {
			return err
		}
		return h.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: inner4.AsSlice(), HardwareAddr: gateway.HardwareAddr, State: unix.NUD_PERMANENT})
	})
	forget := func() {
		p.Netlink(func(h *netlink.Handle) error {
			err := h.NeighDel(&netlink.Neigh{LinkIndex: gateway.Index, IP: machine4.AsSlice()})
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			return err
		})
	}
	forget()
	passesThrough(t, vm, unix.AF_INET, ap(kit.Far4, 80), server)
	p.Enroll(d, rerouting())
	out, _ := proxyListeners(p)
	forget()
	reroutedBehind(t, vm, unix.AF_INET, unix.SOL_IP, ap(kit.Far4, 80), out["0.0.0.0"])
}

func TestReroutingIsRefusedWhereItCouldNotHold(t *testing.T) {
	d := kit.Datapath(t)
	for want, change := range map[string]func(*datapath.Pod){
		"no machine is behind it": func(p *datapath.Pod) { p.Rules.RerouteInterfaces = []string{"lo"} },
		"without the guard":       func(p *datapath.Pod) { p.NoGuard = true },
	} {
		p := newRouter(t)
		pod := datapath.Pod{Rules: rules.Default()}
		pod.Rules.RerouteInterfaces = []string{toMachine}
		change(&pod)
		if _, err := d.Enroll(p.NetNS, pod); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error is %v, and does not say %q", err, want)
		}
		if _, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80)); !errors.Is(err, unix.ECONNREFUSED) || p.Stat(d, "captured-out") != 0 {
			t.Errorf("after the refusal: %v, %d captured", err, p.Stat(d, "captured-out"))
		}
	}
}

func TestAMachineThatFillsTheAddressBookIsRefused(t *testing.T) {
	d := kit.OwnDatapath(t, datapath.Options{TargetShare: 2})
	p := newRouter(t)
	vm := addMachine(t, p)
	server := p.Far.Listen(kit.Root, "0.0.0.0:82")
	passesThrough(t, vm, unix.AF_INET, ap(kit.Far4, 82), server)
	p.Enroll(d, rerouting())
	out, _ := proxyListeners(p)
	for _, port := range []int{80, 81} {
		reroutedBehind(t, vm, unix.AF_INET, unix.SOL_IP, ap(kit.Far4, port), out["0.0.0.0"])
	}
	client, err := vm.Socket(kit.App, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(client.FD, true); err != nil {
		t.Fatal(err)
	}
	if err := client.Start(ap(kit.Far4, 82)); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal("dial:", err)
	}
	kit.Eventually(t, "the SYN is refused", func() bool { return p.Stat(d, "refused-table-full") > 0 })
	for _, l := range []*kit.Sock{server, out["0.0.0.0"]} {
		if _, err := l.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
			t.Error("somebody got the connection")
		}
	}
	reroutedBehind(t, vm, unix.AF_INET, unix.SOL_IP, ap(kit.Far4, 80), out["0.0.0.0"]) // known ones work on
}

// Nobody but the proxy gets what a machine sends, and a proxy that listens on
// loopback gets it no more than with iptables.
func TestAMachineIsConnectedToTheProxyAlone(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range machineFamilies {
		for name, who := range map[string]struct {
			id    kit.ID
			where string
		}{
			"a stranger's listener":   {kit.App, at(f.wildcard, 15001)},
			"the proxy's on loopback": {kit.Proxy, at(map[string]string{"IPv4": "127.0.0.1", "IPv6": "[::1]"}[f.name], 15001)},
		} {
			t.Run(f.name+"/"+name, func(t *testing.T) {
				p := newRouter(t)
				vm := addMachine(t, p)
				server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
				passesThrough(t, vm, f.socket, ap(f.far, 80), server)
				p.Enroll(d, rerouting())
				listener := p.Listen(who.id, who.where)
				if _, err := vm.Dial(kit.App, f.socket, ap(f.far, 80)); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("the dial ends with %v, want ECONNREFUSED", err)
				}
				if _, err := listener.AcceptWithin(0); !errors.Is(err, kit.ErrNobody) {
					t.Error("it got the connection")
				}
				if n := p.Stat(d, "refused-no-listener"); n == 0 {
					t.Error("it is not counted")
				}
			})
		}
	}
}

func TestAMachinesIPv6IsDroppedWhereThePodHasNone(t *testing.T) {
	d := kit.Datapath(t)
	p := newRouter(t)
	vm := addMachine(t, p)
	server := p.Far.Listen(kit.Root, "0.0.0.0:80")
	passesThrough(t, vm, unix.AF_INET, ap(kit.Far4, 80), server)
	p.Sysctl("ipv6/conf/all/disable_ipv6", "1")
	p.Enroll(d, rerouting())
	out, _ := proxyListeners(p)
	reroutedBehind(t, vm, unix.AF_INET, unix.SOL_IP, ap(kit.Far4, 80), out["0.0.0.0"])
	if err := vm.SendFrame(toMachine, handMadeSYN(machine6, kit.Far6)); err != nil {
		t.Fatal(err)
	}
	kit.Eventually(t, "the SYN is dropped", func() bool { return p.Stat(d, notRerouted) == 1 })
}

// The kernel says of such a call that it comes in by the machine's interface.
func TestThePodCallsItsOwnAddressOnAReroutedInterface(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range machineFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := newRouter(t)
			addMachine(t, p)
			app := p.Listen(kit.App, at(f.wildcard, 8080))
			calls := func(when string) {
				t.Helper()
				sources := []netip.Addr{{}}
				if f.socket == unix.AF_INET {
					sources = append(sources, netip.MustParseAddr("127.0.0.6"))
				}
				for _, source := range sources {
					var from []kit.Option
					if source.IsValid() {
						from = append(from, kit.Bind(netip.AddrPortFrom(source, 0)))
					}
					client, err := p.Dial(kit.App, f.socket, ap(f.inner, 8080), from...)
					if err != nil {
						t.Errorf("%s, from %v: %v", when, source, err)
						continue
					}
					kit.Exchange(t, client, app.MustAccept(), 1000)
				}
			}
			calls("without Sluice")
			p.Enroll(d, rerouting())
			calls("enrolled")
		})
	}
}
