package agent

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// Crash tests run a daemon that is built with failpoints, and kill it at each step
// of its own that changes state. A pod that is enrolled connects all the time.

var buildMortal = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(bin, "mortal", "sluiced")
	build := exec.Command("go", "build", "-tags", "sluice_failpoints", "-o", path, "../../cmd/sluiced")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the daemon with failpoints: %w: %s", err, out)
	}
	return path, nil
})

// mortal is a daemon that notes its steps, and may be killed at one.
type mortal struct {
	*daemon
	steps string // the file with their names
}

// startMortal starts one that is killed at its nth step from the first of a name
// on (0: at none), and is told where to find the plugin that is shipped.
func (n *node) startMortal(from string, nth int, args ...string) *mortal {
	n.t.Helper()
	program, err := buildMortal()
	if err != nil {
		n.t.Fatal(err)
	}
	m := &mortal{steps: filepath.Join(n.t.TempDir(), "steps")}
	m.daemon = n.startAs(func(cmd *exec.Cmd) {
		cmd.Path = program
		cmd.Env = append(os.Environ(), failpoint.StepsFileEnv+"="+m.steps)
		if nth > 0 {
			cmd.Env = append(cmd.Env, failpoint.KillFromEnv+"="+from, fmt.Sprintf("%s=%d", failpoint.KillAtEnv, nth))
		}
	}, append(args, "--cni-plugin", filepath.Join(bin, "sluice-cni"))...)
	return m
}

// taken are the steps that it has taken.
func (m *mortal) taken() []string {
	m.t.Helper()
	text, err := os.ReadFile(m.steps)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// awaitKill waits until it was killed at its step, and says which that was.
func (m *mortal) awaitKill() string {
	m.t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- m.cmd.Wait() }()
	var err error
	kit.Eventually(m.t, "the daemon dies at its step", func() bool {
		select {
		case err = <-ended:
			return true
		default:
			return false
		}
	})
	m.ended = true
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		m.t.Fatal("the daemon was not killed at its step, but ended with", err)
	}
	taken := m.taken()
	step := taken[len(taken)-1]
	kit.KilledAt(step)
	return step
}

// ownSteps are those of the daemon itself, each once; the datapath's are killed at
// elsewhere.
func ownSteps(taken []string) (own []string) {
	for _, step := range taken {
		if slices.Contains([]string{"daemon", "install", "uninstall"}, partOf(step)) && !slices.Contains(own, step) {
			own = append(own, step)
		}
	}
	return own
}

// partOf is what a step belongs to.
func partOf(step string) string {
	part, _, _ := strings.Cut(step, ":")
	return part
}

