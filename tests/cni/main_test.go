// Package cni tests the plugin as a runtime runs it: through libcni, as a process
// of its own, in real namespaces.
package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

const pluginName = "sluice-cni"

// bin is a directory with the plugin, as it is shipped.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	kit.HoldAndExit()
	dir, err := os.MkdirTemp("", "sluice-cni-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir, "../../cmd/"+pluginName)
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the plugin: %v: %s", err, out)
		return 1
	}
	bin = dir
	return kit.Run(m)
}

// node is one node: a datapath, a place for the daemon's socket and state, and a
// directory with the plugin.
type node struct {
	t      testing.TB
	d      *datapath.Datapath
	dir    string
	socket string
	state  string
	log    string
	bpffs  string
	libcni *libcni.CNIConfig

	mu   sync.Mutex
	seen []agentapi.Request
}

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir()}
	n.bpffs = filepath.Join(kit.BPFFS(t), "cni-"+filepath.Base(filepath.Dir(n.dir))+"-"+filepath.Base(n.dir))
	n.d = kit.OwnDatapath(t, datapath.Options{Dir: n.bpffs})
	n.socket, n.state, n.log = filepath.Join(n.dir, "s"), filepath.Join(n.dir, "state.json"), filepath.Join(n.dir, "log")
	n.libcni = libcni.NewCNIConfigWithCacheDir([]string{bin, "/usr/lib/cni"}, filepath.Join(n.dir, "cache"), nil)
	return n
}

// entry is ours in a conflist.
func (n *node) entry() map[string]any {
	return map[string]any{
		"type": pluginName, "socket": n.socket, "stateFile": n.state, "bpffs": n.bpffs, "logFile": n.log,
		"capabilities": map[string]bool{"io.kubernetes.cri.pod-annotations": true},
	}
}

// network is a conflist of the given name and version, with plugins before ours.
func (n *node) network(name, cniVersion string, before ...map[string]any) *libcni.NetworkConfigList {
	n.t.Helper()
	return n.networkWith(name, cniVersion, nil, before...)
}

// networkWith is network with more in our entry.
func (n *node) networkWith(name, cniVersion string, more map[string]any, before ...map[string]any) *libcni.NetworkConfigList {
	n.t.Helper()
	entry := n.entry()
	maps.Copy(entry, more)
	text, err := json.Marshal(map[string]any{"cniVersion": cniVersion, "name": name, "plugins": append(before, entry)})
	if err != nil {
		n.t.Fatal(err)
	}
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		n.t.Fatal(err)
	}
	return list
}

// sandbox is how a runtime names a pod's interface.
func sandbox(p *kit.Pod, container, ifname string, annotations map[string]string) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{
		ContainerID: container,
		NetNS:       fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.Fd()),
		IfName:      ifname,
		Args:        [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", "cart-0"}, {"K8S_POD_UID", "u-1"}},
	}
	if annotations != nil {
		rt.CapabilityArgs = map[string]any{"io.kubernetes.cri.pod-annotations": annotations}
	}
	return rt
}

// injected are the annotations of a pod that Istio's injector made a sidecar pod.
func injected(more ...string) map[string]string {
	out := map[string]string{"sidecar.istio.io/status": "{}", "example.com/foreign": "secret"}
	for i := 0; i+1 < len(more); i += 2 {
		out[more[i]] = more[i+1]
	}
	return out
}

// daemon serves the node's socket with these answers until the test ends.
func (n *node) daemon(answer func(agentapi.Request) agentapi.Answer) {
	n.t.Helper()
	log := logrus.New()
	log.SetOutput(n.t.Output())
	server, err := agentapi.Listen(n.socket, handler(func(r agentapi.Request) agentapi.Answer {
		n.mu.Lock()
		n.seen = append(n.seen, r)
		n.mu.Unlock()
		if r.Verb != agentapi.Add {
			return agentapi.Answer{}
		}
		return answer(r)
	}), log)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(ctx); err != nil {
			n.t.Error(err)
		}
	}()
	n.t.Cleanup(func() { cancel(); <-done })
}

type handler func(agentapi.Request) agentapi.Answer

func (h handler) Handle(_ context.Context, r agentapi.Request, _ *os.File) agentapi.Answer {
	return h(r)
}

func enrolls(agentapi.Request) agentapi.Answer {
	r := rules.Default()
	return agentapi.Answer{Decision: agentapi.Enroll, Rules: &r}
}

// leaveState writes the state file of a daemon that has gone.
func (n *node) leaveState(change func(*agentapi.State)) {
	n.t.Helper()
	s := agentapi.State{Version: agentapi.StateVersion, BPFFS: n.bpffs, Mesh: mesh.DefaultConfig()}
	if change != nil {
		change(&s)
	}
	text, err := json.Marshal(s)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(n.state, text, 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) add(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (types.Result, error) {
	ctx, cancel := context.WithTimeout(n.t.Context(), 20*time.Second)
	defer cancel()
	return n.libcni.AddNetworkList(ctx, list, rt)
}

func (n *node) mustAdd(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) types.Result {
	n.t.Helper()
	result, err := n.add(list, rt)
	if err != nil {
		n.t.Fatal("ADD:", err)
	}
	return result
}

func (n *node) mustDel(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := n.libcni.DelNetworkList(ctx, list, rt); err != nil {
		n.t.Error("DEL:", err)
	}
}

// enrolled says whether a pod's namespace is in the map and complete.
func (n *node) enrolled(p *kit.Pod) bool {
	n.t.Helper()
	pods, err := n.d.Pods()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, pod := range pods {
		if pod.Cookie == p.Cookie() {
			if err := n.d.CheckPod(p.Cookie()); err != nil {
				n.t.Error(err)
			}
			return true
		}
	}
	return false
}

// attachments is how many are recorded.
func (n *node) attachments() int {
	n.t.Helper()
	all, err := n.d.Attachments()
	if err != nil {
		n.t.Fatal(err)
	}
	return len(all)
}
