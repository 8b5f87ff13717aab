package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// The fields of the log.
const (
	fieldPod    = "pod"
	fieldUID    = "uid"
	fieldCookie = "cookie"
)

// repairPods makes the pods' stubs what the map says: it completes an enrolment
// that was cut off, un-enrols namespaces of which the kernel says that they have
// ended, and removes links without a pod. What lives, or may live, stays.
func (d *Datapath) repairPods() error {
	_, err := d.sweepPods()
	return err
}

// sweepPods is repairPods that says what it found.
func (d *Datapath) sweepPods() (out Swept, err error) {
	known := map[uint64]connectPod{}
	if err := eachPod(d.maps["pods"], func(cookie uint64, p connectPod) { known[cookie] = p }); err != nil {
		return out, err
	}
	paths := sync.OnceValue(netns.ByCookie) // a look at every process of the machine
	var errs error
	for cookie := range known {
		out.Left = append(out.Left, cookie)
		now, err := d.lifeOf(cookie)
		if err != nil || now == lifeComplete {
			errs = errors.Join(errs, err)
			continue
		}
		if path, found := paths()[cookie]; found {
			if err := d.complete(path); err != nil {
				errs = errors.Join(errs, fmt.Errorf("complete the enrolment of %s: %w", path, err))
			}
			continue
		}
		pod := d.named(cookie)
		log := d.opts.Log.WithFields(logrus.Fields{fieldPod: pod.Namespace + "/" + pod.Name, fieldUID: pod.UID, fieldCookie: cookie})
		if now == lifeOver {
			log.Info("a network namespace is gone; its pod is un-enrolled")
			failpoint.Step("sweep: a namespace is gone")
			errs = errors.Join(errs, d.unenroll(cookie, nil), d.forget(cookie))
			out.Gone, out.Left = append(out.Gone, pod), out.Left[:len(out.Left)-1]
			continue
		}
		log.Warn("a pod's enrolment is not complete, and no process or name leads to its network namespace; it stays as it is, and \"sluicectl unenroll --cookie\" ends it")
	}
	return out, errors.Join(errs, d.removeStrayLinks(known), d.dropOrphans())
}

// named is an enrolled pod by its cookie and names alone.
func (d *Datapath) named(cookie uint64) PodInfo {
	out := PodInfo{Cookie: cookie}
	var name connectPodName
	if d.maps["pod_names"].Lookup(cookie, &name) == nil {
		out.Namespace, out.Name, out.UID = text(name.Namespace[:]), text(name.Name[:]), text(name.Uid[:])
	}
	return out
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
	now, err := d.lifeOf(cookie)
	if err == nil && now != lifeComplete {
		err = fmt.Errorf("the sk_lookup program of namespace %d is not attached", cookie)
	}
	return err
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
	missing, err := ns.MissingWayBack(network.Primary6.IsValid(), netns.WayBack(pod.WayBack))
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
			errs = errors.Join(errs, d.detachPod(cookie, nil), d.endLife(cookie))
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
		deleteWhere(d.maps["listeners"], func(k connectListenerKey) bool { return !pods[k.Cookie] }),
		deleteWhere(d.maps["reroutes"], func(k connectRerouteKey) bool { return !pods[k.Cookie] }),
		deleteWhere(d.maps["forwarded"], func(k connectForwardedKey) bool { return !pods[k.Cookie] }),
		d.forgetNetwork(true, func(cookie uint64) bool { return !pods[cookie] }),
		deleteWhere(d.maps["stats"], func(k connectStatKey) bool { return !pods[k.Cookie] }),
	)
}
