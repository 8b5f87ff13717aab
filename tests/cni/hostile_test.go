package cni

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// call runs the plugin with just this environment and input.
func (n *node) call(stdin string, env map[string]string) (stdout, stderr string, err error) {
	n.t.Helper()
	cmd := exec.CommandContext(n.t.Context(), filepath.Join(bin, pluginName))
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "CNI_PATH=" + bin}
	for key, value := range env {
		cmd.Env = append(cmd.Env, key+"="+value)
	}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// stdin is our entry as a runtime passes it on, with changes.
func (n *node) stdin(more map[string]any) string {
	n.t.Helper()
	entry := n.entry()
	entry["name"], entry["cniVersion"] = "net", "1.0.0"
	for key, value := range more {
		entry[key] = value
	}
	text, err := json.Marshal(entry)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(text)
}

// wantRefusal wants an error of the specification, of one line that a person can
// read, and nothing enrolled.
func (n *node) wantRefusal(what, stdout, stderr string, err error, p *kit.Pod) {
	n.t.Helper()
	var e types.Error
	if err == nil {
		n.t.Errorf("%s: it is taken: %s", what, stdout)
	} else if json.Unmarshal([]byte(stdout), &e) != nil || e.Code == 0 || e.Msg == "" {
		n.t.Errorf("%s: the error is no CNI error: %q", what, stdout)
	}
	if strings.Contains(stdout+stderr, "goroutine") {
		n.t.Errorf("%s: the answer is a stack trace: %s%s", what, stdout, stderr)
	}
	if n.enrolled(p) || n.attachments() != 0 {
		n.t.Errorf("%s: something is enrolled", what)
	}
}

func TestADDRefusesWhatNoRuntimeShouldSay(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	p := kit.NewPod(t)
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	right := map[string]string{
		"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0",
		"CNI_NETNS": fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.Fd()),
		"CNI_ARGS":  "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u-1",
	}
	for what, change := range map[string]map[string]string{
		"a namespace that is not there":  {"CNI_NETNS": "/proc/1/no/such"},
		"a file for a namespace":         {"CNI_NETNS": file},
		"a FIFO for a namespace":         {"CNI_NETNS": fifo},
		"a directory for a namespace":    {"CNI_NETNS": dir},
		"another kind of namespace":      {"CNI_NETNS": "/proc/self/ns/uts"},
		"the plugin's own namespace":     {"CNI_NETNS": "/proc/self/ns/net"},
		"no namespace":                   {"CNI_NETNS": ""},
		"no container":                   {"CNI_CONTAINERID": ""},
		"a container with a path":        {"CNI_CONTAINERID": "../../etc"},
		"no interface":                   {"CNI_IFNAME": ""},
		"an interface with a path":       {"CNI_IFNAME": "../eth0"},
		"an interface with a space":      {"CNI_IFNAME": "eth 0"},
		"an interface that is too long":  {"CNI_IFNAME": strings.Repeat("e", 16)},
		"an unknown verb":                {"CNI_COMMAND": "FORMAT"},
		"arguments without values":       {"CNI_ARGS": "K8S_POD_NAMESPACE"},
		"arguments of two equals signs":  {"CNI_ARGS": "K8S_POD_NAMESPACE=a=b;K8S_POD_NAME=c"},
		"a flag that is no truth":        {"CNI_ARGS": "IgnoreUnknown=perhaps;K8S_POD_NAMESPACE=a;K8S_POD_NAME=c"},
		"arguments that nobody has made": {"CNI_ARGS": strings.Repeat(";;=", 1000)},
	} {
		env := map[string]string{}
		for key, value := range right {
			env[key] = value
		}
		for key, value := range change {
			env[key] = value
		}
		stdout, stderr, err := n.call(n.stdin(nil), env)
		n.wantRefusal(what, stdout, stderr, err, p)
	}
	for what, stdin := range map[string]string{
		"nothing": "", "half a text": `{"cniVersion":`, "a list": `[]`, "a number": `7`, "no text": "\x00\x01\x02",
		"no name":                         `{"cniVersion":"1.0.0","type":"sluice-cni"}`,
		"a name with a path":              n.stdin(map[string]any{"name": "../x"}),
		"a version of the future":         n.stdin(map[string]any{"cniVersion": "9.9.9"}),
		"a version that is none":          n.stdin(map[string]any{"cniVersion": "one"}),
		"a socket that is a number":       n.stdin(map[string]any{"socket": 7}),
		"annotations that are a list":     n.stdin(map[string]any{"runtimeConfig": map[string]any{"io.kubernetes.cri.pod-annotations": []int{1}}}),
		"a result that is a number":       n.stdin(map[string]any{"prevResult": 7}),
		"a result with half an address":   n.stdin(map[string]any{"prevResult": map[string]any{"ips": []any{map[string]any{"address": "10.0.0"}}}}),
		"a text that is nested very deep": strings.Repeat(`{"a":`, 20000) + "1" + strings.Repeat("}", 20000),
	} {
		stdout, stderr, err := n.call(stdin, right)
		n.wantRefusal(what, stdout, stderr, err, p)
	}
	if stdout, stderr, err := n.call(n.stdin(nil), right); err != nil || !n.enrolled(p) {
		t.Error("what is right is refused too:", err, stdout, stderr)
	}
}

