package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// Crash tests run a plugin that is built with failpoints, and kill it at its first
// step that changes state, at its second, and so on until it ends by itself.

var mortal = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(bin, "mortal", pluginName)
	build := exec.Command("go", "build", "-tags", "sluice_failpoints", "-o", path, "../../cmd/"+pluginName)
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the plugin with failpoints: %w: %s", err, out)
	}
	return path, nil
})

// run runs a plugin without libcni, which would hide a kill.
func (n *node) run(program, verb string, p *kit.Pod, container string, more map[string]any, env ...string) (stdout string, err error) {
	n.t.Helper()
	entry := n.entry()
	entry["name"], entry["cniVersion"] = "net", "1.1.0"
	entry["runtimeConfig"] = map[string]any{"io.kubernetes.cri.pod-annotations": injected()}
	for key, value := range more {
		entry[key] = value
	}
	text, err := json.Marshal(entry)
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.CommandContext(n.t.Context(), program)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_PATH="+bin)
	if p != nil {
		cmd.Env = append(cmd.Env, "CNI_CONTAINERID="+container, "CNI_IFNAME=eth0", fmt.Sprintf("CNI_NETNS=/proc/%d/fd/%d", os.Getpid(), p.Fd()),
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME="+container+";K8S_POD_UID=u-"+container)
	}
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdin = bytes.NewReader(text)
	out, err := cmd.Output()
	return string(out), err
}

// mustRun runs the plugin as it is shipped.
func (n *node) mustRun(verb string, p *kit.Pod, container string, more map[string]any) {
	n.t.Helper()
	if out, err := n.run(filepath.Join(bin, pluginName), verb, p, container, more); err != nil {
		n.t.Fatalf("%s %s: %v: %s", verb, container, err, out)
	}
}

// eachKill runs a verb again and again, and kills it one step later each time.
// before makes the state that the verb finds; after is told which step was the
// last, and is to leave what before found.
func (n *node) eachKill(verb string, atLeast int, before func() (p *kit.Pod, container string, more map[string]any), after func(kill int, step string)) {
	t := n.t
	t.Helper()
	program, err := mortal()
	if err != nil {
		t.Fatal(err)
	}
	for kill := 1; ; kill++ {
		p, container, more := before()
		steps := filepath.Join(t.TempDir(), "steps")
		out, err := n.run(program, verb, p, container, more, fmt.Sprintf("%s=%d", failpoint.KillAtEnv, kill), failpoint.StepsFileEnv+"="+steps)
		text, _ := os.ReadFile(steps)
		taken := strings.Split(strings.TrimSpace(string(text)), "\n")
		var exit *exec.ExitError
		killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		switch {
		case killed:
			after(kill, taken[len(taken)-1])
		case err != nil:
			t.Fatalf("%s, to be killed at step %d: %v: %s", verb, kill, err, out)
		default:
			if kill <= atLeast {
				t.Errorf("%s has %d steps, and should have %d at least: %q", verb, kill-1, atLeast, taken)
			}
			after(kill, "none")
			t.Logf("%s was killed at %d steps", verb, kill-1)
			return
		}
		if t.Failed() {
			t.Fatalf("after %s was killed at step %d (%s)", verb, kill, taken[len(taken)-1])
		}
	}
}

// neighbour is a pod with the same rules that must notice nothing.
type neighbour struct {
	*kit.Pod
	t             testing.TB
	proxy, server *kit.Sock
}

var farServer = netip.AddrPortFrom(kit.Far4, 80)

// newNeighbour proves that traffic flows, then enrols.
func (n *node) newNeighbour() *neighbour {
	n.t.Helper()
	q := &neighbour{Pod: kit.NewPod(n.t), t: n.t}
	q.server = q.Far.Listen(kit.Root, "0.0.0.0:80")
	direct, err := q.Dial(kit.App, unix.AF_INET, farServer)
	if err != nil {
		n.t.Fatal("without Sluice:", err)
	}
	kit.Exchange(n.t, direct, q.server.MustAccept(), 1<<10)
	n.mustRun("ADD", q.Pod, "neighbour", nil)
	q.proxy = q.Listen(kit.Proxy, "0.0.0.0:15001")
	q.isCaptured()
	return q
}

func (q *neighbour) isCaptured() {
	q.t.Helper()
	captured(q.t, q.Pod, q.proxy)
}

// captured dials from a pod and wants the proxy to get it.
func captured(t testing.TB, p *kit.Pod, proxy *kit.Sock) {
	t.Helper()
	client, err := p.Dial(kit.App, unix.AF_INET, farServer)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	accepted := proxy.MustAccept()
	defer accepted.Close()
	if dst, err := accepted.OrigDst(unix.SOL_IP); err != nil || dst != farServer {
		t.Errorf("the proxy is told %v, %v; want %v", dst, err, farServer)
	}
	kit.Exchange(t, client, accepted, 1<<10)
}

// newHeldPod is a pod that a process keeps, as a runtime's does: without one its
// namespace cannot be found by those who are not given it.
func newHeldPod(t *testing.T) *kit.Pod {
	p := kit.NewPod(t)
	p.Hold(kit.Root)
	return p
}

// sweep is what the daemon does every two minutes: strays go the second time.
func (n *node) sweep() {
	n.t.Helper()
	_, err := n.d.Sweep()
	strays, strayErr := n.d.Strays()
	if err := errors.Join(err, strayErr, n.d.DropStrays(strays)); err != nil {
		n.t.Error("sweep:", err)
	}
}

// A crash is followed by what a node does next, in each of these ways.
var sequels = []struct {
	name string
	goOn func(n *node, p *kit.Pod)
}{
	{"ADD again", func(n *node, p *kit.Pod) {
		n.mustRun("ADD", p, "c1", nil)
		if !n.enrolled(p) || n.attachments() != 2 {
			n.t.Error("the next ADD does not enroll it")
			return
		}
		proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
		captured(n.t, p, proxy)
		proxy.Close()
		n.mustRun("DEL", p, "c1", nil)
	}},
	{"DEL", func(n *node, p *kit.Pod) { n.mustRun("DEL", p, "c1", nil) }},
	{"the daemon, then DEL", func(n *node, p *kit.Pod) {
		n.sweep()
		pods, err := n.d.Pods()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, pod := range pods { // all that the maps name is complete
			if err := n.d.CheckPod(pod.Cookie); err != nil {
				n.t.Error("after the sweep:", err)
			}
		}
		n.mustRun("DEL", p, "c1", nil)
	}},
}

func TestAPluginThatIsKilledInADDLeavesNothingThatTheNextStepDoesNotMend(t *testing.T) {
	for _, sequel := range sequels {
		t.Run(sequel.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.daemon(enrolls)
			q := n.newNeighbour()
			p := newHeldPod(t)
			clean := n.kernelState(p)
			n.eachKill("ADD", 20,
				func() (*kit.Pod, string, map[string]any) { return p, "c1", nil },
				func(_ int, step string) {
					q.isCaptured()
					sequel.goOn(n, p)
					n.wantState(clean, p, step)
				})
		})
	}
}

