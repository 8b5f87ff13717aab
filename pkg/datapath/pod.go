package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// Pod is what Enroll needs to know of a pod.
type Pod struct {
	Namespace, Name, UID string      // for people; may be empty
	Rules                rules.Rules // with the IDs that the pod sees
	Inbound              Inbound
	NoGuard              bool     // leave the TC egress guard out
	TC                   TCAttach // empty: TCAuto
}

// Enrolment says what Enroll did.
type Enrolment struct {
	Cookie    uint64
	Already   bool // it was enrolled before, and is now as asked
	Listeners int  // sockets of the proxy that were open already
	Before    int  // connections whose SYN was out already: they stay as they are
	Inbound   Inbound
	UserNS    bool     // the pod has a user namespace: its IDs were translated
	Notes     []string // what a person should know

	addedSource6 bool          // ::6 was added to lo, and a failure must remove it
	addedWayBack netns.WayBack // the same of TPROXY mode's way back
}

// ErrNotReady is returned for a namespace that cannot be enrolled as it is.
var ErrNotReady = errors.New("the network namespace is not ready")

// Enroll captures the connections of a network namespace from now on. It is
// idempotent: enrolling again changes rules and repairs what is missing. If it
// fails, a namespace that was not enrolled is as it was.
func (d *Datapath) Enroll(ns *netns.NetNS, pod Pod) (Enrolment, error) {
	if err := ns.RefuseHost(); err != nil {
		return Enrolment{}, fmt.Errorf("refused to enroll %s: %w; enroll a pod's namespace", ns.Path(), err)
	}
	normal, err := pod.Rules.Normalise()
	if err != nil {
		return Enrolment{}, err
	}
	ids, err := ns.IDs()
	if err != nil {
		return Enrolment{}, fmt.Errorf("refused to enroll %s, for its proxy would not be known: %w", ns.Path(), err)
	}
	if pod.Rules, err = normal.Translate(ids.UID, ids.GID); err != nil {
		return Enrolment{}, err
	}
	if pod.Inbound == "" {
		pod.Inbound = InboundSKLookup
	}
	if pod.TC == TCX && !d.Features().TCX {
		return Enrolment{}, errors.New("this kernel has no TCX links (Linux 6.6 has): attach by clsact")
	}
	if err := d.allow(pod.Rules.Mode); err != nil {
		return Enrolment{}, err
	}
	if len(pod.Rules.ExcludeInterfaces) > 0 && !d.Features().IngressIfindex {
		return Enrolment{}, errors.New("this kernel does not tell sk_lookup programs where a packet came in (Linux 5.17 does), so no interface can be excluded: enroll without excludeInterfaces")
	}
	if err := d.canCaptureDNS(pod.Rules); err != nil {
		return Enrolment{}, err
	}
	unlock, err := d.lock()
	if err != nil {
		return Enrolment{}, err
	}
	defer unlock()
	network, err := ns.Inspect() // under the lock: who comes later has seen the later state
	if err != nil {
		return Enrolment{}, err
	}
	if err := ready(network); err != nil {
		return Enrolment{}, err
	}
	if err := d.checkReroute(pod, network); err != nil {
		return Enrolment{}, fmt.Errorf("refused to enroll %s: %w", ns.Path(), err)
	}

	var before connectPod
	out := Enrolment{Cookie: ns.Cookie(), Already: d.maps["pods"].Lookup(ns.Cookie(), &before) == nil, Inbound: pod.Inbound, UserNS: ids.Own()}
	if out.Already && (pod.TC == "" || pod.TC == TCAuto) {
		pod.TC = before.tcAttach() // it keeps the way that it has
	}
	if err := d.enroll(ns, network, pod, &out); err != nil {
		if !out.Already {
			err = errors.Join(err, d.unenroll(ns.Cookie(), ns))
		} else if out.addedWayBack != 0 {
			err = errors.Join(err, ns.RemoveWayBack(out.addedWayBack), d.maps["pods"].Put(ns.Cookie(), before))
		}
		if out.addedSource6 { // the pod's entry may not have got as far as to say so
			err = errors.Join(err, ns.RemoveLoopback(proxySource6))
		}
		// Its rules may be written, and no pod has them.
		return Enrolment{}, errors.Join(err, d.dropOrphans())
	}
	if out.Already && before.RulesId != d.rulesIDOf(ns.Cookie()) {
		err = d.dropRules(before.RulesId)
	}
	return out, err
}

