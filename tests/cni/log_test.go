package cni

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/tests/kit"
)

const maxLogs = 2 * 10 << 20

func TestTheLogGoesToTheDaemonAndWithoutOneToAFile(t *testing.T) {
	n := newNode(t)
	list, p := n.network("net", "1.0.0"), kit.NewPod(t)
	n.leaveState(nil)
	n.mustAdd(list, sandbox(p, "c1", "eth0", injected()))
	text, err := os.ReadFile(n.log)
	if err != nil || !strings.Contains(string(text), "pod enrolled") || !strings.Contains(string(text), "decided without the node daemon") {
		t.Errorf("the file holds %q, %v", text, err)
	}
	if strings.Contains(string(text), "secret") || strings.Contains(string(text), "example.com") {
		t.Error("the file holds a foreign annotation:", string(text))
	}
	n.daemon(enrolls)
	n.mustAdd(list, sandbox(p, "c1", "eth0", injected()))
	told := ""
	for _, r := range n.seen {
		if r.Verb == agentapi.Log {
			told += strings.Join(r.Lines, "\n")
		}
	}
	if !strings.Contains(told, "pod enrolled") || strings.Contains(told, "secret") {
		t.Errorf("the daemon is told %q", told)
	}
	if after, _ := os.ReadFile(n.log); !bytes.Equal(text, after) {
		t.Error("the file is written beside the daemon")
	}
}

func TestTheLogIsTwoFilesOfTenMegabytesAtMost(t *testing.T) {
	n := newNode(t)
	n.leaveState(nil)
	list, p := n.network("net", "1.0.0"), kit.NewPod(t)
	for range 3 {
		if err := os.WriteFile(n.log, bytes.Repeat([]byte("x\n"), (10<<20-100)/2), 0o600); err != nil {
			t.Fatal(err)
		}
		n.mustAdd(list, sandbox(p, "c1", "eth0", injected()))
		var sum int64
		files, err := filepath.Glob(n.log + "*")
		if err != nil || len(files) != 2 {
			t.Fatalf("the files are %v, %v", files, err)
		}
		for _, f := range files {
			info, err := os.Stat(f)
			if err != nil {
				t.Fatal(err)
			}
			sum += info.Size()
		}
		text, err := os.ReadFile(n.log)
		if err != nil || sum > maxLogs || !strings.Contains(string(text), "pod enrolled") {
			t.Errorf("the files have %d bytes, and the new one says %.100q, %v", sum, text, err)
		}
	}
}

// Whatever the place is like where the log should be, a pod starts.
func TestALogThatCannotBeWrittenFailsNoADD(t *testing.T) {
	n := newNode(t)
	n.leaveState(nil)
	p := kit.NewPod(t)
	dir := t.TempDir()
	mount := func(name, source, kind string, flags uintptr, data string) string {
		t.Helper()
		at := filepath.Join(dir, name)
		if err := os.Mkdir(at, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(source, at, kind, flags, data); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
		return at
	}
	full := mount("full", "tmpfs", "tmpfs", 0, "size=4k")
	if err := os.WriteFile(filepath.Join(full, "filler"), make([]byte, 4<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(full, "more"), make([]byte, 1), 0o600); err == nil {
		t.Fatal("the full disk has room")
	}
	readOnly := mount("readonly", "tmpfs", "tmpfs", unix.MS_RDONLY, "size=1m")
	if err := os.WriteFile(filepath.Join(readOnly, "x"), nil, 0o600); err == nil {
		t.Fatal("the read-only file system can be written")
	}
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, path := range map[string]string{
		"a full disk": filepath.Join(full, "log"), "a read-only file system": filepath.Join(readOnly, "log"),
		"no directory": filepath.Join(dir, "none", "log"), "below a file": filepath.Join(plain, "log"),
		"a directory": dir, "a FIFO without a reader": fifo, "no log wanted": "",
		"what no path can be": strings.Repeat("x/", 3000),
	} {
		list := n.networkWith("net", "1.0.0", map[string]any{"logFile": path})
		rt := sandbox(p, "c1", "eth0", injected())
		n.mustAdd(list, rt)
		if !n.enrolled(p) {
			t.Errorf("%s: the pod is not enrolled", what)
		}
		n.mustDel(list, rt)
		if n.enrolled(p) {
			t.Errorf("%s: DEL leaves it enrolled", what)
		}
	}
}

// A daemon that hangs only for the log is left after a moment.
func TestADaemonThatDoesNotTakeTheLogHoldsNobodyUp(t *testing.T) {
	n := newNode(t)
	n.leaveState(nil)
	l, err := net.Listen("unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var open []net.Conn // the backlog takes them, and nobody reads
	var mu sync.Mutex
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
		}
	}()
	p := kit.NewPod(t)
	n.mustAdd(n.network("net", "1.0.0"), sandbox(p, "c1", "eth0", injected()))
	mu.Lock()
	defer mu.Unlock()
	if len(open) != 2 {
		t.Error("connections to the daemon:", len(open), "want one for the decision and one for the log")
	}
	for _, conn := range open {
		conn.Close()
	}
	if text, err := os.ReadFile(n.log); err != nil || !strings.Contains(string(text), "pod enrolled") {
		t.Error("the log went nowhere:", fmt.Sprint(err))
	}
}
