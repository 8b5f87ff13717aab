package agent

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

const podUID = "0a1b2c3d-0000-4000-8000-000000000001"

// drivers are the ways in which a kubelet names a pod's cgroup.
var drivers = map[string]string{
	"cgroupfs": "kubepods/burstable/pod" + podUID + "/c0ffee",
	"systemd":  "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(podUID, "-", "_") + ".slice/cri-containerd-c0ffee.scope",
}

// runsIn has processes live in a cgroup of this path, each in the namespace of
// who starts it.
func runsIn(t *testing.T, path string, in ...func(func() error) error) {
	t.Helper()
	dir := filepath.Join(kit.Cgroup(t), path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for at := dir; at != kit.Cgroup(t); at = filepath.Dir(at) {
			kit.Eventually(t, at+" is empty", func() bool {
				err := os.Remove(at)
				return err == nil || errors.Is(err, os.ErrNotExist)
			})
		}
	})
	cgroup, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	for _, start := range in {
		cmd := exec.Command("sleep", "600")
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
		if err := start(cmd.Start); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	}
}

func here(do func() error) error { return do() }

func TestAPodThatRunsOutsideTheMeshIsEnrolledInPlace(t *testing.T) {
	for driver, path := range drivers {
		t.Run(driver, func(t *testing.T) {
			n := newNode(t)
			p, stranger := kit.NewPod(t), kit.NewNS(t, "stranger")
			server, to := direct(t, p)
			// The pod has a process in the machine's namespace, and one in a
			// namespace of its own making.
			runsIn(t, path, here, stranger.Do, p.Do)
			client, accepted := goesTo(t, p, server, to) // open before
			out, in := p.Listen(kit.Proxy, "0.0.0.0:15001"), p.Listen(kit.Proxy, "0.0.0.0:15006")
			p.Hold(kit.Proxy, out, in) // the proxy runs already
			n.start().awaitReady()
			n.api.put("cart", podUID, injected())
			kit.Eventually(t, "the pod is enrolled", func() bool { yes, _ := n.enrolled(p); return yes })
			kit.Eventually(t, "an Event names the open connections", func() bool {
				return n.api.told("RedirectionRepaired", "until they end: 2 connections (") && n.api.told("RedirectionRepaired", client.Name().String()+" - 10.99.0.1:80")
			})
			goesTo(t, p, out, to)
			inbound, err := p.Far.Dial(kit.Root, unix.AF_INET, netip.AddrPortFrom(kit.Pod4, 8080))
			if err != nil {
				t.Fatal("inbound, with a listener that was open before:", err)
			}
			kit.Exchange(t, inbound, in.MustAccept(), 1<<12)
			kit.Exchange(t, client, accepted, 1<<12)
		})
	}
}

// A process of the pod's that is in no namespace with the pod's address leads to
// no enrolment, and an Event says what is wrong.
func TestANamespaceWithoutThePodsAddressIsNotEnrolled(t *testing.T) {
	n := newNode(t)
	stranger := kit.NewNS(t, "stranger")
	runsIn(t, drivers["systemd"], stranger.Do)
	n.start().awaitReady()
	n.api.put("cart", podUID, injected())
	kit.Eventually(t, "an Event says so", func() bool { return n.api.told("RedirectionMissing", "the pod is said to have [10.99.0.2]") })
	n.look(func(d *datapath.Datapath) {
		if pods, err := d.Pods(); err != nil || len(pods) != 0 {
			t.Error("enrolled are:", pods, err)
		}
	})
}

