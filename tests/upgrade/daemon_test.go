//go:build sluice_failpoints

package upgrade

import (
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// daemons is a node whose daemon starts again and again. No API server answers it:
// it starts all the same.
type daemons struct {
	*victim
	runDir, kubeconfig string
}

const noAPIServer = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c}}]
current-context: c
`

func newDaemons(t *testing.T, name string) *daemons {
	t.Helper()
	n := &daemons{victim: newVictim(t, name), runDir: t.TempDir()}
	n.kubeconfig = filepath.Join(n.runDir, "kubeconfig")
	if err := os.WriteFile(n.kubeconfig, []byte(noAPIServer), 0o600); err != nil {
		t.Fatal(err)
	}
	return n
}

// start runs a daemon until it is ready, or killed at a step (0: at none). It
// leaves none behind, and returns the steps that it took.
func (n *daemons) start(killAt int) (steps []string, died bool) {
	n.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	file := filepath.Join(n.t.TempDir(), "steps")
	cmd := exec.Command(filepath.Join(n.v.dir, "sluiced"), "--node", "n1", "--kubeconfig", n.kubeconfig, "--run-dir", n.runDir,
		"--bpffs", n.dir, "--cgroup", kit.Cgroup(n.t), "--listen", address, "--repair", "off")
	cmd.Env = append(os.Environ(), failpoint.KillAtEnv+"="+strconv.Itoa(killAt), failpoint.StepsFileEnv+"="+file)
	var says strings.Builder
	cmd.Stderr = &says
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ready, over := false, false
	kit.Eventually(n.t, "the daemon is ready or killed", func() bool {
		select {
		case err = <-ended:
			over = true
			return true
		default:
		}
		response, err := http.Get("http://" + address + "/readyz")
		if err != nil {
			return false
		}
		response.Body.Close()
		ready = response.StatusCode == http.StatusOK
		return ready
	})
	if !over {
		_ = cmd.Process.Kill()
		if err := <-ended; err == nil {
			n.t.Fatal("the daemon has ended by itself, without an error")
		}
	} else {
		var exit *exec.ExitError
		died = errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if !died {
			n.t.Fatalf("the daemon has ended: %v\n%s", err, says.String())
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		n.t.Fatal(err)
	}
	steps = strings.Split(strings.TrimSpace(string(text)), "\n")
	if died {
		kit.KilledAt(steps[len(steps)-1])
	}
	return steps, died
}

func TestADaemonThatIsKilledAtAnyStepOfItsStartLetsNothingEscape(t *testing.T) {
	n := newDaemons(t, "crash-daemon")
	l := startGentleLoad(t, n.world)
	steps, _ := n.start(0)
	for _, must := range []string{"daemon: lock signed", "up: connect6 in force", "enroll: pod written", "daemon: socket made"} {
		if !slices.Contains(steps, must) {
			t.Fatalf("the start has no step %q: %v", must, steps)
		}
	}
	eachOf(steps, func(step int, name string) {
		// What it deletes at the end of its proof depends on what was counted.
		if got, died := n.start(step); !died && (len(got) >= step || len(got) < len(steps)-12) {
			t.Fatalf("the daemon was not killed at step %d (%s), after %d steps", step, name, len(got))
		}
		t.Logf("killed at step %d of %d: %s", step, len(steps), name)
		l.goOn(10)
	})
	// The namespace of a proof that was cut off ends in the kernel's own time.
	kit.Eventually(t, "a start finds nothing left of those that were killed", func() bool {
		n.start(0)
		return cmp.Equal(n.enrolled, n.tidy(kit.Pins(t, n.dir)))
	})
	n.want(n.enrolled)
	l.wantNone()
}

func TestDaemonsThatReplaceEachOtherUnderLoadLetNothingEscape(t *testing.T) {
	n := newDaemons(t, "daemons-in-turn")
	l := startLoad(t, n.world)
	for range 10 {
		n.start(0) // brings the programs up anew, and is killed
		l.goOn(300)
	}
	n.want(n.enrolled)
	l.wantNone()
}
