package oracle

import (
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// ruleTable is, for each rule, a configuration in which it shows, and how
// Sluice's sources lose it.
var ruleTable = []struct {
	rule   string
	config config
	edit   edit
}{
	{"O0", with(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"net1"} }), statement("bpf/rules.h")},
	{"O1", with(func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{80} }), statement("bpf/rules.h")},
	{"O2", defaults(), statement("bpf/rules.h")},
	{"O3", defaults(), text("pkg/rules/compile.go", "c.UIDs[uid] = exemption()", "c.UIDs[uid] = exemption() &^ Self")},
	{"O4", with(func(r *rules.Rules) { r.ProxyGIDs = nil }), statement("bpf/rules.h")},
	{"O5", with(func(r *rules.Rules) { r.ProxyGIDs = nil }), statement("bpf/rules.h")},
	{"O6", with(func(r *rules.Rules) { r.ProxyUIDs = nil }), text("pkg/rules/compile.go", "c.GIDs[gid] = exemption()", "c.GIDs[gid] = exemption() &^ Self")},
	{"O7", with(func(r *rules.Rules) { r.ProxyUIDs = nil }), statement("bpf/rules.h")},
	{"O8", with(func(r *rules.Rules) { r.ProxyUIDs = nil }), statement("bpf/rules.h")},
	{"O9", with(func(r *rules.Rules) { r.ExcludeOwnerGroups = ids(2000) }), statement("bpf/rules.h")},
	{"O10", with(func(r *rules.Rules) { r.DNS = true }), statement("bpf/rules.h")},
	{"O11", with(func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("127.0.0.0/8")} }), statement("bpf/rules.h")},
	{"O12", with(func(r *rules.Rules) { r.ExcludeOutboundCIDRs = prefixes("10.96.0.0/16", "fd99::/64") }), statement("bpf/rules.h")},
	{"O13", with(func(r *rules.Rules) {
		r.IncludeOutboundCIDRs = rules.CIDRs{}
		r.IncludeOutboundPorts = []uint16{80}
	}), text("bpf/rules.h", "by_port != RULE_CAPTURE && ", "")},
	{"O14", defaults(), text("bpf/rules.h", "!(pod->flags & POD_OUT_DEFAULT_CAPTURE))\n\t\treturn DIRECT_CIDR;", "1)\n\t\treturn DIRECT_CIDR;")},
	{"I0", with(func(r *rules.Rules) { r.ExcludeInterfaces = []string{"net1"} }), statement("bpf/inbound.c")},
	{"I1", defaults(), statement("bpf/rules.h")},
	{"I2", defaults(), text("bpf/rules.h", "return verdict != RULE_DIRECT; /* I2, I3 */", "return true;")},
	{"I3", defaults(), text("bpf/rules.h", "return verdict != RULE_DIRECT; /* I2, I3 */", "return false;")},
	{"T1", byTProxy(func(*rules.Rules) {}), statement("bpf/rules.h")},
	{"T2", byTProxy(func(*rules.Rules) {}), text("pkg/netns/wayback.go", `{WayBackAcceptMark, "/proc/sys/net/ipv4/tcp_fwmark_accept"},`, "")},
	{"T3", byTProxy(func(*rules.Rules) {}), text("bpf/rules.h", "return pod->flags & POD_TPROXY && proxy && captured_in(pod, c->port);", "return false;")},
	{"T4", byTProxy(func(*rules.Rules) {}), text("bpf/inbound.c", "	if (over_loopback(ctx, pod, this->cookie, &remote))\n", "	if (over_loopback(ctx, pod, this->cookie, &remote) && 0)\n")},
	{"T2 beside iptables", byTProxy(func(*rules.Rules) {}), text("bpf/sockops.c", "int mark = SLUICE_LISTENER_MARK;", "int mark = 0;")},
	{"P0", reroutes(func(*rules.Rules) {}),
		text("bpf/rules.h", "return pod->flags & POD_OUT_DEFAULT_CAPTURE || cidr_value(pod, dst) & RULE_REROUTE;", "return false;")},
	{"P0 RETURN", reroutes(func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} }),
		text("bpf/inbound.c", "return have_ingress_ifindex && pod->flags & POD_REROUTES &&", "return 0 &&")},
}

// TestOracleNoticesAMissingRule takes each rule away, from iptables and (with
// -oracle.mutate) from Sluice's sources, and wants to be told.
func TestOracleNoticesAMissingRule(t *testing.T) {
	l := newLab(t)
	for _, row := range ruleTable {
		if strings.HasSuffix(row.rule, " beside iptables") {
			continue // Sluice's alone: what it does for itself is not to disturb theirs
		}
		t.Run(row.rule+" from iptables", func(t *testing.T) {
			for _, backend := range []redirection{legacy, nft} {
				q := request{config: row.config, iptables: []redirection{backend}}
				if whole := l.mustCompare(t, q); len(whole.differences) > 0 {
					t.Fatal("with every rule:", whole)
				}
				q.omit = row.rule
				if without := l.mustCompare(t, q); len(without.differences) == 0 {
					t.Errorf("%s without %s: nothing differs", backend, row.rule)
				}
			}
		})
	}
	t.Run("from Sluice", func(t *testing.T) {
		if !*mutate {
			t.Skip("rebuilds Sluice for each rule, minutes: make oracle-mutants")
		}
		mutants(t)
	})
}

func (l *lab) mustCompare(t *testing.T, q request) report {
	t.Helper()
	r, err := l.compare(q)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestOneRule compares the configuration in which a rule shows: what mutants
// run.
func TestOneRule(t *testing.T) {
	if *forRule == "" {
		t.Skip("say which: -oracle.rule=O5")
	}
	for _, row := range ruleTable {
		if row.rule == *forRule {
			if r := newLab(t).mustCompare(t, request{config: row.config, iptables: []redirection{legacy}}); len(r.differences) > 0 {
				t.Error(r)
			}
			return
		}
	}
	t.Fatalf("there is no rule %s", *forRule)
}
