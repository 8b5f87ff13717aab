package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// podPins is where a pod's links are pinned.
func podPins(opts datapath.Options, cookie uint64) string {
	return filepath.Join(opts.Dir, datapath.Layout, "links", "pods", fmt.Sprint(cookie))
}

func sweep(t *testing.T, d *datapath.Datapath) datapath.Swept {
	t.Helper()
	swept, err := d.Sweep()
	if err != nil {
		t.Fatal("sweep:", err)
	}
	return swept
}

// dialRefused wants a dial to be captured, for a proxy that is not there.
func dialRefused(t *testing.T, p *kit.Pod, when string) {
	t.Helper()
	if _, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%s: the dial ends with %v, want ECONNREFUSED", when, err)
	}
}

// The namespace is held by this process's descriptor alone, as by a mount: no
// process and no name leads to it, and nothing tells whether it lives.
func TestAPodWhoseLinksAreLostStaysEnrolled(t *testing.T) {
	d, opts := ownDatapath(t)
	p := kit.NewPod(t)
	server := p.Far.Listen(kit.Root, "0.0.0.0:80")
	s, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80))
	if err != nil {
		t.Fatal("without Sluice:", err)
	}
	kit.Exchange(t, s, server.MustAccept(), 100)
	p.Enroll(d)
	dialRefused(t, p, "enrolled")
	if err := os.RemoveAll(podPins(opts, p.Cookie())); err != nil {
		t.Fatal(err)
	}
	if swept := sweep(t, d); len(swept.Gone) != 0 || len(swept.Left) != 1 {
		t.Errorf("swept: %+v", swept)
	}
	dialRefused(t, p, "after a sweep")
	again, err := datapath.Up(opts)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	dialRefused(t, p, "after the next start")
	if err := d.CheckPod(p.Cookie()); err == nil {
		t.Error("nothing is missing, says CheckPod")
	}

	p.Hold(kit.App) // now a process leads to it
	sweep(t, d)
	if err := d.CheckPod(p.Cookie()); err != nil {
		t.Error("once it can be found:", err)
	}
	dialRefused(t, p, "completed")
}

// A start that is killed between two steps leaves the namespace with a link that
// passes everything, by which the kernel tells of its end.
func TestAnEnrolmentThatWasCutOffEndsWithItsNamespaceAlone(t *testing.T) {
	d, opts := ownDatapath(t)
	empty := stateOf(t, opts.Dir)
	var cookie uint64
	t.Run("life", func(t *testing.T) { // its end closes the namespaces
		p := kit.NewPod(t)
		cookie = p.Cookie()
		if _, err := d.Enroll(p.NetNS, datapath.Pod{Namespace: "shop", Name: "cart", UID: "u1", Rules: rules.Default()}); err != nil {
			t.Fatal(err)
		}
		dir := podPins(opts, cookie)
		if err := os.Rename(filepath.Join(dir, "inbound"), filepath.Join(dir, "life")); err != nil {
			t.Fatal(err)
		}
		if err := d.Attach(datapath.Attachment{AttachmentID: datapath.AttachmentID{Network: "n", Container: "c", Interface: "eth0"}, Cookie: cookie}); err != nil {
			t.Fatal(err)
		}
		if swept := sweep(t, d); len(swept.Gone) != 0 {
			t.Errorf("it lives, and was swept: %+v", swept)
		}
		dialRefused(t, p, "cut off")
	})
	var gone []datapath.PodInfo
	kit.Eventually(t, "its end is seen", func() bool { gone = append(gone, sweep(t, d).Gone...); return len(gone) > 0 })
	if want := (datapath.PodInfo{Cookie: cookie, Namespace: "shop", Name: "cart", UID: "u1"}); !cmp.Equal(gone[0], want, cmp.Comparer(func(a, b datapath.PodInfo) bool {
		return a.Cookie == b.Cookie && a.Namespace == b.Namespace && a.Name == b.Name && a.UID == b.UID
	})) {
		t.Errorf("gone is %+v", gone)
	}
	if diff := cmp.Diff(empty, stateOf(t, opts.Dir)); diff != "" {
		t.Error("it leaves:", diff)
	}
}

// An un-enrolment that was cut off leaves a link that is detached, which looks as
// one of a namespace that has ended, or as one that somebody has detached: a
// namespace that is seen to live is enrolled again.
func TestALivingPodWhoseLinkIsDetachedIsEnrolledAgain(t *testing.T) {
	d, opts := ownDatapath(t)
	p := kit.NewPod(t)
	p.Enroll(d)
	p.Hold(kit.App)
	l, err := link.LoadPinnedLink(filepath.Join(podPins(opts, p.Cookie()), "inbound"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil {
		t.Fatal(err)
	}
	if err := d.CheckPod(p.Cookie()); err == nil {
		t.Error("nothing is missing, says CheckPod")
	}
	if swept := sweep(t, d); len(swept.Gone) != 0 || len(swept.Left) != 1 {
		t.Errorf("swept: %+v", swept)
	}
	if err := d.CheckPod(p.Cookie()); err != nil {
		t.Error(err)
	}
}

// Who looks into namespaces keeps none of them alive.
func TestNoDescriptorOfANamespaceStaysOpen(t *testing.T) {
	d, _ := ownDatapath(t)
	p := kit.NewPod(t)
	p.Enroll(d)
	p.Hold(kit.App)
	before := namespacesOpen(t)
	for range 3 {
		ns, found, err := d.Namespace(p.Cookie())
		if err != nil || !found || ns.Cookie() != p.Cookie() {
			t.Fatal("it is not found:", found, err)
		}
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
		sweep(t, d)
	}
	if after := namespacesOpen(t); after != before {
		t.Errorf("%d namespaces were open, now %d", before, after)
	}
}

// namespacesOpen counts this process's descriptors of network namespaces.
func namespacesOpen(t *testing.T) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && len(to) > 5 && to[:5] == "net:[" {
			n++
		}
	}
	return n
}
