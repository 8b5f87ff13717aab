package agent

import (
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// container is the daemon's, by the manifest.
func container(t *testing.T) corev1.Container {
	t.Helper()
	text, err := os.ReadFile("../../deploy/kustomize/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(text, &set); err != nil {
		t.Fatal(err)
	}
	return set.Spec.Template.Spec.Containers[0]
}

// declared are the capabilities that the manifest gives the daemon, as setpriv
// names them.
func declared(t *testing.T) []string {
	t.Helper()
	context := container(t).SecurityContext
	if !slices.Equal(context.Capabilities.Drop, []corev1.Capability{"ALL"}) || context.Privileged == nil || *context.Privileged {
		t.Fatal("the manifest gives more than it names:", context)
	}
	var out []string
	for _, c := range context.Capabilities.Add {
		out = append(out, strings.ToLower(string(c)))
	}
	return out
}

// confine has a daemon run as its container does: root, with these capabilities
// and no way to more. Before names a program that runs it, with its arguments.
func confine(t *testing.T, capabilities []string, before ...string) func(*exec.Cmd) {
	t.Helper()
	bounds := "-all,+" + strings.Join(capabilities, ",+")
	args := append(before, "setpriv", "--inh-caps=-all", "--bounding-set="+bounds, "--no-new-privs")
	path, err := exec.LookPath(args[0])
	if err != nil {
		t.Fatal(err)
	}
	return func(cmd *exec.Cmd) { cmd.Path, cmd.Args = path, append(args, cmd.Args...) }
}

// The stages of a daemon's work, in their order.
const (
	everything  = ""
	startsReady = "the daemon becomes ready"
	followsPod  = "a running pod's rules follow its annotation"
	repairsPod  = "a pod that ran before is enrolled, and its proxy found"
)

// firstFailure has a daemon do all of its work, and says at what it fails, and
// what it says of it.
func firstFailure(t *testing.T, change func(*exec.Cmd)) (stage, why string) {
	t.Helper()
	n := newNode(t)
	enrolled, before := kit.NewPod(t), kit.NewPod(t)
	server, to := direct(t, enrolled)
	const uid = "0a1b2c3d-0000-4000-8000-00000000000c"
	app, proxy := runsBefore(t, before, "kubepods-pod"+strings.ReplaceAll(uid, "-", "_")+".slice")

	d := n.startAs(change)
	if why := d.whyNotReady(); why != "" {
		return startsReady, why
	}
	n.api.put("cart", "u1", injected())
	n.mustAdd(enrolled, "cart", "u1", injected())
	enrolled.Hold(kit.Proxy)
	outbound := enrolled.Listen(kit.Proxy, "0.0.0.0:15001")
	goesTo(t, enrolled, outbound, to)
	n.api.put("cart", "u1", injected(excludePorts, "80"))
	if !n.unlessSaid("cart", "the new rules cannot be applied", func() bool { return arrivesAt(enrolled.NS, to, server, outbound) == server }) {
		return followsPod, n.api.lastWords("cart")
	}
	n.api.put("shop", uid, injected())
	inbound := netip.AddrPortFrom(kit.Pod4, 8080)
	if !n.unlessSaid("shop", "cannot be redirected", func() bool { return arrivesAt(before.Far, inbound, proxy, app) == proxy }) {
		return repairsPod, n.api.lastWords("shop")
	}
	return everything, ""
}

// unlessSaid waits until something holds, or the last Event about a pod says that
// the daemon cannot do it.
func (n *node) unlessSaid(pod, cannot string, holds func() bool) (held bool) {
	within(40*time.Second, func() bool {
		held = holds()
		return held || strings.Contains(n.api.lastWords(pod), cannot)
	})
	return held
}

// runsBefore makes a pod run without Sluice: a process of the proxy's user lives
// in it, with the proxy's listener open, and the app is reached directly.
func runsBefore(t *testing.T, p *kit.Pod, cgroup string) (app, proxy *kit.Sock) {
	t.Helper()
	app = p.Listen(kit.App, "0.0.0.0:8080")
	proxy = p.Listen(kit.Proxy, "0.0.0.0:15006")
	if arrivesAt(p.Far, netip.AddrPortFrom(kit.Pod4, 8080), app, proxy) != app {
		t.Fatal("without Sluice, no traffic reaches the app")
	}
	inCgroup(t, p, cgroup, func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(kit.Proxy.UID), Gid: uint32(kit.Proxy.GID)}
		fd, err := syscall.Dup(proxy.FD)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(fd), "the proxy's listener")
		t.Cleanup(func() { file.Close() })
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	})
	return app, proxy
}