// A pod that cannot be enrolled as it asks is refused with a sentence, however
// long its annotations are.
func TestAnAnnotationThatCannotBeObeyedIsNotRepeatedAtLength(t *testing.T) {
	n := newNode(t)
	n.leaveState(nil)
	p := kit.NewPod(t)
	huge := strings.Repeat("nonsense,", 20<<10)
	_, err := n.add(n.network("net", "1.0.0"), sandbox(p, "c1", "eth0", injected("traffic.sidecar.istio.io/excludeOutboundPorts", huge)))
	if code(err) != 100 || len(err.Error()) > 4<<10 || !strings.Contains(err.Error(), "excludeOutboundPorts") {
		t.Errorf("code %d, %d bytes: %.300v", code(err), len(fmt.Sprint(err)), err)
	}
	if text, _ := os.ReadFile(n.log); len(text) > 8<<10 {
		t.Errorf("the log has %d bytes", len(text))
	}
}

// DEL and GC are about what is there, and take nearly everything.
func TestDELAndGCFailForNothingButTheirInput(t *testing.T) {
	n := newNode(t)
	for what, env := range map[string]map[string]string{
		"no namespace":          {"CNI_NETNS": ""},
		"one that is gone":      {"CNI_NETNS": "/proc/1/no/such"},
		"one that is a file":    {"CNI_NETNS": "/etc/hostname"},
		"broken arguments":      {"CNI_ARGS": "=;=;"},
		"the machine's own":     {"CNI_NETNS": "/proc/1/ns/net"},
		"a very long container": {"CNI_CONTAINERID": strings.Repeat("c", 500)},
	} {
		all := map[string]string{"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}
		for key, value := range env {
			all[key] = value
		}
		if stdout, stderr, err := n.call(n.stdin(map[string]any{"prevResult": map[string]any{"ips": "none"}}), all); err != nil {
			t.Errorf("DEL, %s: %v: %s%s", what, err, stdout, stderr)
		}
	}
	gone := n.stdin(map[string]any{"cniVersion": "1.1.0", "bpffs": n.bpffs + "-gone"})
	for what, stdin := range map[string]string{
		"nothing valid": n.stdin(map[string]any{"cniVersion": "1.1.0"}), "no datapath": gone,
		"names of no one": n.stdin(map[string]any{"cniVersion": "1.1.0", "cni.dev/valid-attachments": []map[string]string{{"containerID": "", "ifname": strings.Repeat("x", 999)}}}),
	} {
		if stdout, stderr, err := n.call(stdin, map[string]string{"CNI_COMMAND": "GC"}); err != nil {
			t.Errorf("GC, %s: %v: %s%s", what, err, stdout, stderr)
		}
	}
	for _, verb := range []string{"DEL", "GC", "STATUS"} {
		stdout, _, err := n.call("{", map[string]string{"CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"})
		if err == nil || !strings.Contains(stdout, `"code"`) {
			t.Errorf("%s with unusable input: %v, %s", verb, err, stdout)
		}
	}
}

// STATUS is asked every few seconds, and an error makes the node NotReady.
func TestSTATUSSaysWhatIsMissingAndFailsForNothing(t *testing.T) {
	n := newNode(t)
	status := map[string]string{"CNI_COMMAND": "STATUS"}
	for what, tt := range map[string]struct {
		more map[string]any
		says string
	}{
		"no daemon":   {nil, "the node daemon does not answer"},
		"no datapath": {map[string]any{"bpffs": n.bpffs + "-gone"}, "sluice is not up"},
	} {
		more := map[string]any{"cniVersion": "1.1.0"}
		for key, value := range tt.more {
			more[key] = value
		}
		stdout, stderr, err := n.call(n.stdin(more), status)
		if err != nil || stdout != "" || !strings.Contains(stderr, tt.says) || strings.Count(stderr, "\n") > 2 {
			t.Errorf("%s: %v, stdout %q, stderr %q; want one with %q", what, err, stdout, stderr, tt.says)
		}
	}
	n.daemon(enrolls)
	if stdout, stderr, err := n.call(n.stdin(map[string]any{"cniVersion": "1.1.0"}), status); err != nil || stdout+stderr != "" {
		t.Errorf("all is well: %v, %q", err, stdout+stderr)
	}
}

// results are what plugins before ours say, in the form of each version.
var results = map[string]string{
	"0.1.0": `{"ip4":{"ip":"10.1.2.3/24","gateway":"10.1.2.1","routes":[{"dst":"0.0.0.0/0"}]},"dns":{"nameservers":["10.96.0.10"]}}`,
	"0.2.0": `{"ip4":{"ip":"10.1.2.3/24","gateway":"10.1.2.1"},"ip6":{"ip":"fd00::3/64"},"dns":{}}`,
	"0.3.0": `{"interfaces":[{"name":"eth0","mac":"00:11:22:33:44:55","sandbox":"/var/run/netns/x"}],"ips":[{"version":"4","interface":0,"address":"10.1.2.3/24","gateway":"10.1.2.1"}],"dns":{}}`,
	"0.3.1": `{"interfaces":[{"name":"eth0","sandbox":"/var/run/netns/x"}],"ips":[{"version":"4","interface":0,"address":"10.1.2.3/24"}],"routes":[{"dst":"0.0.0.0/0","gw":"10.1.2.1"}],"dns":{"search":["a"]}}`,
	"0.4.0": `{"interfaces":[{"name":"eth0","sandbox":"/var/run/netns/x"}],"ips":[{"version":"6","interface":0,"address":"fd00::3/64"}],"dns":{}}`,
	"1.0.0": `{"interfaces":[{"name":"eth0","sandbox":"/var/run/netns/x"}],"ips":[{"interface":0,"address":"10.1.2.3/24"}],"dns":{},"example.com/more":{"kept":true}}`,
	"1.1.0": `{"interfaces":[{"name":"eth0","mtu":9001,"sandbox":"/var/run/netns/x","pciID":"0000:00:01.0"}],"ips":[{"interface":0,"address":"10.1.2.3/24"}],"routes":[{"dst":"10.0.0.0/8","mtu":1400,"priority":7}],"dns":{}}`,
}

func TestTheResultBeforeIsPassedOnInEveryVersion(t *testing.T) {
	n := newNode(t)
	n.daemon(func(r agentapi.Request) agentapi.Answer {
		if r.Pod.Name == "plain" {
			return agentapi.Answer{Decision: agentapi.Skip, Reason: "it has no proxy"}
		}
		return enrolls(r)
	})
	p := kit.NewPod(t)
	for version, text := range results {
		for _, pod := range []string{"plain", "cart-0", ""} { // the last is no pod of Kubernetes
			var before, after map[string]any
			if err := json.Unmarshal([]byte(text), &before); err != nil {
				t.Fatal(err)
			}
			before["cniVersion"] = version // as libcni does
			env := map[string]string{
				"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0",
				"CNI_NETNS": fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.Fd()),
			}
			if pod != "" {
				env["CNI_ARGS"] = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=" + pod
			}
			stdout, stderr, err := n.call(n.stdin(map[string]any{"cniVersion": version, "prevResult": before}), env)
			if err != nil {
				t.Errorf("%s, pod %q: %v: %s%s", version, pod, err, stdout, stderr)
				continue
			}
			if err := json.Unmarshal([]byte(stdout), &after); err != nil {
				t.Errorf("%s, pod %q: the result is no JSON: %s", version, pod, stdout)
			}
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("%s, pod %q: the result is another: %s", version, pod, diff)
			}
			env["CNI_COMMAND"] = "DEL"
			if _, _, err := n.call(n.stdin(map[string]any{"cniVersion": version, "prevResult": before}), env); err != nil || n.attachments() != 0 {
				t.Errorf("%s: DEL: %v, %d attachments", version, err, n.attachments())
			}
		}
	}
}

func TestVERSIONNamesEverySpecification(t *testing.T) {
	n := newNode(t)
	stdout, _, err := n.call(`{"cniVersion":"1.1.0"}`, map[string]string{"CNI_COMMAND": "VERSION"})
	for version := range results {
		if err != nil || !strings.Contains(stdout, `"`+version+`"`) {
			t.Errorf("%s is not in %s (%v)", version, stdout, err)
		}
	}
}
