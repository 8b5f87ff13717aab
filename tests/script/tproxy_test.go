package script

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// What TPROXY mode adds to a pod is removed also if whoever added it, or went
// back to REDIRECT mode, was killed at it.
func TestKilledAtAnyMomentTheWayBackIsKnown(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "killedway")
	pod := kit.NewPod(t)
	pod.Hold(kit.App) // down finds a namespace by who lives in it
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.Fd())
	up := []string{"up", "--bpffs", dir, "--cgroup", kit.Cgroup(t)}
	redirect := []string{"enroll", "--bpffs", dir, "--netns", path}
	tproxy := slices.Concat(redirect, []string{"--annotation", "sidecar.istio.io/interceptionMode=TPROXY"})
	down := []string{"down", "--bpffs", dir}
	t.Cleanup(func() { sluicectl(t, down...) })
	before := wayBack(t, pod)
	sluicectl(t, up...)
	started := time.Now()
	sluicectl(t, tproxy...)
	takes := time.Since(started)
	whole := wayBack(t, pod)
	if whole == before {
		t.Fatal("enrolment added nothing")
	}
	for i := range 12 {
		// From nothing to TPROXY mode, from it to REDIRECT mode, and out of it.
		switch i % 3 {
		case 0:
			sluicectl(t, "unenroll", "--bpffs", dir, "--netns", path)
			killed(t, rand.N(takes), tproxy...)
		case 1:
			sluicectl(t, tproxy...)
			killed(t, rand.N(takes), redirect...)
		case 2:
			sluicectl(t, tproxy...)
			killed(t, rand.N(takes), "unenroll", "--bpffs", dir, "--netns", path)
		}
		switch i % 4 {
		case 0:
			sluicectl(t, tproxy...)
			if now := wayBack(t, pod); now != whole {
				t.Fatalf("round %d: enrolled again there is\n%s\nwant\n%s", i, now, whole)
			}
			continue
		case 1:
			sluicectl(t, "unenroll", "--bpffs", dir, "--netns", path)
		case 2:
			sluicectl(t, redirect...)
		case 3:
			sluicectl(t, down...)
		}
		if now := wayBack(t, pod); now != before {
			t.Fatalf("round %d: it leaves\n%s\nwhere there was\n%s", i, now, before)
		}
		sluicectl(t, up...)
	}
}

// wayBack is what of it the pod has.
func wayBack(t *testing.T, pod *kit.Pod) string {
	t.Helper()
	var out strings.Builder
	missing, err := pod.MissingWayBack(true, ^netns.WayBack(0))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&out, "missing %b\n", missing)
	pod.Netlink(func(h *netlink.Handle) error {
		rules, err := h.RuleList(netlink.FAMILY_ALL)
		for _, r := range rules {
			fmt.Fprintln(&out, r)
		}
		return err
	})
	return out.String()
}
