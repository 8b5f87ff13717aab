package kit

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// insideEnv makes the test binary the process of an Inside.
const insideEnv = "SLUICE_TEST_INSIDE"

// insideFD is where that process has its end of the socket to the test.
const insideFD = 3

// Inside is a process in a pod with a user namespace of its own, which opens
// sockets on behalf of the test: a process of many threads, such as the test,
// cannot enter such a namespace. The IDs it is given are those of the pod.
type Inside struct {
	PID  int
	cmd  *exec.Cmd
	conn int
	t    testing.TB
}

// order is what the test asks of it. The answer is an errno, and a socket.
type order struct {
	Dial bool // else listen
	ID   ID
	Addr netip.AddrPort
}

// NewUserPod makes a pod whose network namespace belongs to a user namespace with
// the given IDs (none: those of nobody), and a process in it.
func NewUserPod(t testing.TB, ids ...syscall.SysProcIDMap) (*Pod, *Inside) {
	t.Helper()
	needWorld(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	defer theirs.Close()
	in := &Inside{cmd: exec.Command("/proc/self/exe"), conn: pair[0], t: t}
	in.cmd.Env = append(os.Environ(), insideEnv+"=1")
	in.cmd.Stderr = os.Stderr
	in.cmd.ExtraFiles = []*os.File{theirs}
	in.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
	}
	if len(ids) > 0 {
		in.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 0, Gid: 0}
	}
	if err := in.cmd.Start(); err != nil {
		unix.Close(in.conn)
		t.Fatal("start a process in a user namespace:", err)
	}
	t.Cleanup(in.Kill)
	in.PID = in.cmd.Process.Pid
	ns, err := netns.Open("/proc/" + strconv.Itoa(in.PID) + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	pod := &NS{NetNS: ns, Name: "pod", t: t}
	pod.Netlink(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
	return newPod(t, pod), in
}

// Kill ends the process. It is idempotent.
func (in *Inside) Kill() {
	if in.conn < 0 {
		return
	}
	unix.Close(in.conn)
	in.conn = -1
	_ = in.cmd.Process.Kill()
	_ = in.cmd.Wait()
}

// Listen opens a listener, which the process keeps open too.
func (in *Inside) Listen(id ID, at string) *Sock {
	in.t.Helper()
	s, err := in.ask(order{ID: id, Addr: netip.MustParseAddrPort(at)})
	if err != nil {
		in.t.Fatalf("listen on %s inside: %v", at, err)
	}
	return s
}

// Dial connects.
func (in *Inside) Dial(id ID, to netip.AddrPort) (*Sock, error) {
	return in.ask(order{Dial: true, ID: id, Addr: to})
}

func (in *Inside) ask(o order) (*Sock, error) {
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	if err := unix.Sendmsg(in.conn, text, nil, nil, 0); err != nil {
		return nil, fmt.Errorf("ask the process inside: %w", err)
	}
	answer, rights := make([]byte, 64), make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	for {
		n, oobn, _, _, err = unix.Recvmsg(in.conn, answer, rights, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil || n == 0 {
		return nil, fmt.Errorf("the process inside gives no answer: %w", errors.Join(err, errors.New("see its last words")))
	}
	if errno, err := strconv.Atoi(string(answer[:n])); err != nil || errno != 0 {
		return nil, errors.Join(err, unix.Errno(errno))
	}
	messages, err := unix.ParseSocketControlMessage(rights[:oobn])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("the process inside sent no socket: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	s := &Sock{FD: fds[0], t: in.t}
	in.t.Cleanup(s.Close)
	s.timeout(Patience)
	return s, nil
}

// serveInside is the process: it does as it is told until the test hangs up.
func serveInside() {
	buf := make([]byte, 1024)
	for {
		n, err := unix.Read(insideFD, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			os.Exit(0)
		}
		var o order
		if err := json.Unmarshal(buf[:n], &o); err != nil {
			panic(err)
		}
		fd, err := o.carryOut()
		var errno unix.Errno
		if err != nil && !errors.As(err, &errno) {
			panic(err)
		}
		var rights []byte
		if err == nil {
			rights = unix.UnixRights(fd)
		}
		if err := unix.Sendmsg(insideFD, []byte(strconv.Itoa(int(errno))), rights, nil, 0); err != nil {
			panic(err)
		}
		if err == nil && o.Dial {
			unix.Close(fd)
		}
	}
}

func (o order) carryOut() (fd int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := become(o.ID); err != nil {
		return -1, err
	}
	defer func() {
		if err := become(Root); err != nil {
			panic(err)
		}
	}()
	family := unix.AF_INET
	if o.Addr.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	s := &Sock{FD: fd}
	s.timeout(Patience)
	if o.Dial {
		err = s.Connect(o.Addr)
	} else {
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.Bind(fd, sockaddr(family, o.Addr)),
			unix.Listen(fd, 4096))
	}
	if err != nil {
		unix.Close(fd)
	}
	return fd, err
}
