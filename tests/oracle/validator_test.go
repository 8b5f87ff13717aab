package oracle

import (
	"errors"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// TestIstiosOwnValidator runs what every pod's init container istio-validation
// runs: it must pass in an enrolled pod, and nowhere else.
func TestIstiosOwnValidator(t *testing.T) {
	if *istio == "" {
		t.Skip("needs Istio's program: make oracle builds it")
	}
	const passed, failed = 0, 126
	for _, tt := range []struct {
		name   string
		change func(*datapath.Pod)
		v6     bool // the pod has no IPv4
		id     kit.ID
		want   int
	}{
		{"not enrolled", nil, false, kit.Proxy, failed},
		{"not enrolled, IPv6", nil, true, kit.Proxy, failed},
		{"enrolled", func(*datapath.Pod) {}, false, kit.Proxy, passed},
		{"enrolled, IPv6", func(*datapath.Pod) {}, true, kit.Proxy, passed},
		{"enrolled, as root", func(*datapath.Pod) {}, false, kit.Root, failed},
		{"inbound by TC", kit.ByTC, false, kit.Proxy, passed},
		{"proxy-ready", func(p *datapath.Pod) { p.Rules.From = rules.ProxyReady }, false, kit.Proxy, passed},
		{"DNS", func(p *datapath.Pod) { p.Rules.DNS = true }, false, kit.Proxy, passed},
		{"TPROXY", func(p *datapath.Pod) { p.Rules.Mode = rules.TProxy }, false, kit.Proxy, passed},
		{"no range", func(p *datapath.Pod) { p.Rules.IncludeOutboundCIDRs = rules.CIDRs{} }, false, kit.Proxy, passed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := &kit.Pod{NS: kit.NewNS(t, "pod"), Far: kit.NewNS(t, "far")}
			pair := []string{"10.99.0.2/24", "10.99.0.1/24"}
			if tt.v6 {
				pair = []string{"fd99::2/64", "fd99::1/64"}
			}
			p.Wire("eth0", netip.MustParsePrefix(pair[0]), netip.MustParsePrefix(pair[1]))
			if tt.v6 && tt.change == nil {
				p.AddAddr("lo", netip.MustParsePrefix("::6/128")) // as Istio does
			}
			if tt.change != nil {
				p.Enroll(kit.Datapath(t), tt.change)
			}
			out, err := validate(p.NS, tt.id)
			got := passed
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				got = exit.ExitCode()
			} else if err != nil {
				t.Fatal(err)
			}
			if got != tt.want || (got == passed) != strings.Contains(out, "Validation passed") {
				t.Errorf("exit status %d, want %d:\n%s", got, tt.want, out)
			}
		})
	}
}

func validate(ns *kit.NS, id kit.ID) (string, error) {
	cmd := exec.Command(*istio, "-p", "15001", "-z", "15006", "-u", "1337", "-g", "1337", "-m", "REDIRECT", "-i", "*", "-b", "*",
		"--run-validation", "--skip-rule-apply", "--probe-timeout", "3s")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(id.UID), Gid: uint32(id.GID)}}
	return inNS(ns, cmd)
}
