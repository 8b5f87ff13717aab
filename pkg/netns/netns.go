// Package netns opens network namespaces and reads from them what the kernel
// alone knows: the cookie, the addresses, the interfaces, the processes.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrHost is returned for the network namespace of the machine itself.
var ErrHost = errors.New("it is the network namespace of the machine itself")

const nsGetNstype = 0xb703 // NS_GET_NSTYPE, ioctl_ns(2)

// NetNS is an open network namespace. Close it.
type NetNS struct {
	file   *os.File
	path   string
	cookie uint64
	inode  uint64
	handle *netlink.Handle  // opened when first needed
	socket *nl.SocketHandle // the same, for dumps of our own
}

// Open opens a namespace by path, or by the name under which "ip netns" keeps
// it, and reads its cookie.
func Open(pathOrName string) (*NetNS, error) {
	if pathOrName == "" {
		return nil, errors.New("no network namespace given: name it as \"ip netns list\" does, or give a path such as /proc/PID/ns/net")
	}
	path := pathOrName
	if !strings.ContainsRune(path, '/') {
		path = filepath.Join("/var/run/netns", pathOrName)
	}
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("no network namespace %s: \"ip netns list\" shows the named ones, a path such as /proc/PID/ns/net works too", pathOrName)
	}
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", pathOrName, err)
	}
	n := &NetNS{file: file, path: path}
	if err := n.identify(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", pathOrName, err), file.Close())
	}
	return n, nil
}

// CookieOf reads the cookie of a namespace that is open already, as one that came
// over a socket. The file stays the caller's.
func CookieOf(file *os.File) (uint64, error) {
	if file == nil {
		return 0, errors.New("no network namespace was given")
	}
	n := &NetNS{file: file, path: file.Name()}
	if err := n.identify(); err != nil {
		return 0, err
	}
	return n.cookie, nil
}

// New makes a network namespace that lives until Close, with lo up.
func New() (*NetNS, error) {
	type result struct {
		ns  *NetNS
		err error
	}
	made := make(chan result, 1)
	var onNewThread func()
	onNewThread = func() { // in the new namespace for good: the thread ends with us
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread cannot end, and /proc/PID shows it: leave it be.
			defer runtime.UnlockOSThread()
			done := make(chan struct{})
			go func() { defer close(done); onNewThread() }()
			<-done
			return
		}
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			made <- result{nil, fmt.Errorf("make a network namespace: %w", err)}
			return
		}
		ns, err := Open("/proc/thread-self/ns/net")
		made <- result{ns, err}
	}
	go onNewThread()
	r := <-made
	if r.err != nil {
		return nil, r.err
	}
	r.ns.path = "a throw-away namespace"
	if err := r.ns.loUp(); err != nil {
		return nil, errors.Join(err, r.ns.Close())
	}
	return r.ns, nil
}

func (n *NetNS) loUp() error {
	handle, err := n.Handle()
	if err != nil {
		return err
	}
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := handle.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

func (n *NetNS) identify() error {
	kind, err := unix.IoctlRetInt(int(n.file.Fd()), nsGetNstype)
	if err != nil || kind != unix.CLONE_NEWNET {
		return errors.New("this is not a network namespace: give a name from \"ip netns list\" or a path such as /proc/PID/ns/net")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	n.inode = st.Ino
	return n.Do(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open a socket: %w", err)
		}
		defer unix.Close(fd)
		n.cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		if err != nil {
			return fmt.Errorf("read its cookie (needs Linux 5.14 or newer): %w", err)
		}
		return nil
	})
}

// RefuseHost returns ErrHost for the kernel's first namespace and for that of
// PID 1 (in a machine that is itself a container). Where PID 1 may not be
// looked at, this process's own namespace stands for it.
func (n *NetNS) RefuseHost() error {
	const initialCookie = 1 // init_net's, on every kernel with cookies
	if n.cookie == initialCookie {
		return ErrHost
	}
	var st unix.Stat_t
	err := unix.Stat("/proc/1/ns/net", &st)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		err = unix.Stat("/proc/thread-self/ns/net", &st)
	}
	if err != nil {
		return fmt.Errorf("find the machine's own network namespace: %w", err)
	}
	if st.Ino == n.inode {
		return ErrHost
	}
	return nil
}

// Cookie is the kernel's number for the namespace, never reused until reboot.
func (n *NetNS) Cookie() uint64 { return n.cookie }

// Inode identifies the namespace in /proc while it lives.
func (n *NetNS) Inode() uint64 { return n.inode }

// Path is what was opened.
func (n *NetNS) Path() string { return n.path }

// Fd is valid until Close.
func (n *NetNS) Fd() int { return int(n.file.Fd()) }

// Close is idempotent.
func (n *NetNS) Close() error {
	if n.handle != nil {
		n.handle.Close()
		n.handle = nil
	}
	if n.socket != nil {
		n.socket.Close()
		n.socket = nil
	}
	if err := n.file.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Do runs fn on a thread that is in the namespace. If the thread cannot come
// back it ends with the goroutine that holds it, so no other work runs in the
// wrong namespace.
func (n *NetNS) Do(fn func() error) error {
	result := make(chan error, 1)
	go func() { result <- n.onOwnThread(fn) }()
	return <-result
}

func (n *NetNS) onOwnThread(fn func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", n.path, err)
	}
	err = fn()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
		runtime.UnlockOSThread()
	}
	return err
}
