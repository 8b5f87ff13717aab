package script

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// sluicectl runs it in the tests' cgroup and returns what it printed.
func sluicectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("sluicectl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("sluicectl %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// killed runs it and kills it after a while, unless it has ended.
func killed(t *testing.T, after time.Duration, args ...string) {
	t.Helper()
	cmd := exec.Command("sluicectl", args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_ = cmd.Wait()
}

// pins lists the files below a directory.
func pins(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			out = append(out, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Whenever "up" or "enroll" is killed, running both again makes what they make
// when nobody disturbs them, and the pod's traffic is captured.
func TestKilledAtAnyMomentTheNextRunRepairs(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "killed")
	pod := kit.NewPod(t)
	pod.Hold(kit.App) // down finds a namespace by who lives in it
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.Fd())
	up := []string{"up", "--bpffs", dir, "--cgroup", kit.Cgroup(t)}
	enroll := []string{"enroll", "--bpffs", dir, "--netns", path, "--inbound", "tc", "--annotation", "traffic.sidecar.istio.io/excludeOutboundPorts=81"}
	down := []string{"down", "--bpffs", dir}
	t.Cleanup(func() { sluicectl(t, down...) })
	server := pod.Far.Listen(kit.Root, "0.0.0.0:80")

	started := time.Now()
	sluicectl(t, up...)
	upTakes := time.Since(started)
	started = time.Now()
	sluicectl(t, enroll...)
	enrollTakes := time.Since(started)
	wantPins, wantRules := pins(t, dir), sluicectl(t, "rules", "--bpffs", dir)

	for i := range 20 {
		// From nothing, from what is there, and with the pod enrolled or not.
		switch i % 4 {
		case 0:
			sluicectl(t, down...)
		case 2:
			sluicectl(t, "unenroll", "--bpffs", dir, "--netns", path)
		}
		killed(t, rand.N(upTakes), up...)
		if i%2 == 1 {
			sluicectl(t, up...)
		}
		killed(t, rand.N(enrollTakes), enroll...)
		sluicectl(t, up...)
		sluicectl(t, enroll...)
		if diff := cmp.Diff(wantPins, pins(t, dir)); diff != "" {
			t.Fatalf("round %d: the pins differ: %s", i, diff)
		}
		if diff := cmp.Diff(wantRules, sluicectl(t, "rules", "--bpffs", dir)); diff != "" {
			t.Fatalf("round %d: the rules differ: %s", i, diff)
		}
		if _, err := pod.Dial(kit.App, unix.AF_INET, kitAddr(80)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatalf("round %d: without a proxy the dial ends with %v, want ECONNREFUSED", i, err)
		}
	}
	sluicectl(t, down...)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("down leaves %s", dir)
	}
	if _, err := pod.Dial(kit.App, unix.AF_INET, kitAddr(80)); err != nil {
		t.Error("after down:", err)
	}
	server.MustAccept()
}

// "down" that was killed is finished by the next.
func TestDownKilledIsFinishedByTheNext(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "halfdown")
	pod := kit.NewPod(t)
	pod.Hold(kit.App) // down finds a namespace by who lives in it
	t.Cleanup(func() {
		if _, err := datapath.Down(dir); err != nil {
			t.Error(err)
		}
	})
	for range 3 {
		sluicectl(t, "up", "--bpffs", dir, "--cgroup", kit.Cgroup(t))
		sluicectl(t, "enroll", "--bpffs", dir, "--netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.Fd()))
		killed(t, rand.N(30*time.Millisecond), "down", "--bpffs", dir)
		sluicectl(t, "down", "--bpffs", dir)
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("down leaves %s", dir)
		}
	}
}

// Whenever "enroll" or "up" is killed, a pod whose proxy has listened is not
// taken for one that still waits for it, and one that waits goes on waiting.
func TestKilledAtAnyMomentAPodStaysReady(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "killedready")
	pod := kit.NewPod(t)
	pod.Hold(kit.App) // down finds a namespace by who lives in it
	up := []string{"up", "--bpffs", dir, "--cgroup", kit.Cgroup(t)}
	enroll := []string{"enroll", "--bpffs", dir, "--netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.Fd()), "--capture", "proxy-ready"}
	t.Cleanup(func() { sluicectl(t, "down", "--bpffs", dir) })
	server := pod.Far.Listen(kit.Root, "0.0.0.0:80")
	dial := func() error {
		s, err := pod.Dial(kit.App, unix.AF_INET, kitAddr(80))
		if err == nil {
			s.Close()
		}
		return err
	}

	sluicectl(t, up...)
	started := time.Now()
	sluicectl(t, enroll...)
	takes := time.Since(started)
	disturb := func(when string) {
		t.Helper()
		for range 6 {
			killed(t, rand.N(takes), enroll...)
			killed(t, rand.N(takes), up...)
			sluicectl(t, up...)
			want := error(nil)
			if when == "ready" {
				want = unix.ECONNREFUSED
			}
			if err := dial(); !errors.Is(err, want) {
				t.Fatalf("%s: the dial ends with %v, want %v", when, err, want)
			}
			if out := sluicectl(t, "pods", "--bpffs", dir, "-o", "json"); !strings.Contains(out, `"capture": "`+when+`"`) {
				t.Fatalf("want capture to be %s: %s", when, out)
			}
		}
	}
	disturb("waiting")
	server.MustAccept()
	pod.Listen(kit.Proxy, "0.0.0.0:15001").Close()
	disturb("ready")

	// Enrolled anew, with a listener that sockops has not seen.
	for range 6 {
		sluicectl(t, "unenroll", "--bpffs", dir, "--netns", enroll[4])
		proxy := pod.Listen(kit.Proxy, "0.0.0.0:15001")
		release := pod.Hold(kit.Proxy, proxy)
		killed(t, rand.N(takes), enroll...)
		sluicectl(t, up...)
		out := sluicectl(t, "pods", "--bpffs", dir, "-o", "json")
		if strings.Contains(out, `"capture": "waiting"`) {
			t.Fatal("the proxy listens, and the pod waits for it:", out)
		}
		release()
		proxy.Close()
	}
}