// canCaptureDNS refuses rules of which the half that is UDP would be ignored: by
// the kernel, or by a node whose programs an earlier version attached.
func (d *Datapath) canCaptureDNS(r rules.Rules) error {
	if !r.DNS {
		return nil
	}
	for _, hook := range udpHooks {
		_, err := os.Stat(d.nodePin(hook))
		if err != nil && !d.Features().UDP {
			return errors.New("this kernel has no sendmsg and recvmsg programs (Linux 5.2 has), so DNS over UDP cannot be captured: enroll without DNS capture")
		}
		if err != nil {
			return fmt.Errorf("%w completely: %s is not attached, so DNS over UDP cannot be captured; %s repairs it (%w)", ErrNotUp, hook, d.opts.hint("up"), err)
		}
	}
	return nil
}

func (p connectPod) tcAttach() TCAttach {
	if p.Flags&connectPodFlagsPOD_TCX != 0 {
		return TCX
	}
	return Clsact
}

// ready refuses namespaces in which nothing could be captured.
func ready(n netns.Network) error {
	for _, l := range n.Links {
		if l.Lo && !l.Up {
			return fmt.Errorf("%w: its lo interface is down, so the proxy cannot be reached; bring it up first (ip link set lo up)", ErrNotReady)
		}
	}
	return nil
}

// enroll writes the maps first, the pod's entry last of them, then collects what
// was open before, then attaches the pod's programs. The order lets nothing
// escape: as soon as the entry is there, connect() is captured.
func (d *Datapath) enroll(ns *netns.NetNS, network netns.Network, pod Pod, out *Enrolment) error {
	cookie := ns.Cookie()
	if err := d.beginLife(ns); err != nil {
		return err
	}
	value, err := d.writeRules(pod.Rules)
	if err != nil {
		return err
	}
	failpoint.Step("enroll: rules written")
	value.Addr4, value.Addr6 = toAddr(network.Primary4), toAddr(network.Primary6)
	if pod.Inbound == InboundTC {
		value.Flags |= connectPodFlagsPOD_INBOUND_TC
	}
	if !pod.NoGuard {
		value.Flags |= connectPodFlagsPOD_GUARD
	}
	if out.Already {
		value.Flags |= d.lasting(cookie)
	} else if err := d.addFact(cookie, connectPodFactFACT_WAITING); err != nil {
		return err // whatever the mode: it may change, and is then right
	}
	failpoint.Step("enroll: fact added")
	if err := d.planWayBack(ns, network, pod.Rules.Mode, &value, out); err != nil {
		return err
	}
	failpoint.Step("enroll: way back planned")
	if out.addedSource6 = lacksProxySource(network); out.addedSource6 {
		value.Flags |= connectPodFlagsPOD_ADDED_SOURCE6
		network.Addresses = append(network.Addresses, proxySource6)
	}
	entries, err := d.enrolNetwork(ns, network, pod, out)
	if err != nil {
		return err
	}
	value.Flags |= entries.flags()
	failpoint.Step("enroll: network written")
	for _, name := range []string{"handshake_use", "target_use"} {
		if err := d.maps[name].Update(cookie, uint32(0), ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return tableError(name, err)
		}
		failpoint.Step("enroll: " + name + " begun")
	}
	if err := d.writeName(cookie, pod); err != nil {
		return err
	}
	failpoint.Step("enroll: name written")
	six, err := d.nameReroutes(ns, pod.Rules.RerouteInterfaces)
	if err != nil {
		return err
	}
	if six {
		value.Flags |= connectPodFlagsPOD_REROUTES6
	}
	if err := d.maps["pods"].Put(cookie, value); err != nil {
		return tableError("pods", err)
	}
	failpoint.Step("enroll: pod written")
	if out.addedSource6 { // after the entry that says so, or nobody would remove it
		if _, err := ns.AddLoopback(proxySource6); err != nil {
			return err
		}
		failpoint.Step("enroll: source added")
	}
	if err := d.setWayBack(ns, pod.Rules.Mode, value, out.addedWayBack); err != nil {
		return err
	}
	failpoint.Step("enroll: way back set")
	runs, err := d.collect(ns, value, out)
	if err != nil {
		return err
	}
	failpoint.Step("enroll: open sockets collected")
	if pod.TC == TCX || pod.TC != Clsact && runs && d.Features().TCX {
		value.Flags |= connectPodFlagsPOD_TCX
		if err := d.maps["pods"].Put(cookie, value); err != nil {
			return tableError("pods", err)
		}
	}
	return d.attachPod(ns, network, entries, value.Flags, out.Already)
}

