package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// place is where a dial is accepted.
type place string

const (
	toServer   place = "its server"
	toOutbound place = "the proxy's outbound port"
	toInbound  place = "the proxy's inbound port"
)

// town is a pod in which every dial is accepted somewhere.
type town struct {
	*kit.Pod
	places map[place][]*kit.Sock
}

// newTown listens on the far host and in the pod on ports 80, 81 and 15008, both
// families, and as the proxy.
func newTown(t *testing.T) *town {
	t.Helper()
	p := kit.NewPod(t)
	p.AddAddr("lo", netip.MustParsePrefix("::6/128"))
	w := &town{Pod: p, places: map[place][]*kit.Sock{}}
	for _, ns := range []*kit.NS{p.Far, p.NS} {
		for _, port := range []int{80, 81, 15008} {
			w.places[toServer] = append(w.places[toServer], ns.Listen(kit.Root, at("[::]", port)))
		}
	}
	w.places[toOutbound] = []*kit.Sock{p.Listen(kit.Proxy, at("[::]", 15001))}
	w.places[toInbound] = []*kit.Sock{p.Listen(kit.Proxy, at("[::]", 15006))}
	// Enrolment finds the proxy's listeners in a process of the pod.
	p.Hold(kit.Proxy, w.places[toOutbound][0], w.places[toInbound][0])
	return w
}

// goes dials from the pod and says where it is accepted.
func (w *town) goes(t *testing.T, id kit.ID, to netip.AddrPort, options ...kit.Option) place {
	t.Helper()
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	client, err := w.Dial(id, family, to, options...)
	if err != nil {
		t.Errorf("dial %v: %v", to, err)
		return ""
	}
	defer client.Close()
	return w.acceptedAt(t, client)
}

func (w *town) acceptedAt(t *testing.T, client *kit.Sock) place {
	t.Helper()
	var found place
	kit.Eventually(t, "somebody accepts", func() bool {
		for place, listeners := range w.places {
			for _, l := range listeners {
				s, err := l.AcceptWithin(0)
				if errors.Is(err, kit.ErrNobody) {
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				kit.Exchange(t, client, s, 100)
				s.Close()
				found = place
			}
		}
		return found != ""
	})
	return found
}

type dial struct {
	name   string
	id     kit.ID
	to     string
	source string // bound before, if not empty
	want   place
}

// checkRules compares where dials go, and that they all reach their servers
// without Sluice.
func checkRules(t *testing.T, change func(*rules.Rules), dials []dial) {
	t.Helper()
	d := kit.Datapath(t)
	w := newTown(t)
	for _, enrolled := range []bool{false, true} {
		if enrolled {
			w.Enroll(d, func(pod *datapath.Pod) { change(&pod.Rules) })
		}
		for _, c := range dials {
			var options []kit.Option
			if c.source != "" {
				options = append(options, kit.Bind(ap(netip.MustParseAddr(c.source), 0)))
			}
			want := c.want
			if !enrolled {
				want = toServer
			}
			if got := w.goes(t, c.id, netip.MustParseAddrPort(c.to), options...); got != want {
				t.Errorf("%s, enrolled %v: %v to %s goes to %s, want %s", c.name, enrolled, c.id, c.to, got, want)
			}
		}
	}
	nothingStopped(t, w.Pod, d)
}

func TestRulesOfSeveralProxyIDs(t *testing.T) {
	second, third, group := kit.ID{UID: 1338, GID: 1000}, kit.ID{UID: 1000, GID: 1339}, kit.ID{UID: 1000, GID: 1337}
	change := func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = []uint32{1337, 1338}, []uint32{1337, 1339} }
	var dials []dial
	for _, who := range []kit.ID{kit.Proxy, kit.ProxyUID, group, second, third} {
		dials = append(dials, dial{"O5, O8", who, "10.99.0.1:80", "", toServer}, dial{"O5, O8", who, "[fd99::1]:80", "", toServer})
		self := toServer
		if who.UID == 1337 { // only the first identity's
			self = toInbound
		}
		dials = append(dials, dial{"O3, O6", who, "10.99.0.2:80", "", self}, dial{"O3, O6", who, "[fd99::2]:80", "", self},
			dial{"O3, O6", who, "127.0.0.2:80", "", self}, dial{"O5", who, "127.0.0.1:80", "", toServer}, dial{"O5", who, "[::1]:80", "", toServer})
	}
	checkRules(t, change, append(dials, dial{"O14", kit.App, "10.99.0.1:80", "", toOutbound}))
}