func TestOpenConnectionsOfARepairedPodAreClosedIfThatIsAsked(t *testing.T) {
	for name, args := range map[string][]string{"not asked": nil, "asked": {"--repair-reset-connections"}} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := kit.NewPod(t)
			server, to := direct(t, p)
			proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
			p.Hold(kit.Proxy, proxy)

			type pair struct{ client, server *kit.Sock }
			openBy := func(as kit.ID, family int, to netip.AddrPort, listener *kit.Sock) pair {
				client, err := p.Dial(as, family, to)
				if err != nil {
					t.Fatal(err)
				}
				p.Hold(as, client)
				return pair{client, listener.MustAccept()}
			}
			open := func(as kit.ID, listener *kit.Sock) pair { return openBy(as, unix.AF_INET, to, listener) }
			server6, to6 := p.Far.Listen(kit.Root, "[::]:80", kit.V6Only), netip.AddrPortFrom(kit.Far6, 80)
			// One that was captured before Sluice was taken away.
			earlier := kit.OwnDatapath(t, datapath.Options{})
			if _, err := earlier.Enroll(p.NetNS, datapath.Pod{Rules: rules.Default()}); err != nil {
				t.Fatal(err)
			}
			stay := map[string]pair{"captured before": open(kit.App, proxy)}
			if _, err := earlier.Unenroll(p.Cookie(), p.NetNS); err != nil {
				t.Fatal(err)
			}
			stay["the proxy's, by its user"] = open(kit.ProxyUID, server)
			stay["the proxy's, by its group"] = open(kit.ProxyGID, server)
			stay["the proxy's by IPv6"] = openBy(kit.ProxyUID, unix.AF_INET6, to6, server6)
			app := map[string]pair{
				"the app's outbound":                     open(kit.App, server),
				"the app's outbound by IPv6":             openBy(kit.App, unix.AF_INET6, to6, server6),
				"the app's outbound from an IPv6 socket": openBy(kit.App, unix.AF_INET6, to, server),
			}
			for what, at := range map[string]struct {
				family int
				listen string
				pod    netip.Addr
			}{
				"the app's inbound":         {unix.AF_INET, "0.0.0.0:8080", kit.Pod4},
				"the app's inbound by IPv6": {unix.AF_INET6, "[::]:8081", kit.Pod6},
			} {
				listener := p.Listen(kit.App, at.listen)
				client, err := p.Far.Dial(kit.Root, at.family, netip.AddrPortFrom(at.pod, listener.Name().Port()))
				if err != nil {
					t.Fatal(err)
				}
				app[what] = pair{client, listener.MustAccept()}
				p.Hold(kit.App, app[what].server)
			}

			runsIn(t, drivers["cgroupfs"], p.Do)
			n.start(args...).awaitReady()
			n.api.put("cart", podUID, injected())
			// The sixth is one that the tests' own process has open: nobody in the pod.
			says := "and so outside the mesh until they end: 6 connections"
			if args != nil {
				says = "5 of them closed, the others outside the mesh until they end: 6 connections"
			}
			kit.Eventually(t, "an Event says "+says, func() bool { return n.api.told("RedirectionRepaired", says) })

			for what, pair := range stay {
				if err := echo(pair.client, pair.server); err != nil {
					t.Error(what, "is closed:", err)
				}
			}
			for what, pair := range app {
				if err := echo(pair.client, pair.server); (err != nil) != (args != nil) {
					t.Errorf("%s connection: %v", what, err)
				}
			}
			goesTo(t, p, proxy, to) // the next
		})
	}
}

// echo sends a byte and wants it to arrive.
func echo(from, to *kit.Sock) error {
	if err := from.WriteAll([]byte{1}); err != nil {
		return err
	}
	n, err := to.ReadSome()
	if err == nil && n == 0 {
		return io.EOF
	}
	return err
}

// inCgroup has a process live in the pod's namespace, in a cgroup of this name.
func inCgroup(t *testing.T, p *kit.Pod, name string, change ...func(*exec.Cmd)) {
	t.Helper()
	dir := filepath.Join(kit.Cgroup(t), name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kit.Eventually(t, dir+" is empty", func() bool { return os.Remove(dir) == nil }) })
	cgroup, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	for _, c := range change {
		c(cmd)
	}
	if err := p.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
}
