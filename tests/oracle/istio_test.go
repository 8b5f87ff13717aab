package oracle

import (
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// TestOurRulesAreThoseThatIstiosOwnProgramWrites asks Istio's istio-iptables (the
// module tests/istio) for the rules of the table's configurations and of random
// ones, and compares them with those that the oracle goes by.
func TestOurRulesAreThoseThatIstiosOwnProgramWrites(t *testing.T) {
	if *istio == "" {
		t.Skip("needs Istio's program: make oracle builds it")
	}
	var configs []config
	for _, row := range table {
		configs = append(configs, row.config)
	}
	for i := range 40 {
		configs = append(configs, draw(*firstSeed+uint64(i)))
	}
	for _, c := range configs {
		r, err := c.Rules.Normalise()
		if err != nil {
			t.Fatal(err)
		}
		if r.Mode != rules.Redirect || r.DNSPort != rules.DefaultDNSPort || len(r.ProxyUIDs) == 0 || len(r.ProxyGIDs) == 0 {
			continue // Istio's program fills in 1337, and has no flag for the DNS port
		}
		ours, theirs := kit.NewNS(t, "ours"), kit.NewNS(t, "theirs")
		for _, ns := range []*kit.NS{ours, theirs} {
			pod := &kit.Pod{NS: ns, Far: kit.NewNS(t, "far")}
			pod.Wire("eth0", netip.MustParsePrefix("10.99.0.2/24"), netip.MustParsePrefix("10.99.0.1/24"), netip.MustParsePrefix("fd99::2/64"), netip.MustParsePrefix("fd99::1/64"))
		}
		if err := restore(ours, "nft", r, ""); err != nil {
			t.Fatal(err)
		}
		if err := istioWrites(theirs, r); err != nil {
			t.Fatalf("configuration %s: %v", c, err)
		}
		for _, save := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
			want, got := natRules(t, theirs, save), natRules(t, ours, save)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("configuration %s: %s (- Istio's, + ours):\n%s", c, save, diff)
			}
		}
	}
}

// istioWrites runs Istio's program as its CNI plugin would.
func istioWrites(ns *kit.NS, r rules.Rules) error {
	include := "*"
	if !r.IncludeOutboundCIDRs.All {
		include = join(r.IncludeOutboundCIDRs.List)
	}
	inbound := "*"
	if !r.IncludeInboundPorts.All {
		inbound = join(r.IncludeInboundPorts.List)
	}
	cmd := exec.Command(*istio,
		"-p", fmt.Sprint(r.OutboundPort), "-z", fmt.Sprint(r.InboundPort),
		"-u", join(r.ProxyUIDs), "-g", join(r.ProxyGIDs), "-m", string(r.Mode),
		"-b", inbound, "-d", join(r.ExcludeInboundPorts), "-i", include, "-x", join(r.ExcludeOutboundCIDRs),
		"-q", join(r.IncludeOutboundPorts), "-o", join(r.ExcludeOutboundPorts),
		"-c", join(r.ExcludeInterfaces), "-k", join(r.RerouteInterfaces), "--dual-stack",
		fmt.Sprintf("--redirect-dns=%v", r.DNS), fmt.Sprintf("--capture-all-dns=%v", r.DNS))
	groups := "*"
	if !r.OwnerGroups.All {
		groups = join(r.OwnerGroups.List)
	}
	cmd.Env = append(cmd.Environ(), "ISTIO_OUTBOUND_OWNER_GROUPS="+groups, "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE="+join(r.ExcludeOwnerGroups),
		"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR="+r.Loopback.String())
	out, err := inNS(ns, cmd)
	if err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, out)
	}
	return nil
}

func join[T any](list []T) string {
	var out []string
	for _, v := range list {
		out = append(out, fmt.Sprint(v))
	}
	return strings.Join(out, ",")
}

// natRules are the rules of the nat table, by chain, as the kernel holds them.
func natRules(t *testing.T, ns *kit.NS, save string) map[string][]string {
	t.Helper()
	out, err := inNS(ns, exec.Command(save, "-t", "nat"))
	if err != nil {
		t.Fatalf("%s: %v: %s", save, err, out)
	}
	chains := map[string][]string{}
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) > 2 && fields[0] == "-A" {
			chains[fields[1]] = append(chains[fields[1]], strings.Join(fields[2:], " "))
		}
	}
	// Istio puts those for rerouted interfaces in front one by one. Among those with
	// one target the order says nothing.
	for run := chains["PREROUTING"]; len(run) > 0; {
		n := 1
		for n < len(run) && target(run[n]) == target(run[0]) {
			n++
		}
		slices.Sort(run[:n])
		run = run[n:]
	}
	return chains
}

// target is what a rule does.
func target(rule string) string {
	_, out, _ := strings.Cut(rule, "-j ")
	return out
}

// inNS runs a command in a namespace.
func inNS(ns *kit.NS, cmd *exec.Cmd) (string, error) {
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := ns.Do(cmd.Start); err != nil { // a child is in the namespace of its parent's thread
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}
