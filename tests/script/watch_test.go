package script

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// output can be read while it is written.
type output struct {
	sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.Lock()
	defer o.Unlock()
	return o.text.Write(p)
}

func (o *output) has(what string) bool {
	o.Lock()
	defer o.Unlock()
	return strings.Contains(o.text.String(), what)
}

func TestWatchSaysWhatItFollowsAndEndsByASignal(t *testing.T) {
	dir := filepath.Join(kit.BPFFS(t), "watched")
	pod := kit.NewPod(t)
	pod.Hold(kit.App)
	t.Cleanup(func() {
		if _, err := datapath.Down(dir); err != nil {
			t.Error(err)
		}
	})
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.Fd())
	sluicectl(t, "up", "--bpffs", dir, "--cgroup", kit.Cgroup(t))
	sluicectl(t, "enroll", "--bpffs", dir, "--netns", path)
	if got, want := sluicectl(t, "refresh", "--bpffs", dir, "--all"), fmt.Sprintf("cookie %d is current.\n", pod.Cookie()); got != want {
		t.Errorf("refresh --all of a pod without a name says %q, want %q", got, want)
	}
	sluicectl(t, "enroll", "--bpffs", dir, "--netns", path, "--pod", "shop/cart-0")

	pod.AddAddr("eth0", netip.MustParsePrefix("10.94.0.2/32"))
	if got, want := sluicectl(t, "refresh", "--bpffs", dir, "--netns", path), "shop/cart-0: address added: 10.94.0.2\n"; got != want {
		t.Errorf("refresh says %q, want %q", got, want)
	}
	if got, want := sluicectl(t, "refresh", "--bpffs", dir, "--all"), "shop/cart-0 is current.\n"; got != want {
		t.Errorf("refresh --all says %q, want %q", got, want)
	}

	for _, signal := range []os.Signal{unix.SIGINT, unix.SIGTERM} {
		var stdout, stderr output
		cmd := exec.Command("sluicectl", "watch", "--bpffs", dir)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kit.Eventually(t, "watch says what it does", func() bool { return stdout.has("current, 1 of them now. Ctrl-C ends it.\n") })
		address := netip.MustParsePrefix(fmt.Sprintf("10.94.1.%d/32", signal))
		pod.AddAddr("eth0", address)
		kit.Eventually(t, "watch says what it saw", func() bool {
			return stderr.has("address added") && stderr.has("pod=shop/cart-0") && stderr.has(address.Addr().String())
		})
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil || !stdout.has("Ended. ") {
			t.Errorf("by %v it ends with %v: %s%s", signal, err, &stdout.text, &stderr.text)
		}
	}
}