// enrolNetwork writes what the pod's entry will refer to: without its flags
// nobody looks at routes and interfaces. Where the flags are there already, each
// destination goes from what the rules before said of it to what these say.
func (d *Datapath) enrolNetwork(ns *netns.NetNS, network netns.Network, pod Pod, out *Enrolment) (podNetwork, error) {
	entries := networkOf(network, namesOf(pod.Rules))
	if err := d.noteInterfaces(ns, network, entries, out); err != nil {
		return podNetwork{}, err
	}
	var before podNetwork
	if out.Already {
		var err error
		if before, err = d.readNetwork(ns.Cookie(), d.flagsOf(ns.Cookie())|entries.flags()); err != nil {
			return podNetwork{}, err
		}
	}
	return entries, d.changeNetwork(ns.Cookie(), before, entries)
}

func kindName(kind connectInterfaceKind) string {
	if kind == connectInterfaceKindINTERFACE_REROUTED {
		return "rerouted"
	}
	return "excluded"
}

func (d *Datapath) flagsOf(cookie uint64) connectPodFlags {
	var p connectPod
	if d.maps["pods"].Lookup(cookie, &p) != nil {
		return 0
	}
	return p.Flags
}

// noteInterfaces notes what may surprise who excludes interfaces.
func (d *Datapath) noteInterfaces(ns *netns.NetNS, network netns.Network, entries podNetwork, out *Enrolment) error {
	if len(entries.names) == 0 {
		return nil
	}
	for _, name := range entries.missing(network) {
		out.Notes = append(out.Notes, fmt.Sprintf("interface %s is not there yet: it is %s once %s or %s has seen it", name, kindName(entries.names[name]), d.opts.hint("refresh --all"), d.opts.hint("watch")))
	}
	if !entries.named(connectInterfaceKindINTERFACE_EXCLUDED) {
		return nil
	}
	routed, err := ns.PolicyRouted()
	if routed {
		out.Notes = append(out.Notes, "the namespace has routing rules of its own (ip rule): which connections leave by an excluded interface is told by its main table alone")
	}
	return err
}

// Unenroll stops capturing for a namespace, living (ns) or dead (ns nil), and
// leaves nothing of it. One that is not enrolled is no error; found says
// whether it was.
func (d *Datapath) Unenroll(cookie uint64, ns *netns.NetNS) (found bool, err error) {
	unlock, err := d.lock()
	if err != nil {
		return false, err
	}
	defer unlock()
	if ns == nil {
		if ns = d.find(cookie); ns != nil {
			defer ns.Close()
		}
	}
	var value connectPod
	found = d.maps["pods"].Lookup(cookie, &value) == nil
	return found, d.unenroll(cookie, ns)
}

// unenroll takes the programs away first: while the pod's sk_lookup program is
// attached, a pod that is not in the map is refused everything.
func (d *Datapath) unenroll(cookie uint64, ns *netns.NetNS) error {
	var value connectPod
	known := d.maps["pods"].Lookup(cookie, &value) == nil
	errs := unreroute(d.maps["reroutes"], cookie, ns)
	failpoint.Step("unenroll: reroutes removed")
	errs = errors.Join(errs, d.detachPod(cookie, ns))
	failpoint.Step("unenroll: detached")
	errs = errors.Join(errs, restoreNamespace(ns, value))
	failpoint.Step("unenroll: namespace restored")
	errs = errors.Join(errs, deleteKey(d.maps["pods"], cookie))
	failpoint.Step("unenroll: pod deleted")
	errs = errors.Join(errs, d.deleteFacts(cookie), d.deleteTargets(cookie))
	failpoint.Step("unenroll: facts deleted")
	for _, name := range []string{"pod_names", "handshake_use", "target_use"} {
		errs = errors.Join(errs, deleteKey(d.maps[name], cookie))
		failpoint.Step("unenroll: " + name + " deleted")
	}
	errs = errors.Join(errs,
		deleteWhere(d.maps["forwarded"], func(k connectForwardedKey) bool { return k.Cookie == cookie }),
		d.forgetNetwork(!known || hasRoutes(value.Flags), func(c uint64) bool { return c == cookie }),
		deleteWhere(d.maps["handshakes"], func(k connectHandshakeKey) bool { return k.Cookie == cookie }),
		d.deleteStats(cookie),
	)
	failpoint.Step("unenroll: network deleted")
	if !known {
		// It may have been cut off once between its entry and its rules, and nothing
		// says any more which ones they were.
		return errors.Join(errs, d.dropOrphans(), d.endLife(cookie))
	}
	errs = errors.Join(errs, d.deleteListeners(cookie, value))
	failpoint.Step("unenroll: listeners deleted")
	return errors.Join(errs, d.dropRules(value.RulesId), d.endLife(cookie))
}

