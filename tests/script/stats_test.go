package script

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// The guard sees packets: what it stops are SYNs, and no connections.
func TestStatsSaysWhatItCounts(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "counted")
	pod := kit.NewPod(t)
	t.Cleanup(func() { sluicectl(t, "down", "--bpffs", dir) })
	sluicectl(t, "up", "--bpffs", dir, "--cgroup", kit.Cgroup(t))
	sluicectl(t, "enroll", "--bpffs", dir, "--netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.Fd()), "--pod", "shop/cart-0")
	if s, err := pod.Dial(kit.App, unix.AF_INET, kitAddr(80)); err == nil {
		s.Close()
		t.Error("without a proxy a connection is made")
	}
	syn := kit.IP(kit.Pod4, kit.Far4, unix.IPPROTO_TCP, kit.Segment(netip.AddrPortFrom(kit.Pod4, 4711), kitAddr(80), kit.SYN, ""))
	for range 2 {
		if err := pod.SendRaw(syn); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOBUFS) {
			t.Fatal(err)
		}
	}
	table := sluicectl(t, "stats", "--bpffs", dir)
	for _, want := range []string{
		`(?m)^POD +COOKIE +REASON +COUNT +UNIT$`,
		`(?m)^shop/cart-0 +[0-9]+ +captured-out +1 +connections$`,
		`(?m)^shop/cart-0 +[0-9]+ +guard-no-verdict +2 +SYNs$`,
	} {
		if !regexp.MustCompile(want).MatchString(table) {
			t.Errorf("no line is %s in\n%s", want, table)
		}
	}
}
