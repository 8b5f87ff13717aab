// Package agent tests the node daemon and the plugin together, each as a process
// of its own, in real namespaces, beside an API server that says what a test wants.
package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// bin is a directory with daemon and plugin, as they are shipped.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	kit.HoldAndExit()
	dir, err := os.MkdirTemp("", "sluice-agent-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir, "../../cmd/sluice-cni", "../../cmd/sluiced")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build daemon and plugin: %v: %s", err, out)
		return 1
	}
	bin = dir
	return kit.Run(m)
}

// node is a place for daemons and plugins to meet.
type node struct {
	t          *testing.T
	api        *apiServer
	dir, bpffs string
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir()}
	n.bpffs = filepath.Join(kit.BPFFS(t), "agent-"+strings.ToLower(t.Name()))
	n.api = newAPI(t)
	t.Cleanup(n.down)
	return n
}

// daemon is a process of sluiced.
type daemon struct {
	t       *testing.T
	cmd     *exec.Cmd
	address string
	ended   bool
}

// start starts a daemon, and ends it with the test.
func (n *node) start(args ...string) *daemon {
	n.t.Helper()
	return n.startAs(func(*exec.Cmd) {}, args...)
}

// startAs is start with something changed about the process.
func (n *node) startAs(change func(*exec.Cmd), args ...string) *daemon {
	n.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	d := &daemon{t: n.t, address: l.Addr().String()}
	l.Close()
	d.cmd = exec.Command(filepath.Join(bin, "sluiced"), append([]string{"--node", "n1", "--kubeconfig", n.api.kubeconfig, "--run-dir", n.dir,
		"--bpffs", n.bpffs, "--cgroup", kit.Cgroup(n.t), "--listen", d.address, "--resync", "5s"}, args...)...)
	d.cmd.Stderr = n.t.Output()
	change(d.cmd)
	if err := d.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(d.kill)
	return d
}

// kill ends it as kill -9 does.
func (d *daemon) kill() {
	if !d.ended {
		d.ended = true
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait()
	}
}

// readyz is what it says of itself.
func (d *daemon) readyz() (status int, text string) {
	response, err := http.Get("http://" + d.address + "/readyz")
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	return response.StatusCode, string(body)
}

// get is what it serves at a path.
func (d *daemon) get(path string) string {
	d.t.Helper()
	response, err := http.Get("http://" + d.address + path)
	if err != nil {
		d.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		d.t.Fatal(path, ": ", response.Status, err)
	}
	return string(body)
}

func (d *daemon) awaitReady() *daemon {
	d.t.Helper()
	kit.Eventually(d.t, "the daemon is ready", func() bool { status, _ := d.readyz(); return status == http.StatusOK })
	return d
}

func (n *node) socket() string { return agentapi.SocketPath(n.dir) }

// isGone wants nothing of the daemon's to be left in its directory.
func (n *node) isGone() {
	n.t.Helper()
	left, err := os.ReadDir(n.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, e := range left {
		n.t.Errorf("%s is left in the daemon's directory", e.Name())
	}
}

// isDown wants nothing of the datapath's to be left.
func (n *node) isDown() {
	n.t.Helper()
	if _, err := os.Stat(n.bpffs); !errors.Is(err, fs.ErrNotExist) {
		n.t.Error("something is left of the datapath:", err)
	}
}

// down removes the datapath, as a reboot does.
func (n *node) down() {
	n.t.Helper()
	if _, err := datapath.Down(n.bpffs); err != nil {
		n.t.Fatal(err)
	}
}

// add runs the plugin's ADD for a pod.
func (n *node) add(p *kit.Pod, name, uid string, annotations map[string]string) (stdout string, err error) {
	n.t.Helper()
	entry := map[string]any{
		"cniVersion": "1.0.0", "name": "net", "type": "sluice-cni", "socket": n.socket(),
		"stateFile": agentapi.StatePath(n.dir), "bpffs": n.bpffs, "logFile": filepath.Join(n.dir, "log"),
	}
	if annotations != nil {
		entry["runtimeConfig"] = map[string]any{"io.kubernetes.cri.pod-annotations": annotations}
	}
	text, err := json.Marshal(entry)
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := addCommand(filepath.Join(bin, "sluice-cni"), p, name, uid)
	cmd.Stdin = bytes.NewReader(text)
	out, err := cmd.Output()
	return string(out), err
}

// addCommand is the plugin as a runtime starts it.
func addCommand(plugin string, p *kit.Pod, name, uid string) *exec.Cmd {
	cmd := exec.Command(plugin)
	cmd.Env = append(os.Environ(), "CNI_COMMAND=ADD", "CNI_CONTAINERID=c-"+uid, "CNI_IFNAME=eth0", "CNI_PATH="+bin,
		fmt.Sprintf("CNI_NETNS=/proc/%d/fd/%d", os.Getpid(), p.Fd()),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME="+name+";K8S_POD_UID="+uid)
	return cmd
}

func (n *node) mustAdd(p *kit.Pod, name, uid string, annotations map[string]string) {
	n.t.Helper()
	if out, err := n.add(p, name, uid, annotations); err != nil {
		n.t.Fatal("ADD:", err, out)
	}
}

// look opens the datapath for a moment.
func (n *node) look(see func(*datapath.Datapath)) {
	n.t.Helper()
	d, err := datapath.Open(datapath.Options{Dir: n.bpffs})
	if err != nil {
		n.t.Fatal(err)
	}
	defer d.Close()
	see(d)
}

func (n *node) enrolled(p *kit.Pod) (yes, provisional bool) {
	n.t.Helper()
	n.look(func(d *datapath.Datapath) {
		pods, err := d.Pods()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, pod := range pods {
			yes = yes || pod.Cookie == p.Cookie()
		}
		attachments, err := d.Attachments()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, a := range attachments {
			provisional = provisional || a.Cookie == p.Cookie() && a.Provisional
		}
	})
	return yes, provisional
}