// deleteTargets removes a pod's address book. Its connections stay open; what
// they show changes to what the kernel knows.
func (d *Datapath) deleteTargets(cookie uint64) error {
	var used uint32
	if err := d.maps["target_use"].Lookup(cookie, &used); errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read target_use: %w", err)
	}
	var errs error
	for index := range used {
		key := connectTargetKey{Cookie: cookie, Index: index + 1}
		var target connectTarget
		if d.maps["targets"].Lookup(key, &target) != nil {
			continue
		}
		errs = errors.Join(errs,
			deleteKey(d.maps["target_index"], connectTargetIndexKey{Cookie: cookie, Target: target}),
			deleteKey(d.maps["targets"], key))
	}
	return errs
}

// lasting are the flags of an enrolled pod that follow neither from its rules
// nor from what is asked.
func (d *Datapath) lasting(cookie uint64) connectPodFlags {
	var p connectPod
	if d.maps["pods"].Lookup(cookie, &p) != nil {
		return 0
	}
	return p.Flags & connectPodFlagsPOD_ADDED_SOURCE6
}

// proxySource6 is what a proxy binds as its source when it calls the app over
// IPv6. 127.0.0.6 is there by itself; this one Istio adds, and so must we.
var proxySource6 = netip.MustParseAddr("::6")

func lacksProxySource(network netns.Network) bool {
	return network.Primary6.IsValid() && !slices.Contains(network.Addresses, proxySource6)
}

func addProxySource(ns *netns.NetNS, network *netns.Network) (added bool, err error) {
	if !lacksProxySource(*network) {
		return false, nil
	}
	added, err = ns.AddLoopback(proxySource6)
	network.Addresses = append(network.Addresses, proxySource6)
	return added, err
}

func (d *Datapath) deleteStats(cookie uint64) error {
	var errs error
	for reason := range connectReasonREASON_MAX {
		errs = errors.Join(errs, deleteKey(d.maps["stats"], connectStatKey{Cookie: cookie, Reason: reason}))
	}
	return errs
}

func (d *Datapath) writeName(cookie uint64, pod Pod) error {
	var v connectPodName
	setText(v.Namespace[:], pod.Namespace)
	setText(v.Name[:], pod.Name)
	setText(v.Uid[:], pod.UID)
	if err := d.maps["pod_names"].Put(cookie, v); err != nil {
		return tableError("pod_names", err)
	}
	return nil
}

// tableError says which table is full, where that is it.
func tableError(table string, err error) error {
	if errors.Is(err, ErrTableFull) || isFull(err) {
		return fmt.Errorf("%w: %s; un-enroll pods or give the node larger tables", ErrTableFull, table)
	}
	return fmt.Errorf("write %s: %w", table, err)
}

// deleteWhere removes the entries of a map whose key is chosen. It collects
// first: deleting while iterating may skip entries or start over.
func deleteWhere[K any](m *ebpf.Map, chosen func(K) bool) error {
	keys, err := keysOf(m, chosen)
	if err != nil {
		return err
	}
	var errs error
	for _, k := range keys {
		errs = errors.Join(errs, deleteKey(m, k))
	}
	return errs
}

func deleteKey(m *ebpf.Map, key any) error {
	err := m.Delete(key)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete from %s: %w", m, err)
	}
	if failpoint.Enabled {
		failpoint.Step("entry deleted from " + m.String())
	}
	return nil
}

func keysOf[K any](m *ebpf.Map, chosen func(K) bool) ([]K, error) {
	for {
		var keys []K
		var key, next K
		err := m.NextKey(nil, &key)
		for err == nil {
			if chosen(key) {
				keys = append(keys, key)
			}
			if err = m.NextKey(key, &next); err == nil {
				key = next
			}
			if len(keys) > int(m.MaxEntries())*2 {
				break // entries came and went, and the kernel starts over: again
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return keys, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", m, err)
		}
	}
}
