package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// RulesID names a rule set, everywhere in the same form.
type RulesID uint32

func (id RulesID) String() string { return fmt.Sprintf("%08x", uint32(id)) }

// MarshalText makes it a string in JSON and YAML.
func (id RulesID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// PodInfo is an enrolled pod, as the maps hold it.
type PodInfo struct {
	Cookie    uint64     `json:"cookie"`
	Namespace string     `json:"namespace"`
	Name      string     `json:"name"`
	UID       string     `json:"uid"`
	Addr4     netip.Addr `json:"ipv4"`
	Addr6     netip.Addr `json:"ipv6"`
	RulesID   RulesID    `json:"rulesID"`
	OutPort   uint16     `json:"outboundPort"`
	InPort    uint16     `json:"inboundPort"`
	Inbound   Inbound    `json:"inbound"`
	Mode      rules.Mode `json:"mode"`
	Capture   Capture    `json:"capture"`
	TC        TCAttach   `json:"tc"`
	Programs  []string   `json:"programs"`
	OwnAddrs  []string   `json:"ownAddresses"`
	Listeners int        `json:"listeners"`

	// The interfaces that the pod's rules name, there or not.
	Excluded []string `json:"excludedInterfaces"`
	Rerouted []string `json:"reroutedInterfaces"`
}

// RuleInfo is one entry of a rule set.
type RuleInfo struct {
	RulesID RulesID `json:"rulesID"`
	Pods    int     `json:"pods"`
	Kind    string  `json:"kind"`
	Match   string  `json:"match"`
	Verdict string  `json:"verdict"`
}

// StatInfo is a count of connections, or of what else its reason is about.
type StatInfo struct {
	Cookie uint64 `json:"cookie"`
	Pod    string `json:"pod"` // NAMESPACE/NAME, or empty
	Reason string `json:"reason"`
	Count  uint64 `json:"count"`
	Unit   string `json:"unit"` // such as "connections"
}

// Pods lists the enrolled pods by namespace, name and cookie.
func (d *Datapath) Pods() ([]PodInfo, error) {
	out := []PodInfo{}
	var errs error
	err := eachPod(d.maps["pods"], func(cookie uint64, p connectPod) {
		info := PodInfo{
			Cookie: cookie, Addr4: fromAddr(p.Addr4.B), Addr6: fromAddr(p.Addr6.B),
			RulesID: RulesID(p.RulesId), OutPort: p.OutPort, InPort: p.InPort, Inbound: InboundSKLookup, Mode: rules.Redirect,
			TC: p.tcAttach(), Programs: append([]string{progInbound}, tcProgramNames(p.Flags)...), OwnAddrs: []string{},
			Excluded: []string{}, Rerouted: []string{},
		}
		if p.Flags&connectPodFlagsPOD_INBOUND_TC != 0 {
			info.Inbound = InboundTC
		}
		if p.Flags&connectPodFlagsPOD_REROUTES != 0 {
			info.Programs = append(info.Programs, progRerouteIn, progRerouteOut)
		}
		if p.Flags&connectPodFlagsPOD_TPROXY != 0 {
			info.Mode = rules.TProxy
		}
		var err error
		info.Capture, err = d.captureOf(cookie, p.Flags)
		errs = errors.Join(errs, err)
		var name connectPodName
		if d.maps["pod_names"].Lookup(cookie, &name) == nil {
			info.Namespace, info.Name, info.UID = text(name.Namespace[:]), text(name.Name[:]), text(name.Uid[:])
		}
		out = append(out, info)
	})
	if err != nil {
		return nil, err
	}
	byCookie := map[uint64]*PodInfo{}
	for i := range out {
		byCookie[out[i].Cookie] = &out[i]
	}
	err1 := each(d.maps["own_addrs"], func(k connectOwnAddrKey, kind connectOwnKind) {
		if p := byCookie[k.Cookie]; p != nil && kind == connectOwnKindOWN_ADDR {
			p.OwnAddrs = append(p.OwnAddrs, fromAddr(k.Addr.B).String())
		}
	})
	err2 := each(d.maps["interface_names"], func(k connectInterfaceName, kind connectInterfaceKind) {
		switch p := byCookie[k.Cookie]; {
		case p == nil:
		case kind == connectInterfaceKindINTERFACE_EXCLUDED:
			p.Excluded = append(p.Excluded, text(k.Name[:]))
		case kind == connectInterfaceKindINTERFACE_REROUTED:
			p.Rerouted = append(p.Rerouted, text(k.Name[:]))
		}
	})
	listeners, err3 := keysOf(d.maps["listeners"], func(connectListenerKey) bool { return true })
	for _, l := range listeners {
		if p := byCookie[l.Cookie]; p != nil {
			p.Listeners++
		}
	}
	for i := range out {
		slices.Sort(out[i].OwnAddrs)
		slices.Sort(out[i].Excluded)
		slices.Sort(out[i].Rerouted)
	}
	slices.SortFunc(out, func(a, b PodInfo) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Cookie, b.Cookie))
	})
	return out, errors.Join(errs, err1, err2, err3)
}

