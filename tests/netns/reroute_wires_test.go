package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

func TestAMachineThatComesAfterEnrolmentReachesNobodyUntilItIsRerouted(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range machineFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := newRouter(t)
			vm := addMachine(t, p)
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			passesThrough(t, vm, f.socket, ap(f.far, 80), server)
			removeLink(p)

			p.Enroll(d, rerouting())
			out, _ := proxyListeners(p)
			vm = addMachine(t, p)
			stopped := p.Stat(d, byGuard)
			client, err := vm.Socket(kit.App, f.socket)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.SetNonblock(client.FD, true); err != nil {
				t.Fatal(err)
			}
			if err := client.Start(ap(f.far, 80)); !errors.Is(err, unix.EINPROGRESS) {
				t.Fatal("dial:", err)
			}
			kit.Eventually(t, "the guard stops the SYN", func() bool { return p.Stat(d, byGuard) > stopped })
			if _, err := server.AcceptWithin(kit.Quiet); !errors.Is(err, kit.ErrNobody) {
				t.Error("the far server got a connection behind the proxy's back")
			}
			if err := datagrams(t, vm.NS, p.Far, f.socket, f.machine, f.far); err != nil {
				t.Error("UDP:", err)
			}

			if _, err := d.Refresh(p.NetNS); err != nil {
				t.Fatal("refresh:", err)
			}
			if err := client.Finish(); err != nil {
				t.Fatal("the SYN that is sent again:", err)
			}
			accepted := out[f.wildcard].MustAccept()
			if got, err := accepted.OrigDst(f.level); err != nil || got != ap(f.far, 80) {
				t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, ap(f.far, 80))
			}
			reroutedBehind(t, vm, f.socket, f.level, ap(f.far, 80), out[f.wildcard])
		})
	}
}

func removeLink(p *kit.Pod) {
	p.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(toMachine)
		if err != nil {
			return err
		}
		return h.LinkDel(l)
	})
}

func TestAMachineBehindATunnel(t *testing.T) {
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("this kernel has no tun devices:", err)
	}
	d := kit.Datapath(t)
	for name, kind := range map[string]uint16{"tun": kit.TUN, "tap": kit.TAP} {
		for _, f := range machineFamilies {
			t.Run(name+"/"+f.name, func(t *testing.T) {
				p := newRouter(t)
				vm := newMachine(t, p)
				kit.Tunnel(vm.NS, p.NS, toMachine, kind,
					[]netip.Prefix{netip.PrefixFrom(machine4, 24), netip.PrefixFrom(machine6, 64)},
					[]netip.Prefix{netip.PrefixFrom(inner4, 24), netip.PrefixFrom(inner6, 64)})
				vm.AddRoute("0.0.0.0/0", inner4)
				vm.AddRoute("::/0", inner6)
				server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
				passesThrough(t, vm, f.socket, ap(f.far, 80), server)
				p.Enroll(d, rerouting())
				out, _ := proxyListeners(p)
				reroutedBehind(t, vm, f.socket, f.level, ap(f.far, 80), out[f.wildcard])
				if err := datagrams(t, vm.NS, p.Far, f.socket, f.machine, f.far); err != nil {
					t.Error("UDP:", err)
				}
			})
		}
	}
}

// KubeVirt puts the machine's tap into a bridge, and names the bridge.
func TestAMachineBehindABridge(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range machineFamilies {
		t.Run(f.name, func(t *testing.T) {
			p := newRouter(t)
			vm := newMachine(t, p)
			vm.Wire("tap0")
			const bridge = toMachine
			p.Netlink(func(h *netlink.Handle) error {
				br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
				if err := h.LinkAdd(br); err != nil {
					return err
				}
				port, err := h.LinkByName("tap0")
				if err != nil {
					return err
				}
				return errors.Join(h.LinkSetMaster(port, br), h.LinkSetUp(br))
			})
			p.AddAddr(bridge, netip.PrefixFrom(inner4, 24))
			p.AddAddr(bridge, netip.PrefixFrom(inner6, 64))
			vm.AddAddr("tap0", netip.PrefixFrom(machine4, 24))
			vm.AddAddr("tap0", netip.PrefixFrom(machine6, 64))
			vm.AddRoute("0.0.0.0/0", inner4)
			vm.AddRoute("::/0", inner6)
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			passesThrough(t, vm, f.socket, ap(f.far, 80), server)

			pod := datapath.Pod{Rules: rules.Default()}
			pod.Rules.RerouteInterfaces = []string{"tap0"}
			if _, err := d.Enroll(p.NetNS, pod); err == nil || !strings.Contains(err.Error(), "port of the bridge "+bridge) {
				t.Errorf("the bridge's port is not refused: %v", err)
			}
			p.Enroll(d, rerouting())
			out, _ := proxyListeners(p)
			reroutedBehind(t, vm, f.socket, f.level, ap(f.far, 80), out[f.wildcard])
		})
	}
}

func TestAMachinesConnectionsOutliveANewDatapath(t *testing.T) {
	d, opts := ownDatapath(t)
	p := newRouter(t)
	vm := addMachine(t, p)
	server := p.Far.Listen(kit.Root, "0.0.0.0:80")
	passesThrough(t, vm, unix.AF_INET, ap(kit.Far4, 80), server)
	p.Enroll(d, rerouting())
	out, _ := proxyListeners(p)
	client, accepted := reroutedBehind(t, vm, unix.AF_INET, unix.SOL_IP, ap(kit.Far4, 80), out["0.0.0.0"])
	client6, accepted6 := reroutedBehind(t, vm, unix.AF_INET6, unix.SOL_IPV6, ap(kit.Far6, 80), out["[::]"])
	p.Hold(kit.Root) // up looks for namespaces in processes
	// An enrolment that was cut off before its last step.
	if err := os.Remove(filepath.Join(opts.Dir, datapath.Layout, "links/pods", fmt.Sprint(p.Cookie()), "inbound")); err != nil {
		t.Fatal(err)
	}
	again, err := datapath.Up(opts)
	if err != nil {
		t.Fatal("up again:", err)
	}
	defer again.Close()
	kit.Exchange(t, client, accepted, 1<<20)
	kit.Exchange(t, client6, accepted6, 1<<20)
	reroutedBehind(t, vm, unix.AF_INET, unix.SOL_IP, ap(kit.Far4, 81), out["0.0.0.0"])
}
