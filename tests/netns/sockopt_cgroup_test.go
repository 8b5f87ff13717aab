package netns

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// The getsockopt program costs every getsockopt of every process below its
// cgroup, so it can have one of its own. What counts is where a socket was
// opened.
func TestOnlyTheSockoptCgroupAnswersForTheOriginalDestination(t *testing.T) {
	home := kit.Cgroup(t)
	proxies := filepath.Join(home, "proxies")
	if err := os.Mkdir(proxies, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(proxies); err != nil {
			t.Error(err)
		}
	})
	move := func(to string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d := kit.OwnDatapath(t, datapath.Options{SockoptCgroup: proxies})
	attached := d.Attached()
	if attached["getsockopt"] == attached["connect4"] || attached["getsockopt"] == 0 {
		t.Errorf("getsockopt is on cgroup %d, connect4 on %d", attached["getsockopt"], attached["connect4"])
	}
	for name, inside := range map[string]bool{"inside": true, "outside": false} {
		t.Run(name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Enroll(d)
			if inside {
				move(proxies)
			}
			proxy := p.Listen(kit.Proxy, "0.0.0.0:15001")
			move(home)
			if _, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80)); err != nil {
				t.Fatal("dial:", err)
			}
			got, err := proxy.MustAccept().OrigDst(unix.SOL_IP)
			if inside && (err != nil || got != ap(kit.Far4, 80)) {
				t.Errorf("SO_ORIGINAL_DST is %v, %v; want %v", got, err, ap(kit.Far4, 80))
			}
			if !inside && err == nil && got == ap(kit.Far4, 80) {
				t.Error("the program ran outside its cgroup")
			}
		})
	}
}
