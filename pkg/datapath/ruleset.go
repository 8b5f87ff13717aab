package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// ErrTableFull is returned when a map has no room.
var ErrTableFull = errors.New("the table is full")

func isFull(err error) bool { return errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) }

// writeRules finds the rule set with these rules, or writes it, and returns
// what a pod that uses it looks like. An id is in use once its digest is in
// rule_sets, which comes last; what a crash before that leaves, Up removes.
func (d *Datapath) writeRules(r rules.Rules) (connectPod, error) {
	compiled := r.Compile()
	value := connectPod{OutPort: r.OutboundPort, InPort: r.InboundPort, DnsPort: r.DNSPort}
	value.LoopbackNet, value.LoopbackMask = maskOf(r.Loopback)
	for prefix := range compiled.CIDRs {
		if prefix.Addr().Is4() {
			value.Flags |= connectPodFlagsPOD_OUT_HAS_CIDRS4
		} else {
			value.Flags |= connectPodFlagsPOD_OUT_HAS_CIDRS6
		}
	}
	if len(compiled.OutPorts) > 0 {
		value.Flags |= connectPodFlagsPOD_OUT_HAS_PORTS
	}
	if compiled.OutDefaultCapture {
		value.Flags |= connectPodFlagsPOD_OUT_DEFAULT_CAPTURE
	}
	if compiled.InDefaultCapture {
		value.Flags |= connectPodFlagsPOD_IN_DEFAULT_CAPTURE
	}
	if compiled.LocalCapturable {
		value.Flags |= connectPodFlagsPOD_LOCAL_CAPTURABLE
	}
	if len(compiled.Owners) > 0 {
		value.Flags |= connectPodFlagsPOD_HAS_OWNERS
	}
	if compiled.OwnersDefault == rules.Direct {
		value.Flags |= connectPodFlagsPOD_OWNERS_DIRECT
	}
	if r.DNS {
		value.Flags |= connectPodFlagsPOD_DNS
	}
	if len(r.RerouteInterfaces) > 0 {
		value.Flags |= connectPodFlagsPOD_REROUTES
	}
	if r.From == rules.ProxyReady {
		value.Flags |= connectPodFlagsPOD_WHEN_READY
	}
	id, shared, err := d.ruleSet(r.Digest())
	if err != nil {
		return connectPod{}, err
	}
	value.RulesId = id
	if shared {
		return value, nil
	}
	if err := d.writeCompiled(id, compiled); err != nil {
		return connectPod{}, errors.Join(err, d.clearRules(id))
	}
	failpoint.Step("enroll: compiled rules written")
	if err := d.maps["rule_sets"].Put(id, connectRuleSet{Sha256: r.Digest()}); err != nil {
		return connectPod{}, errors.Join(tableError("rule_sets", err), d.clearRules(id))
	}
	failpoint.Step("enroll: rule set named")
	return value, nil
}

// ruleSet returns the id under which rules of this digest are, or are to be,
// written: the digest's own first bytes, or the next free number.
func (d *Datapath) ruleSet(digest [32]byte) (id uint32, shared bool, err error) {
	id = binary.LittleEndian.Uint32(digest[:4])
	for {
		if id == 0 {
			id++ // no pod has rule set 0
		}
		var there connectRuleSet
		err := d.maps["rule_sets"].Lookup(id, &there)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return id, false, nil
		}
		if err != nil {
			return 0, false, fmt.Errorf("read rule_sets: %w", err)
		}
		if there.Sha256 == digest {
			return id, true, nil
		}
		id++
	}
}

