package install

import (
	"os"
	"testing"
	"time"
)

// The clock is the test's own: no waiting.
func TestAContestBacksOff(t *testing.T) {
	n := newNode(t)
	n.write("05-cilium.conflist", cilium)
	i := n.installer()
	now := time.Now()
	look := func(after time.Duration) time.Duration {
		now = now.Add(after)
		return i.look(now)
	}
	look(0)
	n.wantEntry("05-cilium.conflist")

	for loss := 1; loss <= 2; loss++ { // put up with
		n.write("05-cilium.conflist", cilium)
		look(time.Second)
		n.wantEntry("05-cilium.conflist")
		if s := i.Status(); !s.Ready || s.Overwritten != loss {
			t.Fatalf("after loss %d: %+v", loss, s)
		}
	}

	delays := []time.Duration{}
	for loss := 3; loss <= 13; loss++ {
		n.write("05-cilium.conflist", cilium)
		again := look(time.Second)
		n.wantNotReady(i.Status(), "05-cilium.conflist", "cilium-cni", "cni.exclusive=false", "times in a row")
		if n.read("05-cilium.conflist") != cilium {
			t.Fatalf("loss %d is repaired at once", loss)
		}
		look(again / 2)
		if n.read("05-cilium.conflist") != cilium {
			t.Fatalf("loss %d is repaired before its time", loss)
		}
		probation := look(again - again/2)
		n.wantEntry("05-cilium.conflist")
		n.wantNotReady(i.Status(), "cilium-cni") // it may not last
		if probation != i.time.probation+again {
			t.Errorf("on probation for %v after a delay of %v", probation, again)
		}
		delays = append(delays, again)
	}
	for k, d := range delays {
		if want := min(time.Second<<k, 5*time.Minute); d != want {
			t.Errorf("delay %d is %v, want %v", k, d, want)
		}
	}
	if got := i.Status().Overwritten; got != 13 {
		t.Errorf("overwritten %d times", got)
	}

	look(i.time.probation + i.time.maxDelay) // Cilium was set right
	if s := i.Status(); !s.Ready {
		t.Fatalf("%+v", s)
	}
	n.write("05-cilium.conflist", cilium) // not forgotten yet
	look(time.Second)
	n.wantNotReady(i.Status(), "14 times")
	look(i.time.maxDelay)
	look(i.time.memory + 3*i.time.maxDelay)
	n.write("05-cilium.conflist", cilium) // an upgrade of Cilium, much later
	look(time.Second)
	if s := i.Status(); !s.Ready {
		t.Errorf("%+v", s)
	}
}

func TestAContestOverTheBinary(t *testing.T) {
	n := newNode(t)
	n.write("10-calico.conflist", calico)
	i := n.installer()
	now := time.Now()
	i.look(now)
	for loss := 1; loss <= 3; loss++ {
		if err := os.Remove(n.bin + "/sluice-cni"); err != nil {
			t.Fatal(err)
		}
		now = now.Add(time.Second)
		i.look(now)
	}
	n.wantNotReady(i.Status(), "/opt/cni/bin/sluice-cni", "3 times")
	if exists(n.bin + "/sluice-cni") {
		t.Error("it was put back at once")
	}
	now = now.Add(time.Second)
	i.look(now)
	n.wantNotReady(i.Status(), "/opt/cni/bin/sluice-cni")
	if !exists(n.bin + "/sluice-cni") {
		t.Error("it was not put back")
	}
	i.look(now.Add(time.Minute))
	if s := i.Status(); !s.Ready {
		t.Errorf("%+v", s)
	}
}

// With .conf files the overwritten file is not the one that had the entry.
func TestAContestOverAConvertedFile(t *testing.T) {
	n := newNode(t)
	n.write("00-multus.conf", multus)
	i := n.installer()
	now := time.Now()
	i.look(now)
	for loss := 1; loss <= 3; loss++ {
		n.write("00-multus.conf", multus)
		now = now.Add(time.Second)
		i.look(now)
	}
	n.wantNotReady(i.Status(), "00-multus.conf", "multus-shim", "3 times")
	if n.read("00-multus.conf") != multus {
		t.Error("converted at once")
	}
}
