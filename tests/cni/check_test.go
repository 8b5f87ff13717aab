package cni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

func TestCHECKFindsWhatIsMissing(t *testing.T) {
	for name, tt := range map[string]struct {
		breaks func(n *node, p *kit.Pod)
		says   string
	}{
		"the pod's entry": {func(n *node, p *kit.Pod) {
			if _, err := n.d.Unenroll(p.Cookie(), p.NetNS); err != nil {
				t.Fatal(err)
			}
		}, "is not in the map pods"},
		"the guard": {func(_ *node, p *kit.Pod) {
			p.Netlink(func(h *netlink.Handle) error {
				l, err := h.LinkByName("eth0")
				if err != nil {
					return err
				}
				filters, err := h.FilterList(l, netlink.HANDLE_MIN_EGRESS)
				if err != nil || len(filters) != 1 {
					t.Fatalf("the filters are %v, %v", filters, err)
				}
				return h.FilterDel(filters[0])
			})
		}, "guard is not attached to its interface eth0"},
		"the inbound program": {func(n *node, _ *kit.Pod) {
			pins, err := filepath.Glob(filepath.Join(n.bpffs, datapath.Layout, "links/pods/*/inbound"))
			if err != nil || len(pins) != 1 {
				t.Fatalf("the pins are %v, %v", pins, err)
			}
			if err := os.Remove(pins[0]); err != nil {
				t.Fatal(err)
			}
		}, "sk_lookup program"},
		"a rule": {func(n *node, _ *kit.Pod) { removeOne(t, filepath.Join(n.bpffs, datapath.Layout, "maps/port_rules")) }, "rules of ports"},
		"the proxy's identity": {func(n *node, _ *kit.Pod) {
			removeOne(t, filepath.Join(n.bpffs, datapath.Layout, "maps/proxy_ids"))
		}, "lacks the proxy's"},
		"a program of the node": {func(n *node, _ *kit.Pod) {
			if err := os.Remove(filepath.Join(n.bpffs, datapath.Layout, "links/node/connect4")); err != nil {
				t.Fatal(err)
			}
		}, "connect4 is not attached"},
	} {
		n := newNode(t)
		n.daemon(enrolls)
		list, p := n.network("net", "1.0.0"), kit.NewPod(t)
		rt := sandbox(p, "c1", "eth0", injected())
		n.mustAdd(list, rt)
		if err := n.libcni.CheckNetworkList(t.Context(), list, rt); err != nil {
			t.Errorf("all is there: %v", err)
		}
		tt.breaks(n, p)
		err := n.libcni.CheckNetworkList(t.Context(), list, rt)
		if code(err) != 101 || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("without %s: %v; want %q", name, err, tt.says)
		}
	}
}

func removeOne(t *testing.T, pin string) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	key := make([]byte, m.KeySize())
	if err := m.NextKey(nil, &key); err != nil {
		t.Fatal(err)
	}
	if err := m.Delete(key); err != nil {
		t.Fatal(err)
	}
}

func TestCHECKComparesTheRulesWithTheDaemons(t *testing.T) {
	n := newNode(t)
	should := rules.Default()
	n.daemon(func(agentapi.Request) agentapi.Answer {
		r := should
		return agentapi.Answer{Decision: agentapi.Enroll, Rules: &r}
	})
	list, p := n.network("net", "1.0.0"), kit.NewPod(t)
	rt := sandbox(p, "c1", "eth0", injected())
	n.mustAdd(list, rt)
	if err := n.libcni.CheckNetworkList(t.Context(), list, rt); err != nil {
		t.Error(err)
	}
	should.ExcludeOutboundPorts = append(should.ExcludeOutboundPorts, 3306)
	if err := n.libcni.CheckNetworkList(t.Context(), list, rt); code(err) != 101 || !strings.Contains(err.Error(), "not what the pod asks for") {
		t.Error("the daemon has other rules:", err)
	}
}

func TestCHECKIsAboutTheNamespaceOfTheADD(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	list, p, other := n.network("net", "1.0.0"), kit.NewPod(t), kit.NewPod(t)
	n.mustAdd(list, sandbox(p, "c1", "eth0", injected()))
	n.mustAdd(list, sandbox(other, "c2", "eth0", injected()))
	if err := n.libcni.CheckNetworkList(t.Context(), list, sandbox(other, "c1", "eth0", injected())); code(err) != 101 {
		t.Error("another namespace:", err)
	}
}

func TestCHECKOfAPodOutsideTheMeshAsksForNothing(t *testing.T) {
	n := newNode(t)
	list, p := n.network("net", "1.0.0"), kit.NewPod(t)
	rt := sandbox(p, "c1", "eth0", map[string]string{})
	n.mustAdd(list, rt) // without a daemon
	if err := n.libcni.CheckNetworkList(t.Context(), list, rt); err != nil {
		t.Error(err)
	}
}

// What is asked twice is done once.
func TestEachVerbMayComeTwice(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	list, p := n.network("net", "1.0.0"), newHeldPod(t)
	clean := n.kernelState(p)
	rt := sandbox(p, "c1", "eth0", injected())
	n.mustAdd(list, rt)
	once := n.kernelState(p)
	n.mustAdd(list, rt)
	n.wantState(once, p, "")
	for range 2 {
		n.mustDel(list, rt)
		n.wantState(clean, p, "")
	}
}

// Multus calls us alone for a second network; the first keeps what it has.
func TestDELOfAFirstNetworkLeavesTheSecondEnrolled(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	p := newHeldPod(t)
	clean := n.kernelState(p)
	one, two := n.network("one", "1.1.0"), n.network("two", "0.3.1")
	eth0, net1 := sandbox(p, "c1", "eth0", injected()), sandbox(p, "c1", "net1", injected())
	n.mustAdd(one, eth0)
	result := n.mustAdd(two, net1)
	if result.Version() != "0.3.1" {
		t.Error("alone, the result is of version", result.Version())
	}
	n.mustDel(one, eth0)
	n.mustDel(one, eth0)
	if !n.enrolled(p) || n.attachments() != 1 {
		t.Error("the second network's pod is un-enrolled")
	}
	if err := n.gc(one, "none", "eth0"); err != nil || !n.enrolled(p) {
		t.Error("GC of the first network touches the second:", err)
	}
	if err := n.gc(n.network("two", "1.1.0"), "none", "eth0"); err != nil || n.enrolled(p) {
		t.Error("GC of the second network leaves the pod enrolled:", err)
	}
	n.wantState(clean, p, "")
}
