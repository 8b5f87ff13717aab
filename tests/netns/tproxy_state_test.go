package netns

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// The settings that TPROXY mode changes, below /proc/sys/net.
var tproxySettings = []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"}

// waysOf is everything in the pod that TPROXY mode adds to: every routing rule,
// the routes of every table, and the settings.
func waysOf(t *testing.T, p *kit.Pod) string {
	t.Helper()
	var out strings.Builder
	p.Netlink(func(h *netlink.Handle) error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := h.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				fmt.Fprintf(&out, "%d %s mark %d\n", family, r, r.Mark)
			}
			routes, err := h.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				if r.Table == 133 {
					fmt.Fprintf(&out, "%d %s\n", family, r)
				}
			}
		}
		return nil
	})
	for _, name := range tproxySettings {
		fmt.Fprintf(&out, "%s = %s\n", name, setting(t, p, name))
	}
	return out.String()
}

func setting(t *testing.T, p *kit.Pod, name string) string {
	t.Helper()
	var value string
	if err := p.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/" + name)
		value = strings.TrimSpace(string(text))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return value
}

// goesByTProxy sees to it that a connection gets to the app through a proxy that
// calls from the client's address.
func goesByTProxy(t *testing.T, p *kit.Pod) {
	t.Helper()
	for _, f := range families[:2] {
		app := p.BareListen(kit.App, at(f.wildcard, 8080))
		client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080))
		if err != nil {
			t.Fatal(f.name, err)
		}
		served := app.MustAccept()
		if served.Peer().Addr() != f.far || served.Peer() == client.Name() {
			t.Errorf("%s: the app's peer is %v, the client %v", f.name, served.Peer(), client.Name())
		}
		kit.Exchange(t, client, served, 1<<16)
		app.Close()
	}
}

// Whoever takes a part of the way back away, or is killed before he has added it:
// the next enrolment completes it, and un-enrolment knows of all of it.
func TestEnrolAgainCompletesTheWayBackOfTPROXY(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	before := waysOf(t, p)
	p.Enroll(d, byTProxy)
	p.StartTProxy()
	whole := waysOf(t, p)
	goesByTProxy(t, p)
	p.Enroll(d, byTProxy)
	if again := waysOf(t, p); again != whole {
		t.Errorf("enrolled again there is\n%s\nwhere there was\n%s", again, whole)
	}
	for part := netns.WayBackRule4; part <= netns.WayBackReflect6; part <<= 1 {
		if err := p.RemoveWayBack(part); err != nil {
			t.Fatal(err)
		}
		if waysOf(t, p) == whole {
			t.Errorf("part %#x is nothing", part)
		}
		p.Enroll(d, byTProxy)
		if again := waysOf(t, p); again != whole {
			t.Errorf("without part %#x, enrolled again there is\n%s\nwhere there was\n%s", part, again, whole)
		}
	}
	goesByTProxy(t, p)
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	if after := waysOf(t, p); after != before {
		t.Errorf("un-enrolment leaves\n%s\nwhere there was\n%s", after, before)
	}
}

// What was there before enrolment is not ours to remove.
func TestTheWayBackOfSomebodyElseStays(t *testing.T) {
	d := kit.Datapath(t)
	const theirs = netns.WayBackRule4 | netns.WayBackRoute6 | netns.WayBackAcceptMark
	p := kit.NewPod(t)
	if err := p.AddWayBack(theirs); err != nil {
		t.Fatal(err)
	}
	before := waysOf(t, p)
	p.Enroll(d, byTProxy)
	p.StartTProxy()
	goesByTProxy(t, p)
	for name, want := range map[string]string{"ipv4/fwmark_reflect": "0", "ipv6/fwmark_reflect": "1"} {
		if got := setting(t, p, name); got != want { // whose rule it is leads refusals back by his own means
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	p.Enroll(d, byTProxy) // remembers still what it added
	if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	if after := waysOf(t, p); after != before {
		t.Errorf("un-enrolment leaves\n%s\nwhere there was\n%s", after, before)
	}
}

func TestEveryEndOfTPROXYRemovesTheWayBack(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, d *datapath.Datapath, opts datapath.Options, p *kit.Pod) error{
		"REDIRECT mode": func(_ *testing.T, d *datapath.Datapath, _ datapath.Options, p *kit.Pod) error {
			p.Enroll(d)
			return nil
		},
		"un-enrolment": func(_ *testing.T, d *datapath.Datapath, _ datapath.Options, p *kit.Pod) error {
			_, err := d.Unenroll(p.Cookie(), p.NetNS)
			return err
		},
		"un-enrolment by its cookie": func(_ *testing.T, d *datapath.Datapath, _ datapath.Options, p *kit.Pod) error {
			p.Hold(kit.App) // a namespace is found by the processes in it
			_, err := d.Unenroll(p.Cookie(), nil)
			return err
		},
		"down": func(_ *testing.T, d *datapath.Datapath, opts datapath.Options, p *kit.Pod) error {
			p.Hold(kit.App)
			if err := d.Close(); err != nil { // or it waits for what we hold
				return err
			}
			_, err := datapath.Down(opts.Dir)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, opts := ownDatapath(t)
			p := kit.NewPod(t)
			before := waysOf(t, p)
			if _, err := d.Enroll(p.NetNS, datapath.Pod{Rules: tproxyRules()}); err != nil {
				t.Fatal(err)
			}
			if waysOf(t, p) == before {
				t.Fatal("enrolment added nothing")
			}
			if pods, err := d.Pods(); err != nil || len(pods) != 1 || pods[0].Mode != rules.TProxy {
				t.Errorf("the pods are %+v, %v", pods, err)
			}
			if err := end(t, d, opts, p); err != nil {
				t.Fatal(err)
			}
			if after := waysOf(t, p); after != before {
				t.Errorf("it leaves\n%s\nwhere there was\n%s", after, before)
			}
		})
	}
}

// An enrolment that fails because somebody else uses the table says so, and adds
// nothing; the pod is as it was.
func TestEnrolmentByTPROXYRefusesATableInUse(t *testing.T) {
	d := kit.Datapath(t)
	for _, already := range []bool{false, true} {
		p := kit.NewPod(t)
		if already {
			p.Enroll(d)
		}
		p.Netlink(func(h *netlink.Handle) error {
			_, anywhere, _ := net.ParseCIDR("0.0.0.0/0")
			return h.RouteAdd(&netlink.Route{Dst: anywhere, Gw: kit.Far4.AsSlice(), Table: 133})
		})
		before := waysOf(t, p)
		_, err := d.Enroll(p.NetNS, datapath.Pod{Rules: tproxyRules()})
		if !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "routing table 133") {
			t.Errorf("enrolled already: %v: it ends with %v", already, err)
		}
		if after := waysOf(t, p); after != before {
			t.Errorf("enrolled already: %v: it leaves\n%s\nwhere there was\n%s", already, after, before)
		}
		pods, err := d.Pods()
		if err != nil || len(pods) > 0 != already || already && pods[0].Mode != rules.Redirect {
			t.Errorf("enrolled already: %v: the pods are %+v, %v", already, pods, err)
		}
	}
}

func tproxyRules() rules.Rules {
	r := rules.Default()
	r.Mode = rules.TProxy
	return r
}