// isWhole wants what a runtime finds at any moment: a chain that starts pods. With
// an entry it has the plugin and what that needs; without one it is as before.
func (h *host) isWhole(when string) {
	h.t.Helper()
	if h.entry() == nil {
		if diff := cmp.Diff(chain, h.text()); diff != "" {
			h.t.Errorf("%s: there is no entry, and the CNI configuration is not as it was: %s", when, diff)
		}
		return
	}
	info, err := os.Stat(h.plugged)
	if err != nil || info.Mode() != 0o755 {
		h.t.Errorf("%s: the entry is there, and the plugin is not: %v, %v", when, info, err)
	}
	if plugin, err := os.ReadFile(h.plugged); err == nil {
		shipped, err := os.ReadFile(filepath.Join(bin, "sluice-cni"))
		if err != nil || !slices.Equal(plugin, shipped) {
			h.t.Errorf("%s: the entry is there, and the plugin is not whole: %v", when, err)
		}
	}
	if text := h.entry().StateFile; !exists(text) {
		h.t.Errorf("%s: the entry is there, and %s is not", when, text)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// isInstalled wants everything to be in place, and nothing beside it.
func (h *host) isInstalled(n *node, when string) {
	h.t.Helper()
	if h.entry() == nil {
		h.t.Errorf("%s: there is no entry", when)
	}
	h.isWhole(when)
	for _, dir := range []string{h.confDir, h.binDir, n.dir} {
		kit.Eventually(h.t, when+": no file that is half written is left in "+dir, func() bool { // it may be writing one
			left, err := filepath.Glob(filepath.Join(dir, ".*"))
			return err == nil && len(left) == 0
		})
	}
}

// stateHalfWritten is what a kill leaves that comes while the state file is written.
func (n *node) stateHalfWritten() {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, ".state.json1234567"), []byte("{"), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// uninstalled ends a daemon whose DaemonSet is gone, and wants nothing to be left
// but what is pinned.
func (h *host) uninstalled(n *node, d *daemon) {
	h.t.Helper()
	d.end()
	h.isClean()
	n.isGone()
	n.api.set.add()
}

func TestADaemonThatIsKilledAtAnyStepIsFollowedByOneThatFinishes(t *testing.T) {
	t.Run("at each", func(t *testing.T) {
		t.Run("of its start", killedWhileItStarts)
		t.Run("of an uninstall", func(t *testing.T) { killedWhileItUninstalls(t, true) })
		t.Run("of an uninstall without pods", func(t *testing.T) { killedWhileItUninstalls(t, false) })
		t.Run("of a sweep", killedWhileItSweeps)
	})
	if strings.Contains(flag.Lookup("test.run").Value.String(), "/") {
		t.Skip("not every part of the test has run")
	}
	never, err := kit.NeverKilledAt("agent", "agentapi", "install")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range never {
		t.Errorf("no daemon was killed at the step %q", step)
	}
}

func killedWhileItStarts(t *testing.T) {
	t.Parallel()
	n, h := newNode(t), newHost(t)
	flags := h.flags(selfFlags...)
	c := n.startTraffic()
	defer c.end()
	first := n.startMortal("", 0, flags...)
	first.awaitReady()
	steps := ownSteps(first.taken())
	if len(steps) < 9 {
		t.Fatal("the start has too few steps: are they still told?", steps)
	}
	n.api.set.remove()
	h.uninstalled(n, first.daemon)
	for _, step := range steps {
		n.startMortal(step, 1, flags...).awaitKill()
		when := "killed at " + step
		t.Log(when)
		h.isWhole(when)
		n.stateHalfWritten()
		c.goOn()
		d := n.start(flags...).awaitReady()
		h.isInstalled(n, when)
		n.api.set.remove()
		h.uninstalled(n, d)
		if t.Failed() {
			t.Fatal(when)
		}
	}
}

// An uninstall is finished by the next daemon, or undone.
func killedWhileItUninstalls(t *testing.T, podsRun bool) {
	t.Parallel()
	n, h := newNode(t), newHost(t)
	flags := h.flags(selfFlags...)
	goOn := func() {}
	if podsRun {
		c := n.startTraffic()
		defer c.end()
		goOn = c.goOn
	}
	// begin has a daemon run, everything installed, whose DaemonSet is gone.
	begin := func(step string, nth int) *mortal {
		n.start(flags...).awaitReady().kill()
		m := n.startMortal(step, nth, flags...)
		m.awaitReady()
		n.api.set.remove()
		return m
	}
	m := begin("", 0)
	before := m.taken()
	h.uninstalled(n, m.daemon)
	steps := uninstallSteps(before, m.taken()[len(before):])
	if len(steps) < 7 {
		t.Fatal("an uninstall has too few steps: are they still told?", steps)
	}
	for i, step := range steps {
		m := begin(step, 1)
		if err := m.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		when := "killed at " + m.awaitKill()
		t.Log(when)
		h.isWhole(when)
		goOn()
		d := n.start(flags...).awaitReady()
		h.isInstalled(n, when)
		if i%2 == 0 {
			h.uninstalled(n, d)
			if !podsRun {
				n.isDown()
			}
		} else {
			d.kill()
			n.api.set.add() // it was a mistake
		}
		if t.Failed() {
			t.Fatal(when)
		}
	}
}

// uninstallSteps are the daemon's own, but for those that it takes at any time, and
// some of the many that take the datapath down, which are killed at one by one
// elsewhere.
func uninstallSteps(before, taken []string) []string {
	steps, some := ownSteps(taken), 0
	steps = slices.DeleteFunc(steps, func(step string) bool { return slices.Contains(before, step) })
	for _, step := range taken {
		if strings.HasPrefix(step, "down: ") {
			if some%12 == 0 {
				steps = append(steps, step)
			}
			some++
		}
	}
	return steps
}

// A sweep un-enrols a pod whose namespace is gone, and dies before it is done.
func killedWhileItSweeps(t *testing.T) {
	t.Parallel()
	const begins = "sweep: a namespace is gone"
	n := newNode(t)
	c := n.startTraffic()
	defer c.end()
	// begin has a pod end without a DEL while a daemon runs.
	begin := func(nth int) *mortal {
		m := n.startMortal(begins, nth, "--resync", "1s")
		m.awaitReady()
		p := kit.NewPod(t)
		n.mustAdd(p, "short", "u2", injected(excludePorts, "81"))
		p.Close()
		p.Far.Close()
		return m
	}
	d := n.start().awaitReady()
	clean := pinsBut(t, n)
	d.kill()
	m := begin(0)
	kit.Eventually(t, "the sweep is done", func() bool { return cmp.Equal(clean, pinsBut(t, n)) })
	taken := m.taken()
	m.kill()
	taken = taken[slices.Index(taken, begins):]
	tried := 0
	for i, step := range taken {
		if !slices.Contains([]string{"sweep", "detach", "unenroll", "drop"}, partOf(step)) && !strings.Contains(step, "attachments") {
			continue // an entry, of which a sweep deletes many
		}
		when := "killed at " + begin(i+1).awaitKill()
		t.Log(when)
		tried++
		c.goOn()
		d := n.start("--resync", "1s").awaitReady()
		kit.Eventually(t, when+": the next daemon leaves nothing of the pod", func() bool { return cmp.Equal(clean, pinsBut(t, n)) })
		d.kill()
	}
	if tried < 12 {
		t.Errorf("a sweep has %d steps: are they still told? %q", tried, taken)
	}
}

// pinsBut is what is pinned, without what the pod that connects all the time does.
func pinsBut(t *testing.T, n *node) map[string]int {
	pins := kit.Pins(t, n.bpffs)
	for _, name := range []string{"stats", "handshakes", "handshake_use"} {
		delete(pins, filepath.Join(datapath.Layout, "maps", name))
	}
	return pins
}