func TestAPluginThatIsKilledInDELLeavesNothingThatTheNextStepDoesNotMend(t *testing.T) {
	for _, sequel := range sequels {
		t.Run(sequel.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.daemon(enrolls)
			q := n.newNeighbour()
			p := newHeldPod(t)
			clean := n.kernelState(p)
			n.eachKill("DEL", 20,
				func() (*kit.Pod, string, map[string]any) { n.mustRun("ADD", p, "c1", nil); return p, "c1", nil },
				func(_ int, step string) {
					q.isCaptured()
					sequel.goOn(n, p)
					n.wantState(clean, p, step)
				})
		})
	}
}

// The last pod with its rules takes the rule set along.
func TestAPluginThatIsKilledInTheLastDELLeavesNoRules(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.daemon(enrolls)
	p := kit.NewPod(t)
	clean := n.kernelState(p)
	n.eachKill("DEL", 20,
		func() (*kit.Pod, string, map[string]any) { n.mustRun("ADD", p, "c1", nil); return p, "c1", nil },
		func(_ int, step string) {
			n.mustRun("DEL", p, "c1", nil)
			n.wantState(clean, p, step)
		})
}

func TestAPluginThatIsKilledInGCIsFinishedByTheNext(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.daemon(enrolls)
	q := n.newNeighbour()
	p, other := newHeldPod(t), newHeldPod(t)
	clean, cleanOther := n.kernelState(p), n.kernelState(other)
	valid := map[string]any{"cni.dev/valid-attachments": []map[string]string{{"containerID": "neighbour", "ifname": "eth0"}}}
	n.eachKill("GC", 20,
		func() (*kit.Pod, string, map[string]any) {
			n.mustRun("ADD", p, "c1", nil)
			n.mustRun("ADD", other, "c2", nil)
			return nil, "", valid
		},
		func(_ int, step string) {
			q.isCaptured()
			n.mustRun("GC", nil, "", valid)
			n.wantState(clean, p, step)
			n.wantState(cleanOther, other, step)
		})
}

// A pod that runs gets a second interface, and the plugin dies at it.
func TestAPluginThatIsKilledInASecondADDLetsNothingOfARunningPodEscape(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.daemon(enrolls)
	q := n.newNeighbour()
	n.eachKill("ADD", 10,
		func() (*kit.Pod, string, map[string]any) { return q.Pod, "second", map[string]any{"name": "storage"} },
		func(int, string) {
			q.isCaptured()
			n.mustRun("DEL", q.Pod, "second", map[string]any{"name": "storage"})
			q.isCaptured()
			if n.attachments() != 1 {
				t.Error("attachments:", n.attachments())
			}
		})
	if err := n.d.CheckPod(q.Cookie()); err != nil {
		t.Error(err)
	}
}

// A pod whose ADD was killed and whose DEL never comes ends with its namespace.
func TestAnADDThatWasKilledEndsWithItsNamespace(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.daemon(enrolls)
	n.newNeighbour()
	var p *kit.Pod
	clean := n.kernelState(nil)
	n.eachKill("ADD", 20,
		func() (*kit.Pod, string, map[string]any) { p = kit.NewPod(t); return p, "c1", nil },
		func(int, string) {
			p.Close()
			p.Far.Close()
			kit.Eventually(t, "the sweep removes what is left", func() bool {
				n.sweep()
				return slices.Equal(n.kernelState(nil), clean)
			})
		})
}
