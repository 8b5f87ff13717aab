//go:build sluice_failpoints

package upgrade

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

var replacements = flag.Int("replace.times", 50, "how often the programs are replaced under load")

func TestMain(m *testing.M) {
	kit.HoldAndExit()
	os.Exit(inBuildDir(m))
}

func inBuildDir(m *testing.M) int {
	var err error
	if built.dir, err = os.MkdirTemp("", "sluice-upgrade-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(built.dir)
	status := kit.Run(m)
	if status != 0 || flag.Lookup("test.run").Value.String() != "" {
		return status
	}
	never, err := kit.NeverKilledAt("datapath")
	never = slices.DeleteFunc(never, func(step string) bool { return slices.Contains(killedElsewhere, step) })
	if err != nil || len(never) > 0 {
		fmt.Fprintf(os.Stderr, "FAIL: nobody was killed at the steps %q: %v\n", never, err)
		return 1
	}
	return 0
}

// killedElsewhere are the steps that only a plugin or a sweep takes: tests/cni and
// tests/agent kill these.
var killedElsewhere = []string{"attachment written", "release: forgotten", "sweep: a namespace is gone"}

func TestReplacementsUnderLoadFailNothingAndNothingEscapes(t *testing.T) {
	replaceUnderLoad(t, newWorld(t), newWorld(t, kit.MPTCP))
}

func TestReplacementsUnderLoadThroughHAProxyFailNothingAndNothingEscapes(t *testing.T) {
	replaceUnderLoad(t, newHAProxyWorld(t), newHAProxyWorld(t))
}

func replaceUnderLoad(t *testing.T, steered, byTC *world) {
	t.Helper()
	opts := datapath.Options{Dir: filepath.Join(kit.BPFFS(t), "replace"), Cgroup: kit.Cgroup(t)}
	steered.provesDirect()
	byTC.provesDirect()

	d := kit.OwnDatapath(t, opts)
	steered.Enroll(d)
	byTC.Enroll(d, kit.ByTC)
	l := startLoad(t, steered, byTC)
	l.goOn(1000)
	for range *replacements {
		began, before := time.Now(), l.done.Load()
		again, err := datapath.Up(opts)
		if err != nil {
			t.Fatal("up again:", err)
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
		t.Logf("replaced within %v, %d connections meanwhile", time.Since(began), l.done.Load()-before)
		l.goOn(300)
	}
	l.wantNone()
}

// The test above would see an escape: taken out of the mesh under load, a pod's
// connections reach the apps.
func TestTheLoadSeesAnEscape(t *testing.T) {
	t.Run("proxy of the test", func(t *testing.T) { escapeUnderLoad(t, newWorld(t)) })
	t.Run("HAProxy", func(t *testing.T) { escapeUnderLoad(t, newHAProxyWorld(t)) })
}

func escapeUnderLoad(t *testing.T, w *world) {
	t.Helper()
	opts := datapath.Options{Dir: filepath.Join(kit.BPFFS(t), "escape"), Cgroup: kit.Cgroup(t)}
	w.provesDirect()
	d := kit.OwnDatapath(t, opts)
	w.Enroll(d)
	l := startLoad(t, w)
	l.goOn(100)
	if _, err := d.Unenroll(w.Cookie(), w.NetNS); err != nil {
		t.Fatal(err)
	}
	kit.Eventually(t, "an escape of each way is seen by both ends", func() bool {
		return l.escaped.Load() > 100 && w.escaped.Load() > 100
	})
	l.end()
}