func TestRulesOfAGIDAlone(t *testing.T) {
	checkRules(t, func(r *rules.Rules) { r.ProxyUIDs = nil }, []dial{
		{"O6", kit.ProxyGID, "10.99.0.2:80", "", toInbound},
		{"O8", kit.ProxyGID, "10.99.0.1:80", "", toServer},
		{"O14", kit.ProxyUID, "10.99.0.1:80", "", toOutbound},
	})
}

func TestRulesOfLocalCalls(t *testing.T) {
	checkRules(t, func(*rules.Rules) {}, []dial{
		{"O2", kit.Proxy, "10.99.0.2:80", "127.0.0.6", toServer},
		{"O2", kit.Proxy, "[fd99::2]:80", "::6", toServer},
		{"O2 is for local destinations", kit.Proxy, "127.0.0.2:80", "127.0.0.6", toServer},
		{"O3 but 15008", kit.Proxy, "10.99.0.2:15008", "", toServer},
		{"O3", kit.Proxy, "10.99.0.2:81", "", toInbound},
		{"O4", kit.App, "10.99.0.2:80", "", toServer},
		{"O4", kit.App, "[fd99::2]:80", "", toServer},
		{"O4", kit.App, "127.0.0.1:80", "", toServer},
		{"O4", kit.App, "127.0.0.9:80", "", toServer},
		{"O4", kit.App, "[::1]:80", "", toServer},
		{"15008 elsewhere is captured", kit.App, "10.99.0.1:15008", "", toOutbound},
	})
}

func TestRulesOfAnIncludedLoopbackRange(t *testing.T) {
	change := func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.9/32", "10.99.0.0/24")}
	}
	checkRules(t, change, []dial{
		{"O4 is left out", kit.App, "127.0.0.9:80", "", toOutbound},
		{"O4 is left out", kit.App, "10.99.0.2:80", "", toOutbound},
		{"O11", kit.App, "127.0.0.1:80", "", toServer},
		{"O14", kit.App, "127.0.0.8:80", "", toServer},
		{"O14", kit.App, "[fd99::1]:80", "", toServer},
		{"O14", kit.App, "10.99.0.1:80", "", toOutbound},
	})
}

func TestRulesOfOutboundRangesAndPorts(t *testing.T) {
	for _, tt := range []struct {
		name             string
		include, exclude []netip.Prefix // include nil: all
		far4, far6       place
	}{
		{"all", nil, nil, toOutbound, toOutbound},
		{"excluded", nil, prefixes("10.99.0.0/24", "fd99::/16"), toServer, toServer},
		{"excluded from one family", nil, prefixes("fd99::1/128"), toOutbound, toServer},
		{"included", prefixes("10.0.0.0/8", "fd99::/64"), nil, toOutbound, toOutbound},
		{"not included", prefixes("10.98.0.0/16", "fd98::/64"), nil, toServer, toServer},
		{"a long include in a short exclude", prefixes("10.99.0.1/32", "fd99::1/128"), prefixes("10.0.0.0/8", "fd00::/8"), toServer, toServer},
		{"a long exclude in a short include", prefixes("0.0.0.0/0", "::/0"), prefixes("10.99.0.1/32", "fd99::1/128"), toServer, toServer},
		{"an exclude beside", prefixes("10.99.0.1/32", "fd99::1/128"), prefixes("10.99.0.0/32", "fd99::/128"), toOutbound, toOutbound},
		{"everything excluded", nil, prefixes("0.0.0.0/0", "::/0"), toServer, toServer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkRules(t, func(r *rules.Rules) {
				if tt.include != nil {
					r.IncludeOutboundCIDRs = rules.CIDRs{List: tt.include}
				}
				r.ExcludeOutboundCIDRs = tt.exclude
				r.ExcludeOutboundPorts = []uint16{81}
			}, []dial{
				{"address", kit.App, "10.99.0.1:80", "", tt.far4}, {"address", kit.App, "[fd99::1]:80", "", tt.far6},
				{"port", kit.App, "10.99.0.1:81", "", toServer}, {"port", kit.App, "[fd99::1]:81", "", toServer},
			})
		})
	}
}

