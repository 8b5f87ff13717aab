package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// In TPROXY mode the proxy calls the app from the client's address, and a rule,
// a route and three settings of the namespace lead the app's answers back to it
// (docs/adr/0007). The pod's entry says what of it is ours to remove. It says so
// before anything is added, and until everything is removed: whoever is killed in
// between leaves nothing that nobody knows of.

// ErrNoTProxy is returned where TPROXY mode cannot work.
var ErrNoTProxy = errors.New("this kernel cannot do TPROXY mode")

// allow refuses TPROXY mode where the inbound program cannot tell what comes in
// by lo.
func (d *Datapath) allow(mode rules.Mode) error {
	if mode == rules.TProxy && !d.Features().IngressIfindex {
		return fmt.Errorf("%w: it lacks ingress_ifindex in sk_lookup programs, so the proxy's calls for its clients cannot be told from what comes from the network. Linux 5.17 or newer has it; use mode %s", ErrNoTProxy, rules.Redirect)
	}
	return nil
}

// planWayBack notes in the pod's entry what is to be added to the namespace.
func (d *Datapath) planWayBack(ns *netns.NetNS, network netns.Network, mode rules.Mode, value *connectPod, out *Enrolment) error {
	if out.Already {
		var before connectPod
		if err := d.maps["pods"].Lookup(ns.Cookie(), &before); err != nil {
			return fmt.Errorf("read the pod's entry: %w", err)
		}
		value.WayBack = before.WayBack
	}
	if mode != rules.TProxy {
		return nil
	}
	missing, err := ns.MissingWayBack(network.Primary6.IsValid(), netns.WayBack(value.WayBack))
	if err != nil {
		return err
	}
	value.Flags |= connectPodFlagsPOD_TPROXY
	value.WayBack |= uint16(missing)
	out.addedWayBack = missing
	return nil
}

// setWayBack makes the namespace what the pod's entry says.
func (d *Datapath) setWayBack(ns *netns.NetNS, mode rules.Mode, value connectPod, missing netns.WayBack) error {
	if mode == rules.TProxy {
		return ns.AddWayBack(missing)
	}
	if value.WayBack == 0 {
		return nil
	}
	return d.forgetWayBack(ns, netns.WayBack(value.WayBack)) // it was in TPROXY mode before
}

// forgetWayBack removes parts of an enrolled pod's way back, from the namespace
// first and then from the entry.
func (d *Datapath) forgetWayBack(ns *netns.NetNS, parts netns.WayBack) error {
	if err := ns.RemoveWayBack(parts); err != nil {
		return err
	}
	var p connectPod
	if err := d.maps["pods"].Lookup(ns.Cookie(), &p); err != nil {
		return fmt.Errorf("read the pod's entry: %w", err)
	}
	p.WayBack &^= uint16(parts)
	if err := d.maps["pods"].Update(ns.Cookie(), p, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("change the pod's entry: %w", err)
	}
	return nil
}

// restoreNamespace takes away what enrolment added to a namespace. One that is
// gone (ns nil) has taken it along.
func restoreNamespace(ns *netns.NetNS, value connectPod) error {
	if ns == nil {
		return nil
	}
	var errs error
	if value.Flags&connectPodFlagsPOD_ADDED_SOURCE6 != 0 {
		errs = ns.RemoveLoopback(proxySource6)
	}
	return errors.Join(errs, ns.RemoveWayBack(netns.WayBack(value.WayBack)))
}
