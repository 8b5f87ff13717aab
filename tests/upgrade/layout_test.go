//go:build sluice_failpoints

package upgrade

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// layouts is a place where two versions with different maps take turns.
type layouts struct {
	*world
	dir        string
	this, next version
	pods       string // as this version lists them
}

// newLayouts brings this version up with a pod.
func newLayouts(t *testing.T, name string) *layouts {
	t.Helper()
	s := &layouts{world: newWorld(t), dir: filepath.Join(kit.BPFFS(t), name), this: thisVersion(t), next: nextVersion(t)}
	s.provesDirect()
	t.Cleanup(func() { s.this.mustCtl("down", "--bpffs", s.dir) })
	s.this.mustCtl(s.up()...)
	s.this.mustCtl("enroll", "--bpffs", s.dir, "--netns", s.path(), "--annotation", "traffic.sidecar.istio.io/excludeOutboundPorts=81")
	s.attach()
	s.pods = s.list(s.this)
	return s
}

func (s *layouts) up() []string { return []string{"up", "--bpffs", s.dir, "--cgroup", kit.Cgroup(s.t)} }

func (s *layouts) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.Fd()) }

var attachment = datapath.AttachmentID{Network: "net", Container: "c1", Interface: "eth0"}

// attach records an attachment, as the plugin does.
func (s *layouts) attach() {
	s.t.Helper()
	d, err := datapath.Open(datapath.Options{Dir: s.dir})
	if err != nil {
		s.t.Fatal(err)
	}
	defer d.Close()
	if err := d.Attach(datapath.Attachment{AttachmentID: attachment, Cookie: s.Cookie()}); err != nil {
		s.t.Fatal(err)
	}
}

// list is what a version knows of pods and rules.
func (s *layouts) list(v version) string {
	s.t.Helper()
	return v.mustCtl("pods", "--bpffs", s.dir, "-o", "json") + v.mustCtl("rules", "--bpffs", s.dir, "-o", "json")
}

// inForce wants a version to be complete, and to know all that was known.
func (s *layouts) inForce(v, other version) {
	s.t.Helper()
	if diff := cmp.Diff(s.pods, s.list(v)); diff != "" {
		s.t.Fatalf("pods and rules are not what they were: %s", diff)
	}
	out, err := other.ctl("pods", "--bpffs", s.dir)
	if err == nil || !strings.Contains(out, "of another version of Sluice") {
		s.t.Fatalf("the version that is not in force lists pods: %v: %s", err, out)
	}
	entries, err := os.ReadDir(filepath.Join(s.dir, datapath.Layout))
	if err != nil {
		s.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if diff := cmp.Diff([]string{"links", "maps"}, names); diff != "" {
		s.t.Fatal("something is left of the replacement:", diff)
	}
}

// attached wants the attachment to be known to this version.
func (s *layouts) attached() {
	s.t.Helper()
	d, err := datapath.Open(datapath.Options{Dir: s.dir})
	if err != nil {
		s.t.Fatal(err)
	}
	defer d.Close()
	got, found, err := d.Attachment(attachment)
	want := datapath.Attachment{AttachmentID: attachment, Cookie: s.Cookie()}
	if err != nil || !found || got != want {
		s.t.Errorf("the attachment is %+v, %v, %v", got, found, err)
	}
}

func TestVersionsWithOtherMapsReplaceEachOtherUnderLoad(t *testing.T) {
	s := newLayouts(t, "layouts")
	l := startLoad(t, s.world)
	for range 5 {
		l.goOn(300)
		s.next.mustCtl(s.up()...)
		l.goOn(300)
		s.inForce(s.next, s.this)
		s.next.mustCtl(s.up()...) // its own maps: as they are
		s.inForce(s.next, s.this)
		s.this.mustCtl(s.up()...)
		s.inForce(s.this, s.next)
		s.attached()
	}
	l.wantNone()
}

// Killed at any step, whichever version comes next makes it whole again. Nothing
// fails in between, and nobody may write while programs are of two versions.
func TestKilledWhileAVersionWithOtherMapsTakesOverEitherMakesItWhole(t *testing.T) {
	s := newLayouts(t, "killed")
	l := startGentleLoad(t, s.world)
	halfway := 0
	s.next.atEachStep("up: ", 40, func() {
		s.this.mustCtl(s.up()...)
		s.inForce(s.this, s.next)
	}, s.up(), func(step int, _ string) {
		l.goOn(10)
		if s.writesAreRefused() {
			halfway++
		}
		if step%2 == 0 { // forward; otherwise back
			s.next.mustCtl(s.up()...)
			s.inForce(s.next, s.this)
		}
		if l.failed.Load()+l.escaped.Load() > 0 {
			t.Error("something failed or escaped")
		}
	})
	s.this.mustCtl(s.up()...)
	s.inForce(s.this, s.next)
	s.attached()
	if halfway < 10 {
		t.Errorf("only %d steps were found to be half-way", halfway)
	}
	l.wantNone()
}

// writesAreRefused says whether an enrolment is refused because a replacement was
// cut off; by any other error it fails.
func (s *layouts) writesAreRefused() bool {
	s.t.Helper()
	out, err := s.this.ctl("enroll", "--bpffs", s.dir, "--netns", s.path(), "--annotation", "traffic.sidecar.istio.io/excludeOutboundPorts=81")
	if err == nil {
		return false
	}
	for _, expected := range []string{"was cut off", "of another version of Sluice", "sluice is not up"} {
		if strings.Contains(out, expected) {
			return true
		}
	}
	s.t.Fatalf("enroll: %v: %s", err, out)
	return false
}