// arrivesAt dials, and returns the listener at which the connection arrives, or
// nil.
func arrivesAt(from *kit.NS, to netip.AddrPort, listeners ...*kit.Sock) *kit.Sock {
	c, err := from.Dial(kit.App, unix.AF_INET, to)
	if err != nil {
		return nil
	}
	defer c.Close()
	var at *kit.Sock
	within(10*time.Second, func() bool {
		for _, l := range listeners {
			if a, err := l.AcceptWithin(0); err == nil {
				a.Close()
				at = l
			}
		}
		return at != nil
	})
	return at
}

// within is kit.Eventually for what may fail.
func within(limit time.Duration, holds func() bool) bool {
	for deadline := time.Now().Add(limit); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// whyNotReady waits for a daemon that gets ready, or says what it is not
// permitted to do, or ends.
func (d *daemon) whyNotReady() (why string) {
	ended := make(chan error, 1)
	go func() { ended <- d.cmd.Wait() }()
	d.t.Cleanup(func() {
		if !d.ended {
			d.ended = true
			_ = d.cmd.Process.Kill()
			<-ended
		}
	})
	within(40*time.Second, func() bool {
		select {
		case err := <-ended:
			d.ended = true
			why = "it ends: " + err.Error()
			return true
		default:
		}
		status, text := d.readyz()
		why = text
		if status == http.StatusOK {
			why = ""
			return true
		}
		return strings.Contains(text, "not permitted") || strings.Contains(text, "permission denied")
	})
	return why
}

func TestTheDaemonWorksWithTheCapabilitiesOfTheManifestAndFailsWithoutEach(t *testing.T) {
	all := declared(t)
	t.Run("with all", func(t *testing.T) {
		if stage, why := firstFailure(t, confine(t, all)); stage != everything {
			t.Fatalf("with %v it fails when %s: %s", all, stage, why)
		}
	})
	// What fails first without it. docs/security.md says which call needs it.
	needed := map[string]string{
		"net_admin":       startsReady,
		"sys_admin":       startsReady,
		"sys_ptrace":      followsPod,
		"dac_read_search": followsPod,
	}
	for _, missing := range all {
		t.Run("without "+missing, func(t *testing.T) {
			rest := slices.DeleteFunc(slices.Clone(all), func(c string) bool { return c == missing })
			wantFailure(t, needed[missing], confine(t, rest))
		})
	}
	if len(needed) != len(all) {
		t.Errorf("the manifest has %v, and what they are for is known of %v", all, needed)
	}
}

func TestTheDaemonNeedsTheHostsProcesses(t *testing.T) {
	inside := confine(t, declared(t), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
	wantFailure(t, followsPod, inside)
}

func wantFailure(t *testing.T, want string, change func(*exec.Cmd)) {
	t.Helper()
	stage, why := firstFailure(t, change)
	if stage != want {
		t.Errorf("it fails when %q (%s), want %q", stage, why, want)
	}
	t.Logf("%s: %s", stage, why)
}

func TestSecurityPageNamesEachCapability(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "security.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range declared(t) {
		if line := "| `" + strings.ToUpper(c) + "` |"; !strings.Contains(string(page), line) {
			t.Errorf("docs/security.md has no line that begins with %q", line)
		}
	}
}

// The manifest and the daemon are two texts: what one says the other must know.
func TestTheDaemonKnowsTheManifestsFlags(t *testing.T) {
	help, err := exec.Command(filepath.Join(bin, "sluiced"), "--help").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	for _, arg := range container(t).Args {
		flag, _, _ := strings.Cut(arg, "=")
		if !strings.Contains(string(help), " "+flag+" ") {
			t.Errorf("sluiced has no flag %s", flag)
		}
	}
}
