//go:build sluice_failpoints

package upgrade

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// victim is a pod without traffic but the test's own, and who is killed.
type victim struct {
	*world
	dir                     string
	v                       version
	up, enroll, leave, down []string
	empty, enrolled         map[string]int // what should be there
}

func newVictim(t *testing.T, name string) *victim {
	t.Helper()
	w := newWorld(t)
	w.provesDirect()
	dir := filepath.Join(kit.BPFFS(t), name)
	netns := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), w.Fd())
	s := &victim{
		world: w, dir: dir, v: thisVersion(t),
		up:     []string{"up", "--bpffs", dir, "--cgroup", kit.Cgroup(t)},
		enroll: []string{"enroll", "--bpffs", dir, "--netns", netns, "--inbound", "tc", "--tc", "tcx", "--annotation", "traffic.sidecar.istio.io/excludeOutboundPorts=81"},
		leave:  []string{"unenroll", "--bpffs", dir, "--netns", netns},
		down:   []string{"down", "--bpffs", dir},
	}
	t.Cleanup(func() { s.v.mustCtl(s.down...) })
	s.v.mustCtl(s.up...)
	s.empty = kit.Pins(t, dir)
	s.v.mustCtl(s.enroll...)
	s.enrolled = kit.Pins(t, dir)
	if len(s.empty) < 30 || cmp.Equal(s.empty, s.enrolled) {
		t.Fatal("too little is there to lose:", s.enrolled)
	}
	return s
}

func (s *victim) want(what map[string]int) {
	s.t.Helper()
	if diff := cmp.Diff(what, s.tidy(kit.Pins(s.t, s.dir))); diff != "" {
		s.t.Error("what is pinned is not what it should be:", diff)
	}
}

// tidy leaves out what connections of the test itself leave in an enrolled pod's
// tables: the address book and the counts.
func (s *victim) tidy(c map[string]int) map[string]int {
	for _, name := range []string{"targets", "target_index", "stats"} {
		if pin := filepath.Join(datapath.Layout, "maps", name); c[pin] > 0 && c[filepath.Join(datapath.Layout, "maps", "pods")] > 0 {
			c[pin] = s.enrolled[pin]
		}
	}
	return c
}

// captured wants each connection to go by the proxy.
func (s *victim) captured() {
	s.t.Helper()
	s.each(func(w way) error { return w.once(3) })
}

// direct wants each to go to the app.
func (s *victim) direct() {
	s.t.Helper()
	s.each(func(w way) error {
		if err := w.once(4); !errors.Is(err, errEscaped) {
			return fmt.Errorf("the app does not answer: %w", errors.Join(err, errors.New("the proxy does")))
		}
		return nil
	})
}

// neverHalfCaptured wants outbound connections to be captured, or refused, once
// the pod is in the map: nothing else.
func (s *victim) neverHalfCaptured() {
	s.t.Helper()
	if kit.Pins(s.t, s.dir)[filepath.Join(datapath.Layout, "maps", "pods")] == 0 {
		return
	}
	s.each(func(w way) error {
		err := w.once(5)
		if strings.HasPrefix(w.name, "inbound") && errors.Is(err, errEscaped) || errors.Is(err, unix.ECONNREFUSED) {
			return nil // inbound programs come last, and the runtime has not been told that the pod is ready
		}
		return err
	})
}

func TestUpThatIsKilledAtAnyStepIsCompletedByTheNext(t *testing.T) {
	s := newVictim(t, "crash-up")
	s.v.atEachStep("up: ", 40, func() { s.v.mustCtl(s.down...) }, s.up, func(int, string) {
		s.direct()
		s.v.mustCtl(s.up...)
		s.want(s.empty)
	})
}

func TestEnrollThatIsKilledAtAnyStepIsCompletedOrUndone(t *testing.T) {
	s := newVictim(t, "crash-enroll")
	s.v.atEachStep("", 12, func() { s.v.mustCtl(s.leave...) }, s.enroll, func(step int, _ string) {
		s.neverHalfCaptured()
		switch step % 3 {
		case 0:
			s.v.mustCtl(s.enroll...)
			s.want(s.enrolled)
			s.captured()
		case 1:
			s.v.mustCtl(s.up...) // as the daemon's next start, or its sweep
			s.v.mustCtl(s.enroll...)
			s.want(s.enrolled)
			s.captured()
		case 2:
			s.v.mustCtl(s.leave...)
			s.v.mustCtl(s.up...)
			s.want(s.empty)
			s.direct()
		}
	})
}

// The pod's rules change while it runs, and how its interfaces are guarded.
func TestAChangeThatIsKilledAtAnyStepIsCompletedAndNothingEscapes(t *testing.T) {
	s := newVictim(t, "crash-change")
	change := slices.Clone(s.enroll)
	for from, to := range map[string]string{"tcx": "clsact", "traffic.sidecar.istio.io/excludeOutboundPorts=81": "traffic.sidecar.istio.io/excludeOutboundPorts=82,83"} {
		change[slices.Index(change, from)] = to
	}
	s.v.mustCtl(change...)
	changed := kit.Pins(t, s.dir)
	l := startGentleLoad(t, s.world)
	s.v.atEachStep("", 8, func() { s.v.mustCtl(s.enroll...) }, change, func(step int, _ string) {
		l.goOn(10)
		next := [][]string{s.up, change} // the daemon's next start, and what it does then
		if step%2 == 0 {
			slices.Reverse(next) // or its next sweep
		}
		for _, command := range next {
			s.v.mustCtl(command...)
		}
		s.want(changed)
	})
	l.wantNone()
}

// A version that comes after another removes the maps that it does not have.
func TestUpThatIsKilledWhileItRemovesAnotherVersionsMapIsCompletedByTheNext(t *testing.T) {
	s := newVictim(t, "crash-stranger")
	s.v.mustCtl(s.leave...)
	pin := filepath.Join(s.dir, datapath.Layout, "maps", "stranger")
	s.v.atEachStep("up: stranger removed", 1, func() {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(m.Pin(pin), m.Close()); err != nil {
			t.Fatal(err)
		}
	}, s.up, func(int, string) {
		s.v.mustCtl(s.up...)
		s.want(s.empty)
	})
}

func TestUnenrollThatIsKilledAtAnyStepIsCompletedByTheNext(t *testing.T) {
	s := newVictim(t, "crash-leave")
	s.v.atEachStep("", 10, func() { s.v.mustCtl(s.enroll...) }, s.leave, func(step int, _ string) {
		if step%2 == 0 {
			s.v.mustCtl(s.up...)
		}
		s.v.mustCtl(s.leave...)
		s.v.mustCtl(s.up...)
		s.want(s.empty)
		s.direct()
	})
}

func TestDownThatIsKilledAtAnyStepIsCompletedByTheNext(t *testing.T) {
	s := newVictim(t, "crash-down")
	s.v.atEachStep("", 20, func() {
		s.v.mustCtl(s.up...)
		s.v.mustCtl(s.enroll...)
	}, s.down, func(int, string) {
		s.v.mustCtl(s.down...)
		if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", s.dir, err)
		}
		s.direct()
	})
}
