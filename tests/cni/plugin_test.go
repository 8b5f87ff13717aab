package cni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/tests/kit"
)

func TestADDRedirectsAPodsTrafficAndDELEndsIt(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	p := kit.NewPod(t)
	server := p.Far.Listen(kit.Root, "0.0.0.0:80")
	to := netip.AddrPortFrom(kit.Far4, 80)
	direct, err := p.Dial(kit.App, unix.AF_INET, to)
	if err != nil {
		t.Fatal("without Sluice:", err)
	}
	kit.Exchange(t, direct, server.MustAccept(), 1<<12)

	list, rt := n.network("k8s-pod-network", "1.0.0"), sandbox(p, "c1", "eth0", injected())
	n.mustAdd(list, rt)
	proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
	client, err := p.Dial(kit.App, unix.AF_INET, to)
	if err != nil {
		t.Fatal(err)
	}
	accepted := proxy.MustAccept()
	if dst, err := accepted.OrigDst(unix.SOL_IP); err != nil || dst != to {
		t.Errorf("the proxy is told %v, %v; want %v", dst, err, to)
	}
	kit.Exchange(t, client, accepted, 1<<16)

	n.mustDel(list, rt)
	if n.enrolled(p) || n.attachments() != 0 {
		t.Error("DEL leaves the pod enrolled")
	}
	again, err := p.Dial(kit.App, unix.AF_INET, to)
	if err != nil {
		t.Fatal("after DEL:", err)
	}
	kit.Exchange(t, again, server.MustAccept(), 1<<12)
}

func TestTheDaemonIsAskedWhatItNeedsAndNoMore(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	p := kit.NewPod(t)
	annotations := injected("traffic.sidecar.istio.io/excludeOutboundPorts", "3306", "example.com/huge", strings.Repeat("x", 256<<10-200)) // all that Kubernetes allows
	n.mustAdd(n.network("net", "1.1.0"), sandbox(p, "c1", "eth0", annotations))
	for _, r := range n.seen {
		if r.Verb != agentapi.Add {
			continue
		}
		if r.Pod.Namespace != "shop" || r.Pod.Name != "cart-0" || r.Pod.UID != "u-1" || r.Attachment != (agentapi.Attachment{Network: "net", ContainerID: "c1", Interface: "eth0"}) {
			t.Errorf("asked about %+v, %+v", r.Pod, r.Attachment)
		}
		if len(r.Pod.Annotations) != 2 || r.Pod.Annotations["traffic.sidecar.istio.io/excludeOutboundPorts"] != "3306" {
			t.Errorf("the annotations are %v", r.Pod.Annotations)
		}
	}
	if text, _ := os.ReadFile(n.log); strings.Contains(string(text), "secret") {
		t.Error("the log holds a foreign annotation")
	}
}

func TestAPodOutsideTheMeshStartsUntouched(t *testing.T) {
	for _, version := range []string{"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		n := newNode(t)
		n.daemon(func(agentapi.Request) agentapi.Answer {
			return agentapi.Answer{Decision: agentapi.Skip, Reason: "it has no proxy"}
		})
		p := kit.NewPod(t)
		list, rt := n.network("net", version), sandbox(p, "c1", "eth0", map[string]string{})
		result := n.mustAdd(list, rt)
		if result.Version() != version {
			t.Errorf("%s: the result is of version %s", version, result.Version())
		}
		n.mustDel(list, rt)
		if n.enrolled(p) || n.attachments() != 0 {
			t.Errorf("%s: it is enrolled", version)
		}
	}
}

func TestTheFirstPluginsResultIsPassedOn(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0"} {
		p := kit.NewPod(t)
		bridge := map[string]any{
			"type": "bridge", "bridge": fmt.Sprintf("slt%d", os.Getpid()), "ipam": map[string]any{
				"type": "host-local", "dataDir": n.dir, "ranges": [][]map[string]string{{{"subnet": "10.98.7.0/24"}}},
			},
		}
		list, rt := n.network("chain", version, bridge), sandbox(p, "c"+version, "net9", injected())
		host := kit.NewNS(t, "host") // the bridge is made where the plugin runs
		var result types.Result
		err := host.Do(func() (err error) {
			result, err = n.add(list, rt)
			return err
		})
		if err != nil {
			t.Fatal(version, err)
		}
		got, err := types100.NewResultFromResult(result)
		if err != nil {
			t.Fatal(err)
		}
		_, subnet, _ := net.ParseCIDR("10.98.7.0/24")
		if len(got.IPs) != 1 || !subnet.Contains(got.IPs[0].Address.IP) || result.Version() != version {
			t.Errorf("%s: the result is %+v", version, result)
		}
		if !n.enrolled(p) {
			t.Errorf("%s: the pod is not enrolled", version)
		}
		if err := host.Do(func() error { n.mustDel(list, rt); return nil }); err != nil {
			t.Fatal(err)
		}
		if n.enrolled(p) {
			t.Errorf("%s: DEL leaves it enrolled", version)
		}
	}
}

