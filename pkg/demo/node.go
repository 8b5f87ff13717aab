package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// The demo's people and ports.
const (
	appUID = 1000

	appPort      = 8080 // of the app, of the far server and of the node's server
	excludedOut  = 3306 // of the far server
	excludedIn   = 9090 // of the app
	demoPodSpace = "demo"
)

// annotations are the enrolled pod's, as a person would write them for Istio.
func (n *node) annotations() map[string]string {
	ranges := excluded4
	if n.ipv6 {
		ranges += "," + excluded6
	}
	return map[string]string{
		"traffic.sidecar.istio.io/excludeOutboundPorts":    fmt.Sprint(excludedOut),
		"traffic.sidecar.istio.io/excludeInboundPorts":     fmt.Sprint(excludedIn),
		"traffic.sidecar.istio.io/excludeOutboundIPRanges": ranges,
	}
}

// node is the demo's inside.
type node struct {
	cfg    nodeConfig
	tell   func(message)
	self   string   // a copy of this program that other users may run
	cgroup *os.File // where every process of the demo is
	ipv6   bool
	undo   []func() // last first

	web, far *pod
	app      *server // in web
	server   *server // in far
	host     *server // on the node itself
	proxy    *proxy  // in web
	calls    int
}

func (n *node) later(undo func()) { n.undo = append(n.undo, undo) }

// close undoes everything, in reverse.
func (n *node) close() {
	for _, undo := range slices.Backward(n.undo) {
		undo()
	}
	n.undo = nil
}

// RunNode is the inside of the demo, in the namespaces in which Run has started
// it. It ends early when ctx ends or when in, which Run keeps open, is closed.
// It tells what happens on out; the error is told there, too.
func RunNode(ctx context.Context, config string, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, in) // nothing comes but the end
		cancel()
	}()
	// When Run is gone, a write to it must not end the node before it has
	// cleaned up, as SIGPIPE does to programs that do not ask for it.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	enc, mu := json.NewEncoder(out), sync.Mutex{}
	n := &node{tell: func(m message) {
		mu.Lock()
		defer mu.Unlock()
		_ = enc.Encode(m) // Run is gone: its end is noticed through in
	}}
	if err := json.Unmarshal([]byte(config), &n.cfg); err != nil {
		return fmt.Errorf("read the demo's configuration: %w", err)
	}
	if os.Getpid() != 1 {
		return errors.New("this is a part of \"sluicectl demo\" and does nothing by itself")
	}
	err := n.run(ctx)
	n.close()
	if err != nil {
		n.tell(message{Error: err.Error()})
	}
	return err
}