// Rules lists the entries of every rule set.
func (d *Datapath) Rules() ([]RuleInfo, error) {
	users := map[uint32]int{}
	if err := eachPod(d.maps["pods"], func(_ uint64, p connectPod) { users[p.RulesId]++ }); err != nil {
		return nil, err
	}
	out := []RuleInfo{}
	add := func(id uint32, kind, match, verdict string) {
		out = append(out, RuleInfo{RulesID: RulesID(id), Pods: users[id], Kind: kind, Match: match, Verdict: verdict})
	}
	err := errors.Join(
		each(d.maps["proxy_ids"], func(k connectProxyIdKey, v uint32) {
			kind, verdict := describeID(k.Kind, v)
			add(k.RulesId, kind, strconv.FormatUint(uint64(k.Id), 10), verdict)
		}),
		each(d.maps["port_rules"], func(k connectPortRuleKey, v uint32) {
			kind := map[connectDirection]string{connectDirectionDIR_OUT: "outbound-port", connectDirectionDIR_IN: "inbound-port"}[k.Direction]
			add(k.RulesId, kind, strconv.Itoa(int(k.Port)), verdictName(v))
		}),
		each(d.maps["cidr_rules4"], func(k connectCidr4Key, v uint32) {
			add(k.RulesId, "outbound-cidr", netip.PrefixFrom(netip.AddrFrom4(k.Addr), int(k.Prefixlen)-32).String(), verdictName(v))
		}),
		each(d.maps["cidr_rules6"], func(k connectCidr6Key, v uint32) {
			add(k.RulesId, "outbound-cidr", netip.PrefixFrom(netip.AddrFrom16(k.Addr), int(k.Prefixlen)-32).String(), verdictName(v))
		}),
		eachPod(d.maps["pods"], func(_ uint64, p connectPod) {
			addDefault := func(kind string, flag connectPodFlags) {
				verdict := "direct"
				if p.Flags&flag != 0 {
					verdict = "capture"
				}
				add(p.RulesId, kind, "*", verdict)
			}
			addDefault("outbound-cidr", connectPodFlagsPOD_OUT_DEFAULT_CAPTURE)
			addDefault("inbound-port", connectPodFlagsPOD_IN_DEFAULT_CAPTURE)
			if p.Flags&connectPodFlagsPOD_OWNERS_DIRECT != 0 {
				add(p.RulesId, "owner-group", "*", "direct")
			}
			if p.Flags&connectPodFlagsPOD_DNS != 0 {
				add(p.RulesId, "outbound-dns", "53", "capture")
			}
		}),
	)
	slices.SortFunc(out, func(a, b RuleInfo) int {
		return cmp.Or(cmp.Compare(a.RulesID, b.RulesID), cmp.Compare(a.Kind, b.Kind), cmp.Compare(len(a.Match), len(b.Match)), cmp.Compare(a.Match, b.Match))
	})
	return slices.Compact(out), err
}

func describeID(kind connectIdKind, value uint32) (name, verdict string) {
	if kind == connectIdKindID_OWNER {
		return "owner-group", verdictName(value)
	}
	name = map[connectIdKind]string{connectIdKindID_UID: "proxy-uid", connectIdKindID_GID: "proxy-gid"}[kind]
	switch flags := rules.Exemption(value); {
	case flags&rules.Self != 0:
		return name, "exempt, self-calls captured"
	case flags&rules.SelfDNS != 0:
		return name, "exempt, self-calls to port 53 captured"
	}
	return name, "exempt"
}

func verdictName(v uint32) string {
	if connectRuleVerdict(v)&connectRuleVerdictRULE_VERDICT == connectRuleVerdictRULE_CAPTURE {
		return "capture"
	}
	return "direct"
}

// Stats lists the counters that are not zero.
func (d *Datapath) Stats() ([]StatInfo, error) {
	pods, err := d.Pods()
	if err != nil {
		return nil, err
	}
	names := map[uint64]string{}
	for _, p := range pods {
		if p.Name != "" {
			names[p.Cookie] = p.Namespace + "/" + p.Name
		}
	}
	out := []StatInfo{}
	err = each(d.maps["stats"], func(k connectStatKey, perCPU []uint64) {
		sum := uint64(0)
		for _, n := range perCPU {
			sum += n
		}
		out = append(out, StatInfo{Cookie: k.Cookie, Pod: names[k.Cookie], Reason: ReasonName(k.Reason), Count: sum, Unit: UnitOf(k.Reason)})
	})
	slices.SortFunc(out, func(a, b StatInfo) int {
		return cmp.Or(cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Cookie, b.Cookie), cmp.Compare(a.Reason, b.Reason))
	})
	return out, err
}

// Handshakes is how many connections are between their SYN and their accept.
func (d *Datapath) Handshakes() (int, error) {
	keys, err := keysOf(d.maps["handshakes"], func(connectHandshakeKey) bool { return true })
	return len(keys), err
}

// HandshakeUse is how many of them are counted against one pod.
func (d *Datapath) HandshakeUse(cookie uint64) (int, error) {
	var n uint32
	if err := d.maps["handshake_use"].Lookup(cookie, &n); err != nil {
		return 0, fmt.Errorf("read handshake_use: %w", err)
	}
	return int(n), nil
}

func each[K, V any](m *ebpf.Map, visit func(K, V)) error {
	return eachOf(m, func(K) bool { return true }, visit)
}

func eachOf[K, V any](m *ebpf.Map, chosen func(K) bool, visit func(K, V)) error {
	keys, err := keysOf(m, chosen)
	if err != nil {
		return err
	}
	for _, k := range keys {
		var v V
		if err := m.Lookup(k, &v); err == nil {
			visit(k, v)
		}
	}
	return nil
}
