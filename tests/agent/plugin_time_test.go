package agent

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/sluice-mesh/sluice/tests/kit"
)

var (
	timedADDs = flag.Int("plugin.times", 10, "how many ADDs are timed")
	timeLimit = flag.Duration("plugin.p50", 0, "fail if half of the ADDs of a pod of the mesh take longer; 0: any time is good")
)

// runtimeCall is a process of the plugin as a runtime runs it: all annotations of
// the pod and the previous plugin's result on stdin.
func (n *node) runtimeCall(verb string, p *kit.Pod, name, uid string, annotations map[string]string) *exec.Cmd {
	entry := map[string]any{
		"cniVersion": "1.0.0", "name": "net", "type": "sluice-cni", "socket": filepath.Join(n.dir, "agent.sock"),
		"stateFile": filepath.Join(n.dir, "state.json"), "bpffs": n.bpffs, "logFile": filepath.Join(n.dir, "log"),
		"runtimeConfig": map[string]any{"io.kubernetes.cri.pod-annotations": annotations},
		"prevResult": map[string]any{
			"cniVersion": "1.0.0", "interfaces": []any{map[string]any{"name": "eth0", "sandbox": "/var/run/netns/x"}},
			"ips": []any{map[string]any{"address": kit.Pod4.String() + "/24", "gateway": kit.Far4.String(), "interface": 0}},
		},
	}
	text, err := json.Marshal(entry)
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(bin, "sluice-cni"))
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID=c-"+uid, "CNI_IFNAME=eth0", "CNI_PATH="+bin,
		fmt.Sprintf("CNI_NETNS=/proc/%d/fd/%d", os.Getpid(), p.Fd()),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME="+name+";K8S_POD_UID="+uid)
	cmd.Stdin = bytes.NewReader(text)
	return cmd
}

// TestTimeOfThePlugin measures whole processes: from the runtime's exec to the end
// of the process, beside a real daemon. With -v it prints what it measured.
func TestTimeOfThePlugin(t *testing.T) {
	n := newNode(t)
	n.start().awaitReady()
	took := map[string][]time.Duration{}
	timed := func(what string, cmd *exec.Cmd) {
		began := time.Now()
		out, err := cmd.CombinedOutput()
		took[what] = append(took[what], time.Since(began))
		if err != nil {
			t.Fatalf("%s: %v: %s", what, err, out)
		}
	}
	for i := range *timedADDs {
		uid := fmt.Sprint("u", i)
		p := kit.NewPod(t)
		annotations := injected("example.com/foreign", strings.Repeat("x", 4<<10))
		n.api.put("cart-"+uid, uid, annotations, func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending })
		n.api.put("plain-"+uid, "p"+uid, nil, func(p *corev1.Pod) {
			p.Spec.Containers = p.Spec.Containers[:1]
		})
		timed("VERSION", n.runtimeCall("VERSION", p, "", "", nil))
		timed("ADD of a pod outside the mesh", n.runtimeCall("ADD", p, "plain-"+uid, "p"+uid, map[string]string{}))
		timed("ADD of a pod of the mesh", n.runtimeCall("ADD", p, "cart-"+uid, uid, annotations))
		if yes, doubt := n.enrolled(p); !yes || doubt {
			t.Fatal("the pod is enrolled:", yes, "in doubt:", doubt)
		}
		timed("CHECK", n.runtimeCall("CHECK", p, "cart-"+uid, uid, annotations))
		timed("DEL", n.runtimeCall("DEL", p, "cart-"+uid, uid, annotations))
		if yes, _ := n.enrolled(p); yes {
			t.Fatal("DEL leaves the pod enrolled")
		}
	}
	for _, what := range slices.Sorted(maps.Keys(took)) {
		all := took[what]
		slices.Sort(all)
		t.Logf("%-30s min %8v  p50 %8v  p90 %8v", what, all[0].Round(time.Microsecond), all[len(all)/2].Round(time.Microsecond), all[len(all)*9/10].Round(time.Microsecond))
	}
	add := took["ADD of a pod of the mesh"]
	if p50 := add[len(add)/2]; *timeLimit > 0 && p50 > *timeLimit {
		t.Errorf("p50 of ADD is %v, and %v are allowed", p50, *timeLimit)
	}
}
