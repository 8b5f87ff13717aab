package kit

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// The addresses of every topology. Each pair of namespaces is alone with them.
var (
	Pod4 = netip.MustParseAddr("10.99.0.2")
	Far4 = netip.MustParseAddr("10.99.0.1")
	Pod6 = netip.MustParseAddr("fd99::2")
	Far6 = netip.MustParseAddr("fd99::1")
)

// Identities that tests use.
var (
	Root     = ID{0, 0}
	App      = ID{1000, 1000}
	Proxy    = ID{1337, 1337}
	ProxyGID = ID{1000, 1337} // the proxy by its group alone
	ProxyUID = ID{1337, 1000}
)

// ID is who does something.
type ID struct{ UID, GID int }

// NS is a network namespace of a test.
type NS struct {
	*netns.NetNS
	Name string
	t    testing.TB
}

// NewNS makes an empty namespace with lo up.
func NewNS(t testing.TB, name string) *NS {
	t.Helper()
	needWorld(t)
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return &NS{NetNS: ns, Name: name, t: t}
}

// Netlink runs fn with a handle in the namespace.
func (n *NS) Netlink(fn func(*netlink.Handle) error) {
	n.t.Helper()
	h, err := n.NetNS.Netlink()
	if err != nil {
		n.t.Fatal(err)
	}
	defer h.Close()
	if err := fn(h); err != nil {
		n.t.Fatalf("netlink in %s: %v", n.Name, err)
	}
}

// Sysctl sets a net.* sysctl of the namespace; name is below /proc/sys/net.
func (n *NS) Sysctl(name, value string) {
	n.t.Helper()
	err := n.Do(func() error {
		// /proc/sys/net follows the thread that opens it.
		return os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0o644)
	})
	if err != nil {
		n.t.Fatalf("sysctl %s=%s in %s: %v", name, value, n.Name, err)
	}
}

// As runs fn in the namespace as somebody, on a thread of its own.
func (n *NS) As(id ID, fn func() error) error {
	return n.Do(func() error {
		if err := become(id); err != nil {
			return err
		}
		err := fn()
		return errors.Join(err, become(Root))
	})
}

// become changes the calling thread alone (the raw calls are per thread), and
// keeps the saved IDs, so that it can be undone.
func become(id ID) error {
	if id == Root { // the UID first: it gives back the right to change the rest
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); e != 0 {
			return fmt.Errorf("become root: %w", e)
		}
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, 0, 0, 0); e != 0 {
			return fmt.Errorf("become root: %w", e)
		}
		return nil
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(id.GID), uintptr(id.GID), 0); e != 0 {
		return fmt.Errorf("become GID %d: %w", id.GID, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(id.UID), uintptr(id.UID), 0); e != 0 {
		return fmt.Errorf("become UID %d: %w", id.UID, e)
	}
	return nil
}

// Pod is a pod's namespace, wired to a far host's by a veth pair: eth0 on both
// sides, the far host being the default route.
type Pod struct {
	*NS
	Far *NS
}

// NewPod makes a pod and its far host, both families.
func NewPod(t testing.TB) *Pod {
	t.Helper()
	return newPod(t, NewNS(t, "pod"))
}

func newPod(t testing.TB, ns *NS) *Pod {
	t.Helper()
	p := &Pod{NS: ns, Far: NewNS(t, "far")}
	p.Wire("eth0", netip.PrefixFrom(Pod4, 24), netip.PrefixFrom(Far4, 24), netip.PrefixFrom(Pod6, 64), netip.PrefixFrom(Far6, 64))
	p.route("0.0.0.0/0", Far4)
	p.route("::/0", Far6)
	return p
}

// Wire adds an interface to pod and far host. Addresses may be of either
// family; the pod's come first of each pair.
func (p *Pod) Wire(name string, pairs ...netip.Prefix) {
	p.t.Helper()
	p.Netlink(func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1500},
			PeerName:  name, PeerNamespace: netlink.NsFd(p.Far.Fd()),
		})
	})
	for i, ns := range []*NS{p.NS, p.Far} {
		ns.Netlink(func(h *netlink.Handle) error {
			l, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			if err := h.LinkSetUp(l); err != nil {
				return err
			}
			for j := i; j < len(pairs); j += 2 {
				if err := h.AddrAdd(l, address(pairs[j])); err != nil {
					return fmt.Errorf("add %s: %w", pairs[j], err)
				}
			}
			return nil
		})
	}
	p.waitForLink(name)
	for i, pair := range pairs {
		[]*NS{p.NS, p.Far}[i%2].waitForAddress(pair.Addr())
	}
}

func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD // usable at once
	}
	return a
}

// AddAddr adds an address to an interface of the namespace.
func (n *NS) AddAddr(link string, p netip.Prefix) {
	n.t.Helper()
	n.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(link)
		if err != nil {
			return err
		}
		return h.AddrAdd(l, address(p))
	})
	n.waitForAddress(p.Addr())
}

func (p *Pod) route(dst string, via netip.Addr) {
	p.t.Helper()
	p.AddRoute(dst, via)
}

// AddRoute adds a route by way of a next hop.
func (n *NS) AddRoute(dst string, via netip.Addr) {
	n.t.Helper()
	_, ipnet, err := net.ParseCIDR(dst)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Netlink(func(h *netlink.Handle) error {
		return h.RouteAdd(&netlink.Route{Dst: ipnet, Gw: via.AsSlice()})
	})
}

func (p *Pod) waitForLink(name string) {
	p.t.Helper()
	Eventually(p.t, name+" is up on both sides", func() bool {
		up := true
		for _, ns := range []*NS{p.NS, p.Far} {
			ns.Netlink(func(h *netlink.Handle) error {
				l, err := h.LinkByName(name)
				up = up && err == nil && l.Attrs().OperState == netlink.OperUp
				return err
			})
		}
		return up
	})
}

// Enroll enrols the pod and un-enrols it at the end. Change edits what is asked.
func (p *Pod) Enroll(d *datapath.Datapath, change ...func(*datapath.Pod)) datapath.Enrolment {
	p.t.Helper()
	pod := datapath.Pod{Namespace: "test", Name: safe(p.t.Name()), Rules: rules.Default()}
	for _, c := range change {
		c(&pod)
	}
	e, err := d.Enroll(p.NetNS, pod)
	if err != nil {
		p.t.Fatal("enroll:", err)
	}
	p.t.Cleanup(func() {
		if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
			p.t.Error("unenroll:", err)
		}
	})
	return e
}

// ByTC asks for the TC way.
func ByTC(p *datapath.Pod) { p.Inbound = datapath.InboundTC }

// Stat is one of the pod's counters.
func (p *Pod) Stat(d *datapath.Datapath, reason string) uint64 {
	p.t.Helper()
	stats, err := d.Stats()
	if err != nil {
		p.t.Fatal(err)
	}
	for _, s := range stats {
		if s.Cookie == p.Cookie() && s.Reason == reason {
			return s.Count
		}
	}
	return 0
}
