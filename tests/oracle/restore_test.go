package oracle

import (
	"fmt"
	"os/exec"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/iptables"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// restore loads rules into the namespace, in place of those that are there.
// Backend is "legacy" or "nft".
func restore(ns *kit.NS, backend string, r rules.Rules, omit string) error {
	for _, v6 := range []bool{false, true} {
		name := "iptables-" + backend + "-restore"
		if v6 {
			name = "ip6tables-" + backend + "-restore"
		}
		cmd := exec.Command(name)
		text := iptables.Istio(r, v6, omit)
		cmd.Stdin = strings.NewReader(text)
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := ns.Do(cmd.Start); err != nil { // a child is in the namespace of its parent's thread
			return fmt.Errorf("run %s (Debian, Ubuntu: apt-get install iptables): %w", name, err)
		}
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%s: %w: %s\n%s", name, err, out.String(), text)
		}
	}
	return nil
}
