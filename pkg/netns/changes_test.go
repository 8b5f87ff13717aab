package netns

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func newForTest(t *testing.T) (*NetNS, *netlink.Handle) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("SLUICE_REQUIRE_ROOT") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	n, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	h, err := n.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return n, h
}

func addressOnLo(i int) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, byte(i>>8), byte(i)), Mask: net.CIDRMask(32, 32)}}
}

// quiet wants no change to be told.
func quiet(t *testing.T, c *Changes) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*settle)
	defer cancel()
	if err := c.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nothing changed, and Wait ends with %v", err)
	}
}

func TestChangesAreToldOnceAndAlsoWhenMessagesAreLost(t *testing.T) {
	n, h := newForTest(t)
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	told := func(what string, change func() error) {
		t.Helper()
		if err := change(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := c.Wait(ctx); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		quiet(t, c)
	}
	quiet(t, c)
	told("an address", func() error { return h.AddrAdd(lo, addressOnLo(1)) })
	told("an address less", func() error { return h.AddrDel(lo, addressOnLo(1)) })
	told("a route", func() error {
		return h.RouteAdd(&netlink.Route{Dst: addressOnLo(2).IPNet, LinkIndex: 1, Scope: netlink.SCOPE_LINK})
	})
	told("an interface", func() error {
		return h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"})
	})
	told("more than the socket holds", func() error {
		raw, err := c.socket.SyscallConn()
		if err != nil {
			return err
		}
		if e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) }); e != nil || err != nil {
			return errors.Join(e, err)
		}
		for i := 10; i < 400 && err == nil; i++ {
			err = h.AddrAdd(lo, addressOnLo(i))
		}
		return err
	})
}

func TestWaitEndsWithItsContextAndTheNextOneWaits(t *testing.T) {
	n, h := newForTest(t)
	c, err := n.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Millisecond, cancel)
		if err := c.Wait(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("Wait ends with %v", err)
		}
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.AddrAdd(lo, addressOnLo(1)); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error("close twice:", err)
	}
	if err := c.Wait(t.Context()); err == nil {
		t.Error("a closed one waits")
	}
}

func TestInspectReadsRoutes(t *testing.T) {
	n, h := newForTest(t)
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"}); err != nil {
		t.Fatal(err)
	}
	index := map[string]int{}
	for _, name := range []string{"a", "b"} {
		l, err := h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
		index[name] = l.Attrs().Index
	}
	dst := func(text string) *net.IPNet { _, p, _ := net.ParseCIDR(text); return p }
	for _, r := range []netlink.Route{
		{Dst: dst("10.1.0.0/16"), LinkIndex: index["a"], Priority: 7, Scope: netlink.SCOPE_LINK},
		{Dst: dst("10.2.0.0/16"), Type: unix.RTN_BLACKHOLE},
		{Dst: dst("10.3.0.0/16"), MultiPath: []*netlink.NexthopInfo{{LinkIndex: index["a"]}, {LinkIndex: index["b"]}}},
		{Dst: dst("10.4.0.0/16"), LinkIndex: index["a"], Tos: 16, Scope: netlink.SCOPE_LINK},
		{Dst: dst("10.5.0.0/16"), LinkIndex: 1, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST},
		{Dst: dst("10.6.0.0/16"), LinkIndex: index["a"], Table: 100, Scope: netlink.SCOPE_LINK},
		{Dst: dst("fd01::/64"), LinkIndex: index["b"], Priority: 9},
	} {
		if err := h.RouteAdd(&r); err != nil {
			t.Fatalf("%v: %v", r, err)
		}
	}
	network, err := n.Inspect()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]Route{}
	for _, r := range network.Routes {
		got[r.Dst.String()] = r
	}
	links := func(dst string, want ...string) {
		t.Helper()
		r := got[dst]
		if len(r.Links) != len(want) {
			t.Errorf("%s is by %v, want %v", dst, r.Links, want)
			return
		}
		for i, name := range want {
			if r.Links[i] != index[name] {
				t.Errorf("%s is by %v, want %v", dst, r.Links, want)
			}
		}
	}
	links("10.1.0.0/16", "a")
	links("10.2.0.0/16")
	links("10.3.0.0/16", "a", "b")
	links("fd01::/64", "b")
	if got["10.1.0.0/16"].Metric != 7 || got["fd01::/64"].Metric != 9 {
		t.Errorf("the metrics are not 7 and 9: %v", got)
	}
	if !got["10.4.0.0/16"].Partial || got["10.1.0.0/16"].Partial {
		t.Errorf("of routes for a TOS: %v", got)
	}
	if _, ok := got["10.6.0.0/16"]; ok {
		t.Error("a route of another table is there")
	}
	if len(network.Local) != 1 || network.Local[0].String() != "10.5.0.0/16" {
		t.Errorf("local prefixes are %v", network.Local)
	}
	routed, err := n.PolicyRouted()
	if routed || err != nil {
		t.Errorf("without rules it is policy routed: %v, %v", routed, err)
	}
	rule := netlink.NewRule()
	rule.Table, rule.Mark, rule.Family = 100, 1, unix.AF_INET6
	if err := h.RuleAdd(rule); err != nil {
		t.Fatal(err)
	}
	if routed, err := n.PolicyRouted(); !routed || err != nil {
		t.Errorf("with a rule it is not policy routed: %v, %v", routed, err)
	}
}
