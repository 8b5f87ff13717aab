package cni

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// What the specification of the project allows, all waits included.
const (
	addLimit = 10 * time.Second
	delLimit = 5 * time.Second
)

// holdLock takes the datapath's lock, as a process does that hangs, until the
// returned function is called.
func (n *node) holdLock() (release func()) {
	n.t.Helper()
	f, err := os.Open(n.bpffs)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { f.Close() })
	return func() { f.Close() }
}

func TestALockThatSomebodyHoldsDelaysNeitherADDNorDELForLong(t *testing.T) {
	n := newNode(t)
	n.daemon(enrolls)
	list := n.network("net", "1.0.0")
	waits, leaves := kit.NewPod(t), kit.NewPod(t)
	comes, goes := sandbox(waits, "c1", "eth0", injected()), sandbox(leaves, "c2", "eth0", injected())
	n.mustAdd(list, goes)
	release := n.holdLock()

	began := time.Now()
	_, err := n.add(list, comes)
	if took := time.Since(began); took > addLimit {
		t.Error("ADD takes", took)
	}
	if code(err) != types.ErrTryAgainLater || !strings.Contains(err.Error(), n.bpffs) {
		t.Errorf("the error is %v, code %d; want one to try again that names %s", err, code(err), n.bpffs)
	}
	began = time.Now()
	n.mustDel(list, goes)
	if took := time.Since(began); took > delLimit {
		t.Error("DEL takes", took)
	}
	if !n.enrolled(leaves) {
		t.Error("DEL did without the lock")
	}

	release()
	if n.enrolled(waits) || n.attachments() != 1 {
		t.Error("an ADD that ended without the lock has left something")
	}
	n.mustAdd(list, comes)
	n.mustDel(list, goes)
	if !n.enrolled(waits) || n.enrolled(leaves) || n.attachments() != 1 {
		t.Error("when the lock is free: enrolled", n.enrolled(waits), n.enrolled(leaves), "attachments", n.attachments())
	}
}

// daemons are those that are there and answer nothing that a plugin can use.
var daemons = map[string]func(net.Conn){
	"hangs":                 func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) },
	"closes at once":        func(conn net.Conn) {},
	"dies when it has read": func(conn net.Conn) { readRequest(conn) },
	"dies in the middle of its answer": func(conn net.Conn) {
		readRequest(conn)
		_, _ = conn.Write([]byte("\x00\x00\x01\x00{\"version\":1,\"decision\":\"ski"))
	},
	"says nothing of a decision": func(conn net.Conn) {
		readRequest(conn)
		_, _ = conn.Write([]byte("\x00\x00\x00\x02{}"))
	},
	"speaks HTTP":                func(conn net.Conn) { _, _ = conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")) },
	"says more than anybody may": func(conn net.Conn) { _, _ = conn.Write([]byte("\xff\xff\xff\xff")) },
	"answers a byte a second": func(conn net.Conn) {
		readRequest(conn)
		text := `{"version":1,"decision":"skip","reason":"it is slow"}`
		for _, b := range append([]byte{0, 0, 0, byte(len(text))}, text...) {
			if _, err := conn.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(time.Second)
		}
	},
}

func readRequest(conn net.Conn) {
	var size [4]byte
	if _, err := io.ReadFull(conn, size[:]); err == nil {
		_, _ = io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(size[:])))
	}
}

func TestADaemonThatIsNoHelpIsNoDaemon(t *testing.T) {
	for name, serve := range daemons {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.leaveState(nil)
			l, err := net.Listen("unix", n.socket)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					go func() { serve(conn); conn.Close() }()
				}
			}()
			p, plain := kit.NewPod(t), kit.NewPod(t)
			list := n.network("net", "1.0.0")
			for _, rt := range []struct {
				pod         *kit.Pod
				container   string
				annotations map[string]string
				enrolled    bool
			}{{p, "c1", injected(), true}, {plain, "c2", map[string]string{}, false}} {
				began := time.Now()
				n.mustAdd(list, sandbox(rt.pod, rt.container, "eth0", rt.annotations))
				if took := time.Since(began); took > addLimit {
					t.Errorf("ADD takes %v", took)
				}
				if n.enrolled(rt.pod) != rt.enrolled {
					t.Errorf("%s is enrolled: %v", rt.container, !rt.enrolled)
				}
			}
			all, err := n.d.Attachments()
			if err != nil || len(all) != 1 || !all[0].Provisional {
				t.Errorf("the attachments are %+v, %v; want one in doubt", all, err)
			}
			began := time.Now()
			n.mustDel(list, sandbox(p, "c1", "eth0", nil))
			if took := time.Since(began); took > delLimit || n.enrolled(p) {
				t.Errorf("DEL takes %v, and the pod is enrolled: %v", took, n.enrolled(p))
			}
		})
	}
}

func TestTheDaemonsOwnPodIsNotAskedAbout(t *testing.T) {
	n := newNode(t)
	asked := false
	n.daemon(func(r agentapi.Request) agentapi.Answer { asked = true; return enrolls(r) })
	own := n.networkWith("net", "1.0.0", map[string]any{"ownPod": map[string]string{"namespace": "shop", "prefix": "cart-"}})
	p := kit.NewPod(t)
	n.mustAdd(own, sandbox(p, "c1", "eth0", injected()))
	if asked || n.enrolled(p) {
		t.Error("it is asked about:", asked, "and enrolled:", n.enrolled(p))
	}
	other := n.networkWith("net", "1.0.0", map[string]any{"ownPod": map[string]string{"namespace": "shop", "prefix": "sluiced-"}})
	n.mustAdd(other, sandbox(p, "c1", "eth0", injected()))
	if !asked || !n.enrolled(p) {
		t.Error("another pod is not asked about")
	}
}

func TestAStateFileThatIsOfNoUseIsNone(t *testing.T) {
	for name, text := range map[string]string{
		"empty":              "",
		"cut off":            `{"version":1,"mesh":{"excl`,
		"of a far version":   `{"version":9,"mesh":{}}`,
		"of another program": `[1,2]`,
		"not text":           "\x00\xff\xfe",
	} {
		n := newNode(t)
		if err := os.WriteFile(n.state, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		p := kit.NewPod(t)
		list := n.network("net", "1.0.0")
		_, err := n.add(list, sandbox(p, "c1", "eth0", injected()))
		if code(err) != types.ErrTryAgainLater || n.enrolled(p) || n.attachments() != 0 {
			t.Errorf("%s: a pod of the mesh: %v, enrolled %v", name, err, n.enrolled(p))
		}
		n.mustAdd(list, sandbox(p, "c1", "eth0", map[string]string{}))
		if n.enrolled(p) {
			t.Errorf("%s: a pod outside the mesh is enrolled", name)
		}
	}
}
