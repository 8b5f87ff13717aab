package datapath

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// What a daemon asks that did not enroll the pods itself: what is in force, what
// is left of namespaces that are gone, how full the tables are.

// Force is how a pod is enrolled, as far as the maps tell.
type Force struct {
	Follows bool       // the rules that were asked about are the pod's
	DNS     bool       // port 53 is captured
	Mode    rules.Mode // empty: not to be told
	Inbound Inbound
	NoGuard bool
}

// InForce compares what a pod is enrolled with to rules. found is false for a
// namespace that is not enrolled.
func (d *Datapath) InForce(cookie uint64, r rules.Rules) (out Force, found bool, err error) {
	normal, err := r.Normalise()
	if err != nil {
		return Force{}, false, err
	}
	var p connectPod
	if err := d.maps["pods"].Lookup(cookie, &p); errors.Is(err, ebpf.ErrKeyNotExist) {
		return Force{}, false, nil
	} else if err != nil {
		return Force{}, false, fmt.Errorf("read pods: %w", err)
	}
	var set connectRuleSet
	if err := d.maps["rule_sets"].Lookup(p.RulesId, &set); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return Force{}, false, fmt.Errorf("read rule_sets: %w", err)
	}
	out = Force{Follows: set.Sha256 == normal.Digest(), DNS: p.Flags&connectPodFlagsPOD_DNS != 0, Inbound: InboundSKLookup}
	out.Mode = rules.Redirect
	if p.Flags&connectPodFlagsPOD_TPROXY != 0 {
		out.Mode = rules.TProxy
	}
	out.NoGuard = p.Flags&connectPodFlagsPOD_GUARD == 0
	if p.Flags&connectPodFlagsPOD_INBOUND_TC != 0 {
		out.Inbound = InboundTC
	}
	return out, true, nil
}

// Settle marks every attachment of a namespace as judged.
func (d *Datapath) Settle(cookie uint64) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return d.eachAttachmentOf(cookie, func(key connectAttachmentKey, value connectAttachment) error {
		value.Flags &^= connectAttachmentFlagsATTACHMENT_PROVISIONAL
		return d.maps["attachments"].Update(key, value, ebpf.UpdateExist)
	})
}

// forget drops the attachments of a namespace.
func (d *Datapath) forget(cookie uint64) error {
	return d.eachAttachmentOf(cookie, func(key connectAttachmentKey, _ connectAttachment) error {
		return deleteKey(d.maps["attachments"], key)
	})
}

func (d *Datapath) eachAttachmentOf(cookie uint64, do func(connectAttachmentKey, connectAttachment) error) error {
	var errs error
	err := each(d.maps["attachments"], func(k connectAttachmentKey, v connectAttachment) {
		if v.Cookie == cookie {
			errs = errors.Join(errs, do(k, v))
		}
	})
	return errors.Join(err, errs)
}

// Sweep does what nobody else did: it un-enrols namespaces that are gone, of
// which the kernel tells, completes enrolments that were cut off, and removes
// what belongs to no pod. It returns the pods that it un-enrolled.
func (d *Datapath) Sweep() ([]PodInfo, error) {
	before, err := d.Pods()
	if err != nil {
		return nil, err
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	errs := d.repairPods()
	var gone []PodInfo
	for _, p := range before {
		var value connectPod
		if errors.Is(d.maps["pods"].Lookup(p.Cookie, &value), ebpf.ErrKeyNotExist) {
			gone = append(gone, p)
			errs = errors.Join(errs, d.forget(p.Cookie))
		}
	}
	return gone, errs
}

// Strays lists the namespaces that attachments are about and that are not
// enrolled: an ADD is between its two steps, or it was cut off there.
func (d *Datapath) Strays() ([]uint64, error) {
	var out []uint64
	err := each(d.maps["attachments"], func(_ connectAttachmentKey, v connectAttachment) {
		var p connectPod
		if errors.Is(d.maps["pods"].Lookup(v.Cookie, &p), ebpf.ErrKeyNotExist) && !slices.Contains(out, v.Cookie) {
			out = append(out, v.Cookie)
		}
	})
	return out, err
}

// DropStrays removes the attachments about namespaces, if they still are not
// enrolled. Give those that Strays has listed for longer than any ADD takes.
func (d *Datapath) DropStrays(cookies []uint64) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	var errs error
	for _, cookie := range cookies {
		var p connectPod
		if errors.Is(d.maps["pods"].Lookup(cookie, &p), ebpf.ErrKeyNotExist) {
			errs = errors.Join(errs, d.forget(cookie))
		}
	}
	return errs
}

// Fill is how full a table is.
type Fill struct {
	Table        string
	Entries, Max int
}

// Fill counts the tables whose filling up a person should see coming.
func (d *Datapath) Fill() ([]Fill, error) {
	var targets, attachments, listeners, sets int
	pods, handshakes := 0, 0
	err := errors.Join(
		eachPod(d.maps["pods"], func(uint64, connectPod) { pods++ }),
		each(d.maps["target_use"], func(_ uint64, used uint32) { targets += int(used) }),
		each(d.maps["handshake_use"], func(_ uint64, used uint32) { handshakes += int(used) }),
		each(d.maps["attachments"], func(connectAttachmentKey, connectAttachment) { attachments++ }),
		each(d.maps["rule_sets"], func(uint32, connectRuleSet) { sets++ }),
	)
	keys, errKeys := keysOf(d.maps["listeners"], func(connectListenerKey) bool { return true })
	listeners = len(keys)
	var out []Fill
	for _, f := range []Fill{
		{"attachments", attachments, 0}, {"handshakes", handshakes, 0}, {"listeners", listeners, 0},
		{"pods", pods, 0}, {"rule_sets", sets, 0}, {"targets", targets, 0},
	} {
		f.Max = int(d.maps[f.Table].MaxEntries())
		out = append(out, f)
	}
	return out, errors.Join(err, errKeys)
}

// Features are those of the kernel that the datapath was brought up on.
func (d *Datapath) Features() Features { return d.probed() }
