package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// ErrNotEnrolled is returned for a namespace that is not enrolled.
var ErrNotEnrolled = errors.New("the namespace is not enrolled")

// Change is one thing that Refresh changed.
type Change struct {
	What  string // such as "address added"
	Which string // such as "10.0.0.1"
}

// Refreshed says what Refresh changed.
type Refreshed struct {
	Pod     string // NAMESPACE/NAME, or empty
	Changes []Change
}

// Refresh makes an enrolled namespace's addresses, routes, interfaces and TC
// programs what they should be, now that it may have changed. It is idempotent,
// and looks at nothing but the differences. If a table is full, the rest is done
// all the same.
func (d *Datapath) Refresh(ns *netns.NetNS) (Refreshed, error) {
	unlock, err := d.lock()
	if err != nil {
		return Refreshed{}, err
	}
	defer unlock()
	cookie := ns.Cookie()
	out := Refreshed{Pod: d.podName(cookie)}
	var before connectPod
	err = d.maps["pods"].Lookup(cookie, &before)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return out, ErrNotEnrolled
	}
	if err != nil {
		return out, fmt.Errorf("read the pod's entry: %w", err)
	}
	// Read under the lock: who comes later has seen the later state.
	network, err := ns.Inspect()
	if err != nil {
		return out, err
	}
	addedSource6, err := addProxySource(ns, &network)
	if err != nil {
		return out, err
	}
	old, err := d.readNetwork(cookie, before.Flags)
	if err != nil {
		return out, err
	}
	new := networkOf(network, old.names)
	// A guard first: through a new interface anything can leave until it is there.
	attached, err := d.attachInterfaces(ns, network, new, before.Flags, true)
	out.note("program attached", attached...)
	if e := d.changeNetwork(cookie, old, new); e != nil {
		err = errors.Join(err, e)
	} else {
		out.compare(old, new)
	}
	after := before
	err = errors.Join(err, d.editPod(cookie, func(p *connectPod) {
		p.Addr4, p.Addr6 = primary(p.Addr4, network.Primary4, network), primary(p.Addr6, network.Primary6, network)
		p.Flags = p.Flags&^connectPodFlagsPOD_HAS_LOCALS | new.flags()
		if addedSource6 {
			p.Flags |= connectPodFlagsPOD_ADDED_SOURCE6
		}
		after = *p
	}))
	for _, a := range [][2]connectAddr{{before.Addr4, after.Addr4}, {before.Addr6, after.Addr6}} {
		if a[0] != a[1] {
			out.note("source of captured connections", addrText(a[1]))
		}
	}
	return out, errors.Join(err, d.detachInterfaces(ns, network, new, before.Flags))
}

// namesOf are the interfaces that a pod's rules name.
func namesOf(r rules.Rules) map[string]connectInterfaceKind {
	out := map[string]connectInterfaceKind{}
	for _, name := range r.ExcludeInterfaces {
		out[name] = connectInterfaceKindINTERFACE_EXCLUDED
	}
	for _, name := range r.RerouteInterfaces {
		out[name] = connectInterfaceKindINTERFACE_REROUTED
	}
	return out
}

func (r *Refreshed) note(what string, which ...string) {
	slices.Sort(which)
	for _, w := range which {
		r.Changes = append(r.Changes, Change{what, w})
	}
}

func (r *Refreshed) compare(old, new podNetwork) {
	lists := map[string][]string{}
	difference(old.own, new.own, func(a connectAddr, v any) {
		// A broadcast address comes and goes with its address.
		if v == nil && old.own[a] == connectOwnKindOWN_ADDR {
			lists["address removed"] = append(lists["address removed"], addrText(a))
		} else if v == connectOwnKindOWN_ADDR {
			lists["address added"] = append(lists["address added"], addrText(a))
		}
	})
	difference(old.routes, new.routes, func(p netip.Prefix, v any) {
		what := map[any]string{
			nil: "route removed", connectRouteKindROUTE_OTHER: "route not excluded",
			connectRouteKindROUTE_EXCLUDED: "route excluded", connectRouteKindROUTE_LOCAL: "local prefix",
		}[v]
		lists[what] = append(lists[what], p.String())
	})
	difference(old.interfaces, new.interfaces, func(index uint32, v any) {
		what := map[any]string{
			nil: "interface not excluded", connectInterfaceKindINTERFACE_EXCLUDED: "interface excluded",
			connectInterfaceKindINTERFACE_CARRIER:  "interface carries an excluded one",
			connectInterfaceKindINTERFACE_REROUTED: "interface rerouted",
			connectInterfaceKindINTERFACE_OTHER:    "interface known",
		}[v]
		lists[what] = append(lists[what], fmt.Sprint("index ", index))
	})
	for _, what := range []string{
		"address added", "address removed", "local prefix", "interface excluded", "interface not excluded",
		"interface carries an excluded one", "interface rerouted", "interface known", "route excluded", "route not excluded", "route removed",
	} {
		r.note(what, lists[what]...)
	}
}

// primary is what a captured socket shows as its source: the same for as long as
// the pod has it, for the kernel may list a newer address first.
func primary(now connectAddr, first netip.Addr, network netns.Network) connectAddr {
	if slices.Contains(network.Global, fromAddr(now.B)) {
		return now
	}
	return toAddr(first)
}

func addrText(a connectAddr) string {
	if address := fromAddr(a.B); address.IsValid() {
		return address.String()
	}
	return "none"
}

func (d *Datapath) podName(cookie uint64) string {
	var name connectPodName
	if d.maps["pod_names"].Lookup(cookie, &name) != nil || name.Name[0] == 0 {
		return ""
	}
	return text(name.Namespace[:]) + "/" + text(name.Name[:])
}

// editPod changes a pod's entry, if there is anything to change. No program
// writes it, and user space holds the lock.
func (d *Datapath) editPod(cookie uint64, edit func(*connectPod)) error {
	var before connectPod
	if err := d.maps["pods"].Lookup(cookie, &before); err != nil {
		return fmt.Errorf("read the pod's entry: %w", err)
	}
	after := before
	edit(&after)
	if after == before {
		return nil
	}
	if err := d.maps["pods"].Update(cookie, after, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("change the pod's entry: %w", err)
	}
	return nil
}

// Cookies lists the enrolled pods.
func (d *Datapath) Cookies() ([]uint64, error) {
	return keysOf(d.maps["pods"], func(uint64) bool { return true })
}

// StillUp returns ErrNotUp once the datapath that was opened has been taken
// down, whether or not another has been put in its place.
func (d *Datapath) StillUp() error {
	pinned, err := ebpf.LoadPinnedMap(d.mapsDir()+"/pods", nil)
	if err != nil {
		return fmt.Errorf("%w any more below %s", ErrNotUp, d.opts.Dir)
	}
	defer pinned.Close()
	ours, err := mapID(d.maps["pods"])
	if err != nil {
		return err
	}
	if there, err := mapID(pinned); err != nil || there != ours {
		return fmt.Errorf("%w below %s as it was: it was taken down and up again", ErrNotUp, d.opts.Dir)
	}
	return nil
}

func mapID(m *ebpf.Map) (ebpf.MapID, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("identify %s: %w", m, err)
	}
	id, _ := info.ID()
	return id, nil
}