func (n *node) run(ctx context.Context) error {
	if err := n.settle(); err != nil {
		return err
	}
	steps := []func(context.Context) error{
		n.makePods, n.startServers, n.before, n.up, n.captured, n.direct, n.dump, n.proxyStops, n.proxyReturns, n.down, n.after,
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

func (n *node) step(format string, args ...any) { n.tell(message{Step: fmt.Sprintf(format, args...)}) }

func (n *node) bpffs() string    { return filepath.Join(n.cfg.Dir, "bpf") }
func (n *node) datapath() string { return filepath.Join(n.bpffs(), "sluice") }

// settle makes the new namespaces a place to live in: mounts that nobody else
// sees, this PID namespace's /proc, files that vanish with the node, a bpffs.
func (n *node) settle() error {
	type mount struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}
	for _, m := range []mount{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"tmpfs", n.cfg.Dir, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s %s in a private mount namespace: %w", m.kind, m.target, err)
		}
	}
	var err error
	if n.cgroup, err = os.Open(n.cfg.Cgroup); err != nil {
		return err
	}
	n.later(n.removeOutside)
	if err := os.Mkdir(n.bpffs(), 0o700); err != nil {
		return err
	}
	if err := kernel.MountBPFFS(n.bpffs()); err != nil {
		return err
	}
	if err := n.copySelf(); err != nil {
		return fmt.Errorf("copy this program: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	n.ipv6 = haveIPv6()
	return readyForIPv6()
}

// removeOutside removes what Run has made, for the case that Run cannot any more.
func (n *node) removeOutside() {
	_ = unix.Unmount(n.cfg.Dir, unix.MNT_DETACH)
	_ = os.Remove(n.cfg.Dir) // Run looks whether it is gone, and says so if not
	n.cgroup.Close()
	poll(context.Background(), patience, func() bool {
		err := os.Remove(n.cfg.Cgroup)
		return err == nil || errors.Is(err, os.ErrNotExist)
	})
}

// copySelf makes a copy of this program that ordinary users may run, wherever
// the original is.
func (n *node) copySelf() error {
	n.self = filepath.Join(n.cfg.Dir, "sluicectl")
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(n.self, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Chmod(0o755), to.Close()) // whatever the umask
}

func (n *node) makePods(ctx context.Context) error {
	n.step("Making two pods: network namespaces, wired by the CNI plugins bridge, host-local and loopback of %s", n.cfg.Tools.CNI)
	if !n.ipv6 {
		n.tell(message{Note: "This kernel has no IPv6: only IPv4 is shown."})
	}
	var err error
	if n.web, err = n.newPod(ctx, "web"); err != nil {
		return err
	}
	if n.ipv6 {
		if err := addProxySource(n.web.ns); err != nil {
			return err
		}
	}
	n.far, err = n.newPod(ctx, "far")
	return err
}

// everywhere is the wildcard address of each family with a port.
func (n *node) everywhere(ports ...uint16) []string {
	var out []string
	for _, port := range ports {
		out = append(out, netip.AddrPortFrom(netip.IPv4Unspecified(), port).String())
		if n.ipv6 {
			out = append(out, netip.AddrPortFrom(netip.IPv6Unspecified(), port).String())
		}
	}
	return out
}

func (n *node) startServers(ctx context.Context) error {
	about := func(p *pod) string {
		if p.v6.IsValid() {
			return fmt.Sprintf("%s (%s, %s)", p.name, p.v4, p.v6)
		}
		return fmt.Sprintf("%s (%s)", p.name, p.v4)
	}
	n.step("Starting an app in pod %s, a server in pod %s and one on the node, as UID %d; in %s also %s, the proxy", about(n.web), about(n.far), appUID, n.web.name, haproxyVersion(ctx, n.cfg.Tools.HAProxy))
	var err error
	if n.app, err = n.startServer(ctx, place{n.web.ns, appUID}, n.everywhere(appPort, excludedIn)...); err != nil {
		return err
	}
	if n.server, err = n.startServer(ctx, place{n.far.ns, appUID}, n.everywhere(appPort, excludedOut)...); err != nil {
		return err
	}
	if n.host, err = n.startServer(ctx, place{nil, appUID}, n.everywhere(appPort)...); err != nil {
		return err
	}
	if n.proxy, err = n.startProxy(ctx, n.web); err != nil {
		return err
	}
	if n.ipv6 {
		n.tell(message{Note: "HAProxy asks where a connection was going for IPv4 only. For outbound IPv6 a helper\nof the demo's asks in its place, and tells it in a header of the PROXY protocol."})
	}
	n.equal("the proxy's privileges", "UID 1337, GID 1337, no capabilities", identity(n.proxy.cmd.Process.Pid))
	return nil
}

// up loads Sluice and enrols web, with HAProxy running as "sluicectl up" and
// "sluicectl enroll" would find it.
func (n *node) up(ctx context.Context) error {
	n.step("sluicectl up; sluicectl enroll --netns web, without ports %d (out), %d (in) and range %s", excludedOut, excludedIn, excluded4)
	d, err := datapath.Up(datapath.Options{Dir: n.datapath(), Cgroup: n.cfg.Cgroup})
	if err != nil {
		return err
	}
	defer d.Close()
	if n.cfg.Break == BreakProxy {
		n.proxy.stop()
	}
	if n.cfg.Break == BreakEnroll {
		return nil
	}
	applied, err := mesh.Apply(rules.Default(), n.annotations())
	if err != nil {
		return err
	}
	_, err = d.Enroll(n.web.ns, datapath.Pod{Namespace: demoPodSpace, Name: n.web.name, Rules: applied.Rules})
	return err
}
