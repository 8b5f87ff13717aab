package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf/link"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// repairPods makes the pods' stubs what the map says: it completes an enrolment
// that was cut off, un-enrols namespaces that are gone, and removes links
// without a pod.
func (d *Datapath) repairPods() error {
	known := map[uint64]connectPod{}
	if err := eachPod(d.maps["pods"], func(cookie uint64, p connectPod) { known[cookie] = p }); err != nil {
		return err
	}
	var errs error
	var incomplete []uint64
	for cookie := range known {
		alive, err := d.podAlive(cookie)
		if err == nil && !alive {
			incomplete = append(incomplete, cookie)
		}
		errs = errors.Join(errs, err)
	}
	errs = errors.Join(errs, d.completePods(incomplete), d.removeStrayLinks(known))
	return errors.Join(errs, d.dropOrphans())
}

// podAlive says whether a pod's enrolment is complete and its namespace lives.
func (d *Datapath) podAlive(cookie uint64) (bool, error) {
	inbound, err := link.LoadPinnedLink(filepath.Join(d.podDir(cookie), progInbound), nil)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open the link of pod %d: %w", cookie, err)
	}
	defer inbound.Close()
	info, err := inbound.Info()
	if err != nil {
		return false, fmt.Errorf("read the link of pod %d: %w", cookie, err)
	}
	ns := info.NetNs()
	return ns != nil && ns.NetnsInode != 0, nil
}

// CheckPod says what is missing of a pod's enrolment, in an error.
func (d *Datapath) CheckPod(cookie uint64) error {
	var value connectPod
	if err := d.maps["pods"].Lookup(cookie, &value); err != nil {
		return fmt.Errorf("namespace %d is not in the map pods: %w", cookie, err)
	}
	var set connectRuleSet
	if err := d.maps["rule_sets"].Lookup(value.RulesId, &set); err != nil {
		return fmt.Errorf("rule set %08x of namespace %d is not there: %w", value.RulesId, cookie, err)
	}
	alive, err := d.podAlive(cookie)
	if err == nil && !alive {
		err = fmt.Errorf("the sk_lookup program of namespace %d is not attached", cookie)
	}
	return err
}

// completePods attaches what is missing to the namespaces that still live, and
// un-enrols the others.
func (d *Datapath) completePods(cookies []uint64) error {
	if len(cookies) == 0 {
		return nil
	}
	alive := netns.ByCookie()
	var errs error
	for _, cookie := range cookies {
		path, ok := alive[cookie]
		if !ok {
			errs = errors.Join(errs, d.unenroll(cookie, nil))
			continue
		}
		if err := d.complete(path); err != nil {
			errs = errors.Join(errs, fmt.Errorf("complete the enrolment of %s: %w", path, err))
		}
	}
	return errs
}

// complete does what an enrolment does once the pod's entry is written. It may
// have been cut off before the proxy's listeners were noted.
func (d *Datapath) complete(path string) error {
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	network, err := ns.Inspect()
	if err != nil {
		return err
	}
	var pod connectPod
	if err := d.maps["pods"].Lookup(ns.Cookie(), &pod); err != nil {
		return fmt.Errorf("read the pod's entry: %w", err)
	}
	missing, err := ns.MissingWayBack(network.Primary6.IsValid())
	if err != nil {
		return err
	}
	if err := ns.AddWayBack(missing & netns.WayBack(pod.WayBack)); err != nil {
		return err
	}
	if pod.Flags&connectPodFlagsPOD_ADDED_SOURCE6 != 0 {
		if _, err := addProxySource(ns, &network); err != nil {
			return err
		}
	}
	if _, err := d.collect(ns, pod, &Enrolment{}); err != nil {
		return err
	}
	entries, err := d.readNetwork(ns.Cookie(), pod.Flags)
	if err != nil {
		return err
	}
	return d.attachPod(ns, network, networkOf(network, entries.names), pod.Flags, true)
}

func (d *Datapath) removeStrayLinks(known map[uint64]connectPod) error {
	entries, err := os.ReadDir(filepath.Join(d.linksDir(), "pods"))
	if err != nil {
		return fmt.Errorf("list the pods' links: %w", err)
	}
	var errs error
	for _, e := range entries {
		cookie, err := strconv.ParseUint(e.Name(), 10, 64)
		if _, ok := known[cookie]; err == nil && !ok {
			errs = errors.Join(errs, d.detachPod(cookie, nil))
		}
	}
	return errs
}

// dropOrphans removes what belongs to no pod: rule sets that were never
// finished or that nobody uses, and entries of pods that are not enrolled.
func (d *Datapath) dropOrphans() error {
	used, pods := map[uint32]bool{}, map[uint64]bool{}
	err := eachPod(d.maps["pods"], func(cookie uint64, p connectPod) { used[p.RulesId], pods[cookie] = true, true })
	if err != nil {
		return err
	}
	return errors.Join(
		deleteWhere(d.maps["rule_sets"], func(id uint32) bool { return !used[id] }),
		deleteWhere(d.maps["proxy_ids"], func(k connectProxyIdKey) bool { return !used[k.RulesId] }),
		deleteWhere(d.maps["port_rules"], func(k connectPortRuleKey) bool { return !used[k.RulesId] }),
		deleteWhere(d.maps["cidr_rules4"], func(k connectCidr4Key) bool { return !used[k.RulesId] }),
		deleteWhere(d.maps["cidr_rules6"], func(k connectCidr6Key) bool { return !used[k.RulesId] }),
		deleteWhere(d.maps["pod_facts"], func(k connectPodFactKey) bool { return !pods[k.Cookie] }),
		deleteWhere(d.maps["pod_names"], func(cookie uint64) bool { return !pods[cookie] }),
		deleteWhere(d.maps["handshake_use"], func(cookie uint64) bool { return !pods[cookie] }),
		deleteWhere(d.maps["target_use"], func(cookie uint64) bool { return !pods[cookie] }),
		deleteWhere(d.maps["targets"], func(k connectTargetKey) bool { return !pods[k.Cookie] }),
		deleteWhere(d.maps["target_index"], func(k connectTargetIndexKey) bool { return !pods[k.Cookie] }),
		deleteWhere(d.maps["reroutes"], func(k connectRerouteKey) bool { return !pods[k.Cookie] }),
		deleteWhere(d.maps["forwarded"], func(k connectForwardedKey) bool { return !pods[k.Cookie] }),
		d.forgetNetwork(true, func(cookie uint64) bool { return !pods[cookie] }),
		deleteWhere(d.maps["stats"], func(k connectStatKey) bool { return !pods[k.Cookie] }),
	)
}
