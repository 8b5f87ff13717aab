package agent

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

func TestWhereTheKernelClosesNoConnectionsTheyStayAndTheEventSaysWhy(t *testing.T) {
	var all []netns.Connection
	for _, remote := range []string{"[fd99::1]:80", "10.99.0.1:80"} {
		all = append(all, netns.Connection{Local: netip.MustParseAddrPort("10.99.0.2:40000"), Remote: netip.MustParseAddrPort(remote)})
	}
	done := repaired{Before: all}
	tried := 0
	done.reset(func(c netns.Connection) error {
		tried++
		return fmt.Errorf("close %s: %w", c.Remote, netns.ErrNoReset)
	}, all)
	if tried != 1 || done.Reset != 0 {
		t.Errorf("%d are tried and %d closed, want 1 and 0: no other will do better", tried, done.Reset)
	}
	if len(done.Notes) != 1 || !strings.Contains(done.Notes[0], "not every connection is closed: close [fd99::1]:80: ") || !strings.Contains(done.Notes[0], "CONFIG_INET_DIAG_DESTROY is not set") {
		t.Errorf("the notes are %q", done.Notes)
	}
	if text := opened(done); !strings.Contains(text, "outside the mesh until they end: 2 connections") {
		t.Errorf("the Event says %q", text)
	}
}