func TestRulesOfInboundPorts(t *testing.T) {
	for _, way := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
		for _, tt := range []struct {
			name     string
			change   func(*rules.Rules)
			captured map[int]bool
		}{
			{"all", func(*rules.Rules) {}, map[int]bool{80: true, 81: true}},
			{"excluded", func(r *rules.Rules) { r.ExcludeInboundPorts = []uint16{81} }, map[int]bool{80: true}},
			{"included, excludes are ignored", func(r *rules.Rules) {
				r.IncludeInboundPorts = rules.Ports{List: []uint16{81}}
				r.ExcludeInboundPorts = []uint16{81}
			}, map[int]bool{81: true}},
			{"none", func(r *rules.Rules) { r.IncludeInboundPorts = rules.Ports{} }, nil},
		} {
			t.Run(fmt.Sprint(way, "/", tt.name), func(t *testing.T) {
				d := kit.Datapath(t)
				w := newTown(t)
				w.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = way; tt.change(&pod.Rules) })
				for _, f := range families[:2] {
					for _, port := range []int{80, 81, 15008} {
						client, err := w.Far.Dial(kit.Root, f.socket, ap(f.pod, port))
						if err != nil {
							t.Errorf("%s, port %d: %v", f.name, port, err)
							continue
						}
						want := toServer
						if tt.captured[port] {
							want = toInbound
						}
						if got := w.acceptedAt(t, client); got != want {
							t.Errorf("%s, port %d goes to %s, want %s", f.name, port, got, want)
						}
					}
				}
			})
		}
	}
}

func TestRulesThatChangeTouchNoOpenConnection(t *testing.T) {
	d, opts := ownDatapath(t)
	w := newTown(t)
	w.Enroll(d)
	proxy := w.places[toOutbound][0]
	open, err := w.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80))
	if err != nil {
		t.Fatal(err)
	}
	accepted := proxy.MustAccept()
	w.Enroll(d, func(pod *datapath.Pod) { pod.Rules.ExcludeOutboundPorts = []uint16{80} })
	kit.Exchange(t, open, accepted, 1<<18)
	if open.Peer() != ap(kit.Far4, 80) {
		t.Errorf("the open connection's peer became %v", open.Peer())
	}
	if got, err := accepted.OrigDst(unix.SOL_IP); err != nil || got != ap(kit.Far4, 80) {
		t.Errorf("its SO_ORIGINAL_DST became %v, %v", got, err)
	}
	if got := w.goes(t, kit.App, ap(kit.Far4, 80)); got != toServer {
		t.Errorf("a new one goes to %s", got)
	}
	if n := stateOf(t, opts.Dir).Entries["maps/rule_sets"]; n != 1 {
		t.Errorf("there are %d rule sets, want 1", n)
	}
}

func TestEqualRulesShareAnIDAndGoWithTheLastPod(t *testing.T) {
	d, opts := ownDatapath(t)
	empty := stateOf(t, opts.Dir)
	var pods []*kit.Pod
	for _, ports := range [][]uint16{{81, 80}, {80, 81, 80}, {82}} {
		p := kit.NewPod(t)
		pod := datapath.Pod{Rules: rules.Default()}
		pod.Rules.ExcludeOutboundPorts = ports
		if _, err := d.Enroll(p.NetNS, pod); err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	infos, err := d.Pods()
	if err != nil {
		t.Fatal(err)
	}
	ids := map[uint64]datapath.RulesID{}
	for _, info := range infos {
		ids[info.Cookie] = info.RulesID
	}
	if ids[pods[0].Cookie()] != ids[pods[1].Cookie()] || ids[pods[0].Cookie()] == ids[pods[2].Cookie()] {
		t.Errorf("the rule sets are %v", ids)
	}
	for i, want := range []int{2, 1, 0} {
		if _, err := d.Unenroll(pods[i].Cookie(), pods[i].NetNS); err != nil {
			t.Fatal(err)
		}
		if n := stateOf(t, opts.Dir).Entries["maps/rule_sets"]; n != want {
			t.Errorf("after %d un-enrolments there are %d rule sets, want %d", i+1, n, want)
		}
	}
	if diff := cmp.Diff(empty, stateOf(t, opts.Dir)); diff != "" {
		t.Error("they leave:", diff)
	}
}