func TestAPodIsUnenrolledWithItsLastAttachment(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	list, other := n.network("net", "1.0.0"), n.network("storage", "1.0.0")
	p := kit.NewPod(t)
	eth0, net1 := sandbox(p, "c1", "eth0", injected()), sandbox(p, "c1", "net1", injected())
	n.mustAdd(list, eth0)
	n.mustAdd(other, net1)
	n.mustDel(other, net1)
	if !n.enrolled(p) || n.attachments() != 1 {
		t.Error("DEL net1 un-enrols a pod that has eth0")
	}
	n.mustDel(list, eth0)
	if n.enrolled(p) || n.attachments() != 0 {
		t.Error("the last DEL leaves it enrolled")
	}
}

func TestAnOldSandboxsDELLeavesTheNewOneEnrolled(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	list := n.network("net", "1.0.0")
	before, after := kit.NewPod(t), kit.NewPod(t)
	c1, c2 := sandbox(before, "c1", "eth0", injected()), sandbox(after, "c2", "eth0", injected())
	n.mustAdd(list, c1)
	n.mustAdd(list, c2)
	n.mustDel(list, c1)
	c1.NetNS = ""
	n.mustDel(list, c1)
	if n.enrolled(before) || !n.enrolled(after) || n.attachments() != 1 {
		t.Error("DEL c1 twice: c1 enrolled:", n.enrolled(before), "c2 enrolled:", n.enrolled(after), "attachments:", n.attachments())
	}
}

func TestDELNeedsNeitherNamespaceNorDaemonNorDatapath(t *testing.T) {
	n := newNode(t)
	list := n.network("net", "1.0.0")
	p := kit.NewPod(t)
	rt := sandbox(p, "never-added", "eth0", nil)
	n.mustDel(list, rt)
	rt.NetNS = "/proc/1/no/such/netns"
	n.mustDel(list, rt)
	n.bpffs += "-not-there"
	n.mustDel(n.network("net", "1.0.0"), rt)
}

func TestGCTouchesItsOwnNetworksAttachmentsOnly(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	mine, other := n.network("mine", "1.1.0"), n.network("other", "1.1.0")
	stale, valid, foreign := kit.NewPod(t), kit.NewPod(t), kit.NewPod(t)
	n.mustAdd(mine, sandbox(stale, "c1", "eth0", injected()))
	n.mustAdd(mine, sandbox(valid, "c2", "eth0", injected()))
	n.mustAdd(other, sandbox(foreign, "c3", "eth0", injected()))
	for range 2 {
		// libcni's own GC calls DEL for what its cache holds: ask the plugin alone.
		if err := n.gc(mine, "c2", "eth0"); err != nil {
			t.Fatal("GC:", err)
		}
		if n.enrolled(stale) || !n.enrolled(valid) || !n.enrolled(foreign) || n.attachments() != 2 {
			t.Error("after GC: stale", n.enrolled(stale), "valid", n.enrolled(valid), "foreign", n.enrolled(foreign), n.attachments())
		}
	}
}

func TestCHECKFindsWhatIsMissing(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	list := n.network("net", "1.0.0")
	p := kit.NewPod(t)
	rt := sandbox(p, "c1", "eth0", injected())
	check := func() error { return n.libcni.CheckNetworkList(t.Context(), list, rt) }
	n.mustAdd(list, rt)
	if err := check(); err != nil {
		t.Error(err)
	}
	if _, err := n.d.Unenroll(p.Cookie(), p.NetNS); err != nil {
		t.Fatal(err)
	}
	if err := check(); err == nil || !strings.Contains(err.Error(), "not as it should be") {
		t.Error("CHECK of a pod that is not enrolled any more:", err)
	}
}

func TestSTATUSDoesNotFailForWantOfADaemon(t *testing.T) {
	n := newNode(t)
	if err := n.libcni.GetStatusNetworkList(t.Context(), n.network("net", "1.1.0")); err != nil {
		t.Error(err)
	}
}