func (d *Datapath) writeCompiled(id uint32, c rules.Compiled) error {
	if err := errors.Join(
		writeIDs(d, id, connectIdKindID_UID, c.UIDs),
		writeIDs(d, id, connectIdKindID_GID, c.GIDs),
		writeIDs(d, id, connectIdKindID_OWNER, c.Owners),
	); err != nil {
		return err
	}
	failpoint.Step("enroll: identities written")
	if err := d.writePorts(id, connectDirectionDIR_OUT, c.OutPorts); err != nil {
		return err
	}
	if err := d.writePorts(id, connectDirectionDIR_IN, c.InPorts); err != nil {
		return err
	}
	for prefix, verdict := range c.CIDRs {
		table, key := cidrKey(id, prefix)
		value := uint32(verdict)
		if c.Rerouted[prefix] {
			value |= uint32(connectRuleVerdictRULE_REROUTE)
		}
		if err := d.maps[table].Put(key, value); err != nil {
			return tableError(table, err)
		}
	}
	return nil
}

func writeIDs[V ~uint32](d *Datapath, id uint32, kind connectIdKind, ids map[uint32]V) error {
	for who, value := range ids {
		key := connectProxyIdKey{RulesId: id, Kind: kind, Id: who}
		if err := d.maps["proxy_ids"].Put(key, uint32(value)); err != nil {
			return tableError("proxy_ids", err)
		}
	}
	return nil
}

func (d *Datapath) writePorts(id uint32, direction connectDirection, ports map[uint16]rules.Verdict) error {
	for port, verdict := range ports {
		key := connectPortRuleKey{RulesId: id, Direction: direction, Protocol: unix.IPPROTO_TCP, Port: port}
		if err := d.maps["port_rules"].Put(key, uint32(verdict)); err != nil {
			return tableError("port_rules", err)
		}
	}
	return nil
}

// maskOf is an IPv4 prefix as two words in network order.
func maskOf(p netip.Prefix) (network, mask uint32) {
	address := p.Masked().Addr().As4()
	return binary.NativeEndian.Uint32(address[:]), binary.NativeEndian.Uint32(net.CIDRMask(p.Bits(), 32))
}

func cidrKey(id uint32, p netip.Prefix) (table string, key any) {
	const idBits = 32
	if p.Addr().Is4() {
		return "cidr_rules4", connectCidr4Key{Prefixlen: uint32(idBits + p.Bits()), RulesId: id, Addr: p.Addr().As4()}
	}
	return "cidr_rules6", connectCidr6Key{Prefixlen: uint32(idBits + p.Bits()), RulesId: id, Addr: p.Addr().As16()}
}

// dropRules removes a rule set that no pod uses any more.
func (d *Datapath) dropRules(id uint32) error {
	used := false
	err := eachPod(d.maps["pods"], func(_ uint64, p connectPod) { used = used || p.RulesId == id })
	if err != nil || used {
		return err
	}
	if err := d.maps["rule_sets"].Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove the rule set: %w", err)
	}
	failpoint.Step("drop: rule set unnamed")
	return d.clearRules(id)
}

func (d *Datapath) clearRules(id uint32) error {
	return errors.Join(
		deleteWhere(d.maps["proxy_ids"], func(k connectProxyIdKey) bool { return k.RulesId == id }),
		deleteWhere(d.maps["port_rules"], func(k connectPortRuleKey) bool { return k.RulesId == id }),
		deleteWhere(d.maps["cidr_rules4"], func(k connectCidr4Key) bool { return k.RulesId == id }),
		deleteWhere(d.maps["cidr_rules6"], func(k connectCidr6Key) bool { return k.RulesId == id }),
	)
}

func (d *Datapath) rulesIDOf(cookie uint64) uint32 {
	var p connectPod
	if d.maps["pods"].Lookup(cookie, &p) != nil {
		return 0
	}
	return p.RulesId
}

func eachPod(pods *ebpf.Map, visit func(cookie uint64, p connectPod)) error {
	cookies, err := keysOf(pods, func(uint64) bool { return true })
	if err != nil {
		return err
	}
	for _, cookie := range cookies {
		var p connectPod
		if err := pods.Lookup(cookie, &p); err == nil {
			visit(cookie, p)
		}
	}
	return nil
}
