package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// Without anything listening on the way: what user space does to an enrolled pod
// neither ends the wait nor begins another.
func TestNothingButTheProxyChangesWhetherItIsReady(t *testing.T) {
	d, opts := ownDatapath(t)
	p, f := kit.NewPod(t), families[0]
	server := p.Far.Listen(kit.Root, "[::]:80")
	reachesDirectly(t, p, f, server, "without Sluice")
	again := func() {
		t.Helper()
		other, err := datapath.Up(opts)
		if err != nil {
			t.Fatal(err)
		}
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
	}
	enroll := func() { t.Helper(); p.Enroll(d, proxyReady) }
	always := func() {
		t.Helper()
		p.Enroll(d)
		isRefused(t, p, f, server, "in the mode always")
		p.Enroll(d, proxyReady)
	}
	steps := []struct {
		name string
		do   func()
	}{{"up again", again}, {"enrolled again", enroll}, {"the mode changed and came back", always}}

	enroll()
	for _, s := range steps {
		s.do()
		wantCapture(t, d, p, datapath.CaptureWaiting, s.name+":")
		reachesDirectly(t, p, f, server, s.name)
	}
	proxy := p.Listen(kit.Proxy, "[::]:15001")
	isCaptured(t, p, f, proxy, server, "with a proxy")
	proxy.Close()
	for _, s := range steps {
		s.do()
		wantCapture(t, d, p, datapath.CaptureReady, s.name+", the proxy dead:")
		isRefused(t, p, f, server, s.name+", the proxy dead:")
	}
}

// In the mode always it is noted too, for the day on which the mode changes.
func TestAProxyThatListenedInTheModeAlwaysIsNotWaitedFor(t *testing.T) {
	d := kit.Datapath(t)
	p, f := kit.NewPod(t), families[0]
	server := p.Far.Listen(kit.Root, "[::]:80")
	reachesDirectly(t, p, f, server, "without Sluice")
	p.Enroll(d)
	p.Listen(kit.Proxy, "[::]:15001").Close()
	p.Enroll(d, proxyReady)
	wantCapture(t, d, p, datapath.CaptureReady, "later")
	isRefused(t, p, f, server, "later")
}

// sockops notes the listener while user space writes the pod's entry over and
// over: neither undoes the other's work.
func TestTheProxyListensWhileThePodIsEnrolledAgain(t *testing.T) {
	d, _ := ownDatapath(t)
	p, f := kit.NewPod(t), families[0]
	server := p.Far.Listen(kit.Root, "[::]:80")
	reachesDirectly(t, p, f, server, "without Sluice")
	pod := datapath.Pod{Rules: rules.Default()}
	proxyReady(&pod)
	for round := range 25 {
		if _, err := d.Enroll(p.NetNS, pod); err != nil {
			t.Fatal(err)
		}
		wantCapture(t, d, p, datapath.CaptureWaiting, "before:")
		stop, done := make(chan struct{}), make(chan error, 1)
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				if _, err := d.Enroll(p.NetNS, pod); err != nil {
					done <- err
					return
				}
			}
		}()
		l := p.Listen(kit.Proxy, "0.0.0.0:15001")
		isCaptured(t, p, f, l, server, fmt.Sprintf("round %d", round))
		l.Close()
		isRefused(t, p, f, server, fmt.Sprintf("round %d, the proxy dead:", round))
		close(stop)
		if err := <-done; err != nil {
			t.Fatal("enroll:", err)
		}
		wantCapture(t, d, p, datapath.CaptureReady, "after:")
		if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
}

// An enrolment that is killed between the pod's entry and its programs has not
// looked for the listeners that were open before: the next start does.
func TestUpNotesTheListenersOfAnEnrolmentThatWasCutOff(t *testing.T) {
	d, opts := ownDatapath(t)
	p, f := kit.NewPod(t), families[0]
	server := p.Far.Listen(kit.Root, "[::]:80")
	reachesDirectly(t, p, f, server, "without Sluice")
	proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
	p.Hold(kit.Proxy, proxy)
	p.Enroll(d, proxyReady)

	// As it was then.
	m, err := ebpf.LoadPinnedMap(filepath.Join(opts.Dir, datapath.Layout, "maps/pod_facts"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	const factWaiting = 1
	if err := m.Put([2]uint64{p.Cookie(), factWaiting}, uint32(0)); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(opts.Dir, datapath.Layout, "links/pods", fmt.Sprint(p.Cookie()), "inbound")); err != nil {
		t.Fatal(err)
	}
	reachesDirectly(t, p, f, server, "cut off")

	again, err := datapath.Up(opts)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	wantCapture(t, d, p, datapath.CaptureReady, "after the next start")
	isCaptured(t, p, f, proxy, server, "after the next start")
}
