package datapath

import (
	"errors"
	"fmt"
	"slices"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// CheckNamespace says what is missing of a living namespace's redirection: all
// that CheckPod looks at, the TC programs on its interfaces, and the node's own.
func (d *Datapath) CheckNamespace(ns *netns.NetNS) error {
	if err := d.CheckPod(ns.Cookie()); err != nil {
		return err
	}
	var pod connectPod
	if err := d.maps["pods"].Lookup(ns.Cookie(), &pod); err != nil {
		return fmt.Errorf("read pods: %w", err)
	}
	network, err := ns.Inspect()
	if err != nil {
		return err
	}
	entries, err := d.readNetwork(ns.Cookie(), pod.Flags)
	if err != nil {
		return err
	}
	entries = networkOf(network, entries.names)
	var errs error
	for _, name := range tcProgramNames(pod.Flags) {
		for _, l := range network.Links {
			if d.wantsTC(l, name, entries) && !d.hasTC(ns, l, name, pod.Flags) {
				errs = errors.Join(errs, fmt.Errorf("the program %s is not attached to its interface %s", name, l.Name))
			}
		}
	}
	attached := d.Attached()
	for _, hook := range nodeHooks {
		if attached[hook.name] == 0 && (!isUDP(hook.name) || d.Features().UDP) {
			errs = errors.Join(errs, fmt.Errorf("the node's program %s is not attached", hook.name))
		}
	}
	return errs
}

// wantsTC says whether a TC program belongs on an interface.
func (d *Datapath) wantsTC(l netns.Link, name string, entries podNetwork) bool {
	return !l.Lo && !entries.excludes(l.Index) && (name != progTCInbound || !entries.reroutes(l.Index))
}

// CheckRules says whether a namespace is enrolled with rules other than these,
// whose IDs are those that the pod sees.
func (d *Datapath) CheckRules(ns *netns.NetNS, r rules.Rules) error {
	normal, err := r.Normalise()
	if err != nil {
		return err
	}
	ids, err := ns.IDs()
	if err != nil {
		return err
	}
	if normal, err = normal.Translate(ids.UID, ids.GID); err != nil {
		return err
	}
	var set connectRuleSet
	id := d.rulesIDOf(ns.Cookie())
	if err := d.maps["rule_sets"].Lookup(id, &set); err != nil {
		return fmt.Errorf("rule set %08x is not there: %w", id, err)
	}
	if set.Sha256 != normal.Digest() {
		return fmt.Errorf("rule set %08x is not what the pod asks for", id)
	}
	return d.checkCompiled(id, normal.Compile())
}

// checkCompiled looks for every entry that a rule set should have.
func (d *Datapath) checkCompiled(id uint32, c rules.Compiled) error {
	ids, err := keysOf(d.maps["proxy_ids"], func(k connectProxyIdKey) bool { return k.RulesId == id })
	if err != nil {
		return err
	}
	ports, err := keysOf(d.maps["port_rules"], func(k connectPortRuleKey) bool { return k.RulesId == id })
	if err != nil {
		return err
	}
	has := func(kind connectIdKind, who uint32) bool {
		return slices.Contains(ids, connectProxyIdKey{RulesId: id, Kind: kind, Id: who})
	}
	for who := range c.UIDs {
		if !has(connectIdKindID_UID, who) {
			return fmt.Errorf("rule set %08x lacks the proxy's UID %d", id, who)
		}
	}
	for who := range c.GIDs {
		if !has(connectIdKindID_GID, who) {
			return fmt.Errorf("rule set %08x lacks the proxy's GID %d", id, who)
		}
	}
	if want := len(c.OutPorts) + len(c.InPorts); len(ports) != want {
		return fmt.Errorf("rule set %08x has %d rules of ports, and should have %d", id, len(ports), want)
	}
	for prefix := range c.CIDRs {
		table, key := cidrKey(id, prefix)
		var verdict uint32
		if err := d.maps[table].Lookup(key, &verdict); err != nil {
			return fmt.Errorf("rule set %08x lacks %s: %w", id, prefix, err)
		}
	}
	return nil
}
