package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// Capture says whether a pod's outbound connections are captured now.
type Capture string

// The states: Waiting lets them go direct, until the proxy has listened, from
// which on it is Ready.
const (
	CaptureAlways  Capture = Capture(rules.Always)
	CaptureWaiting Capture = "waiting"
	CaptureReady   Capture = "ready"
)

func factKey(cookie uint64, fact connectPodFact) connectPodFactKey {
	return connectPodFactKey{Cookie: cookie, Fact: fact}
}

func (d *Datapath) addFact(cookie uint64, fact connectPodFact) error {
	if err := d.maps["pod_facts"].Put(factKey(cookie, fact), uint32(0)); err != nil {
		return tableError("pod_facts", err)
	}
	return nil
}

func (d *Datapath) deleteFact(cookie uint64, fact connectPodFact) error {
	return deleteKey(d.maps["pod_facts"], factKey(cookie, fact))
}

func (d *Datapath) deleteFacts(cookie uint64) error {
	var errs error
	for _, fact := range []connectPodFact{connectPodFactFACT_WAITING, connectPodFactFACT_OUT_ASSIGNABLE, connectPodFactFACT_IN_ASSIGNABLE} {
		errs = errors.Join(errs, d.deleteFact(cookie, fact))
	}
	return errs
}

// captureOf is the state of an enrolled pod.
func (d *Datapath) captureOf(cookie uint64, flags connectPodFlags) (Capture, error) {
	if flags&connectPodFlagsPOD_WHEN_READY == 0 {
		return CaptureAlways, nil
	}
	var nothing uint32
	err := d.maps["pod_facts"].Lookup(factKey(cookie, connectPodFactFACT_WAITING), &nothing)
	switch {
	case err == nil:
		return CaptureWaiting, nil
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return CaptureReady, nil
	}
	return "", fmt.Errorf("read pod_facts: %w", err)
}
