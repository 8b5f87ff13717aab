package netns

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// The rules apply to datagrams as to connects.
func TestDNSRules(t *testing.T) {
	d := kit.Datapath(t)
	none := func(*rules.Rules) {}
	local := netip.MustParseAddrPort("127.0.0.53:53")
	for _, tt := range []struct {
		name   string
		id     kit.ID
		change func(*rules.Rules)
		to     netip.AddrPort // not valid: the family's server
		want   string
		reason string
	}{
		{"O10", kit.App, none, netip.AddrPort{}, "proxy", "captured-dns"},
		{"O10 without DNS capture", kit.App, func(r *rules.Rules) { r.DNS = false }, netip.AddrPort{}, "far", ""},
		{"O10 comes before O12", kit.App, func(r *rules.Rules) { r.ExcludeOutboundCIDRs = prefixes("10.99.0.0/24", "fd99::/64") }, netip.AddrPort{}, "proxy", "captured-dns"},
		{"O10 comes before O14", kit.App, func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} }, netip.AddrPort{}, "proxy", "captured-dns"},
		{"O1", kit.App, func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{53} }, netip.AddrPort{}, "far", "direct-port-out"},
		{"O5", kit.ProxyUID, none, netip.AddrPort{}, "far", "direct-proxy"},
		{"O8", kit.ProxyGID, none, netip.AddrPort{}, "far", "direct-proxy"},
		{"O9", kit.App, func(r *rules.Rules) { r.ExcludeOwnerGroups = []uint32{1000} }, netip.AddrPort{}, "far", "direct-owner-group"},
		{"O9, another group", kit.Root, func(r *rules.Rules) { r.ExcludeOwnerGroups = []uint32{1000} }, netip.AddrPort{}, "proxy", "captured-dns"},
		{"before the proxy is ready", kit.App, func(r *rules.Rules) { r.From = rules.ProxyReady }, netip.AddrPort{}, "far", "direct-not-ready"},
		{"O4 is not for port 53", kit.App, none, local, "proxy", "captured-dns"},
		{"the proxy calls a local server", kit.Proxy, none, local, "local", "direct-proxy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newDNSPod(t)
			nameServer{"local", farServer.v4, farServer.v6}.serve(t, p.NS, kit.Root, local.String())
			enrollDNS(p, d, func(pod *datapath.Pod) { tt.change(&pod.Rules) })
			startDNSProxy(t, p)
			calls := uint64(0)
			for _, f := range dnsFamilies {
				to := tt.to
				if !to.IsValid() {
					to = f.server()
				} else if f.far.Is6() {
					continue
				}
				for _, connected := range []bool{true, false} {
					a := newAsker(t, p, tt.id, f.socket)
					target := to
					if connected {
						if err := a.connect(to); err != nil {
							t.Fatal(err)
						}
						target = netip.AddrPort{}
					}
					calls++
					who, from, err := a.ask(target)
					if err != nil || who != tt.want || from != to {
						t.Errorf("%s, connected %v: %s answers from %v, %v; want %s from %v", f.name, connected, who, from, err, tt.want, to)
					}
				}
			}
			if tt.reason != "" && p.Stat(d, tt.reason) != calls {
				t.Errorf("%s counts %d, want %d", tt.reason, p.Stat(d, tt.reason), calls)
			}
		})
	}
}

// UDP to other ports is left alone, and so is a far host's answer from port 53.
func TestDNSOtherUDPIsUntouched(t *testing.T) {
	d := kit.Datapath(t)
	p := newDNSPod(t)
	nameServer{"other port", farServer.v4, farServer.v6}.serve(t, p.Far, kit.Root, "[::]:54")
	enrollDNS(p, d)
	startDNSProxy(t, p)
	for _, f := range dnsFamilies {
		for _, connected := range []bool{true, false} {
			a := newAsker(t, p, kit.App, f.socket)
			to, target := ap(f.far, 54), ap(f.far, 54)
			if connected {
				if err := a.connect(to); err != nil {
					t.Fatal(err)
				}
				target = netip.AddrPort{}
			}
			who, from, err := a.ask(target)
			if err != nil || who != "other port" || from != to {
				t.Errorf("%s, connected %v: %s answers from %v, %v", f.name, connected, who, from, err)
			}
		}
	}
	if got := p.Stat(d, "captured-dns"); got != 0 {
		t.Errorf("captured-dns counts %d", got)
	}
}

// Un-enrolled, or enrolled anew without DNS capture, a socket asks the server
// itself, and shows who answers; one that is connected stays with the proxy, as
// open TCP connections do, until it connects anew.
func TestDNSSocketsOutliveTheEnrolment(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range dnsFamilies {
		for _, again := range []bool{false, true} {
			t.Run(f.name, func(t *testing.T) {
				p := newDNSPod(t)
				before := newAsker(t, p, kit.App, f.socket)
				checkAsks(t, before, f, true, "far")
				enrollDNS(p, d)
				stop := startDNSProxy(t, p)
				if who, from, err := before.ask(netip.AddrPort{}); err != nil || who != "far" || from != f.server() {
					t.Errorf("connected before: %s answers from %v, %v", who, from, err)
				}
				free, peered := newAsker(t, p, kit.App, f.socket), newAsker(t, p, kit.App, f.socket)
				bound := newAsker(t, p, kit.App, f.socket, kit.Bind(ap(f.pod, 5353)))
				checkAsks(t, free, f, false, "proxy")
				checkAsks(t, bound, f, false, "proxy")
				checkAsks(t, peered, f, true, "proxy")
				if again {
					p.Enroll(d)
				} else if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
					t.Fatal(err)
				}
				checkAsks(t, free, f, false, "far")
				checkAsks(t, bound, f, false, "far")
				if who, from, err := peered.ask(netip.AddrPort{}); err != nil || who != "proxy" || from != f.server() {
					t.Errorf("connected: %s answers from %v, %v", who, from, err)
				}
				// What now answers on loopback is shown as it is.
				proxy := map[bool]string{true: "127.0.0.1:15053", false: "[::1]:15053"}[f.far.Is4()]
				if who, from, err := free.ask(netip.MustParseAddrPort(proxy)); err != nil || who != "proxy" || from.String() != proxy {
					t.Errorf("the former DNS proxy: %s answers from %v, %v", who, from, err)
				}
				stop()
				if err := peered.Disconnect(); err != nil {
					t.Fatal(err)
				}
				checkAsks(t, peered, f, true, "far")
			})
		}
	}
}

func TestDNSIsRefusedWhereAHookIsMissing(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "dns-hook-missing")
	d := kit.OwnDatapath(t, datapath.Options{Dir: dir})
	p := kit.NewPod(t)
	pod := datapath.Pod{Rules: rules.Default()}
	pod.Rules.DNS = true
	if _, err := d.Enroll(p.NetNS, pod); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, datapath.Layout, "links", "node", "sendmsg6")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Enroll(p.NetNS, pod); !errors.Is(err, datapath.ErrNotUp) {
		t.Errorf("enrolling with DNS capture ends with %v, want ErrNotUp", err)
	}
	pod.Rules.DNS = false
	if _, err := d.Enroll(p.NetNS, pod); err != nil {
		t.Error("without DNS capture:", err)
	}
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Error(err)
	}
}