func code(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

func TestWithoutADaemon(t *testing.T) {
	for _, tt := range []struct {
		name        string
		state       func(*agentapi.State) // nil: no file
		noState     bool
		annotations map[string]string
		enrolled    bool
		code        uint
		says        string
	}{
		{name: "a pod of the mesh is enrolled provisionally", annotations: injected(), enrolled: true},
		{name: "a pod that the injector left alone starts untouched", annotations: map[string]string{}},
		{name: "a pod of an excluded namespace starts untouched", state: func(s *agentapi.State) { s.Mesh.ExcludedNamespaces = []string{"shop"} }, annotations: injected()},
		{name: "no annotations, a namespace outside the mesh", state: func(s *agentapi.State) { s.Namespaces = map[string]bool{"shop": false} }},
		{name: "no annotations, a namespace in the mesh", state: func(s *agentapi.State) { s.Namespaces = map[string]bool{"shop": true} }, code: types.ErrTryAgainLater, says: "has to wait"},
		{name: "no annotations, an unknown namespace", code: types.ErrTryAgainLater, says: "shop/cart-0"},
		{name: "nothing is known, at boot", noState: true, code: types.ErrTryAgainLater, says: "state file"},
		{name: "at boot, a pod of the mesh waits", noState: true, annotations: injected(), code: types.ErrTryAgainLater},
		{name: "at boot, a pod outside the mesh starts", noState: true, annotations: map[string]string{"a": "b"}},
		{name: "annotations that cannot be obeyed", annotations: injected("sidecar.istio.io/interceptionMode", "MAYBE"), code: 100, says: "MAYBE"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			if !tt.noState {
				n.leaveState(tt.state)
			}
			p := kit.NewPod(t)
			began := time.Now()
			_, err := n.add(n.network("net", "1.0.0"), sandbox(p, "c1", "eth0", tt.annotations))
			if took := time.Since(began); took > 10*time.Second {
				t.Error("ADD takes", took)
			}
			if code(err) != tt.code || tt.code != 0 && !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Errorf("the error is %v, code %d; want code %d and %q", err, code(err), tt.code, tt.says)
			}
			if got := n.enrolled(p); got != tt.enrolled {
				t.Errorf("enrolled: %v, want %v", got, tt.enrolled)
			}
			all, _ := n.d.Attachments()
			if tt.enrolled && (len(all) != 1 || !all[0].Provisional) || !tt.enrolled && len(all) != 0 {
				t.Errorf("the attachments are %+v", all)
			}
		})
	}
}

func TestADDThatFailsLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	p := kit.NewPod(t)
	rt := sandbox(p, "c1", "eth0", injected())
	lo := func(state string) {
		if err := p.Do(func() error { return linkSet("lo", state == "up") }); err != nil {
			t.Fatal(err)
		}
	}
	lo("down") // nothing can be captured there
	_, err := n.add(n.network("net", "1.0.0"), rt)
	lo("up")
	if code(err) != 101 || !strings.Contains(err.Error(), "lo interface is down") {
		t.Errorf("the error is %v", err)
	}
	if n.enrolled(p) || n.attachments() != 0 {
		t.Error("something is left")
	}
	rt.NetNS = "/proc/1/no/such/netns"
	if _, err := n.add(n.network("net", "1.0.0"), rt); code(err) != types.ErrInvalidNetNS {
		t.Errorf("a namespace that is not there: %v", err)
	}
}

func TestManyADDsAtOnce(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	list := n.network("net", "1.0.0")
	pods := make([]*kit.Pod, 100)
	for i := range pods {
		pods[i] = kit.NewPod(t)
	}
	var wait sync.WaitGroup
	for i, p := range pods {
		wait.Go(func() {
			rt := sandbox(p, fmt.Sprint("c", i), "eth0", injected())
			_, err := n.add(list, rt)
			for range 5 { // on a machine that has no time, runtimes try again
				if code(err) == types.ErrTryAgainLater {
					_, err = n.add(list, rt)
				}
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	for i, p := range pods {
		if !n.enrolled(p) {
			t.Error("pod", i, "is not enrolled")
		}
	}
	for i, p := range pods {
		wait.Go(func() { n.mustDel(list, sandbox(p, fmt.Sprint("c", i), "eth0", nil)) })
	}
	wait.Wait()
	if n.attachments() != 0 {
		t.Error(n.attachments(), "attachments are left")
	}
}

func TestBrokenStdinIsAnErrorOfTheSpecification(t *testing.T) {
	n := newNode(t)
	for _, stdin := range []string{"", "{", "[]", `{"cniVersion":"1.0.0","name":"x","type":"sluice-cni","prevResult":7}`, `{"cniVersion":"9.9.9","name":"x","type":"sluice-cni"}`} {
		out, err := n.raw(t, "ADD", stdin)
		if err == nil || !strings.Contains(out, `"code"`) || strings.Contains(out, "goroutine") {
			t.Errorf("%q: %v, %s", stdin, err, out)
		}
	}
}
