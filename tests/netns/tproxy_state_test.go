package netns

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// The settings that TPROXY mode changes, below /proc/sys/net.
var tproxySettings = []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"}

// waysOf is everything in the pod that TPROXY mode adds to: every routing rule,
// the routes of every table, and the settings.
func waysOf(t *testing.T, p *kit.Pod) string {
	t.Helper()
	var out strings.Builder
	p.Netlink(func(h *netlink.Handle) error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := h.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				fmt.Fprintf(&out, "%d %s mark %d\n", family, r, r.Mark)
			}
			routes, err := h.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				if r.Table == 133 {
					fmt.Fprintf(&out, "%d %s\n", family, r)
				}
			}
		}
		return nil
	})
	for _, name := range tproxySettings {
		fmt.Fprintf(&out, "%s = %s\n", name, setting(t, p, name))
	}
	return out.String()
}

func setting(t *testing.T, p *kit.Pod, name string) string {
	t.Helper()
	var value string
	if err := p.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/" + name)
		value = strings.TrimSpace(string(text))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return value
}
