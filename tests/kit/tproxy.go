package kit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// TProxy is who a proxy in TPROXY mode runs as.
var TProxy = ID{0, 1337}

// tproxyEnv makes the test binary a proxy in TPROXY mode; its value are words of
// TProxyOption. boundedEnv makes it drop what capabilities it may ever have but
// CAP_NET_ADMIN, and become the command that its arguments are.
const (
	tproxyEnv  = "SLUICE_TEST_TPROXY"
	boundedEnv = "SLUICE_TEST_BOUNDED"
)

const inboundPort = 15006

// TProxyOption changes what a proxy in TPROXY mode does.
type TProxyOption string

// Unmarked proxies leave SO_MARK out; ToLoopback ones call the app on 127.0.0.1
// or ::1.
const (
	Unmarked   TProxyOption = "unmarked"
	ToLoopback TProxyOption = "loopback"
)

// StartTProxy starts a proxy in the pod that does what one does in TPROXY mode:
// it listens on 15006 with IP_TRANSPARENT, and calls the address and port that
// was dialled from the client's address, with mark 1337. It runs as TProxy, with
// CAP_NET_ADMIN alone. The returned function ends it.
func (n *NS) StartTProxy(options ...TProxyOption) (stop func()) {
	n.t.Helper()
	words := "on"
	for _, o := range options {
		words += " " + string(o)
	}
	return n.startBounded([]string{tproxyEnv + "=" + words}, "/proc/self/exe")
}

// HAProxyTransparent is the same in HAProxy's words. It cannot set a mark on its
// calls of the app (it can from version 3.0 on).
const HAProxyTransparent = `global
  maxconn 2000
  nbthread 1
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend inbound4
  bind 0.0.0.0:15006 transparent
  default_backend app4
frontend inbound6
  bind [::]:15006 v6only transparent
  default_backend app6
backend app4
  option transparent
  source 0.0.0.0 usesrc clientip
backend app6
  option transparent
  source ipv6@[::] usesrc clientip
`

// StartHAProxy is StartTProxy with HAProxy, which listens on 15006 as its
// configuration says.
func (n *NS) StartHAProxy(text string) (stop func()) {
	n.t.Helper()
	binary, err := exec.LookPath("haproxy")
	if err != nil {
		n.t.Fatal("HAProxy is not installed: install the package haproxy")
	}
	config := filepath.Join(n.t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
	return n.startBounded(nil, binary, "-db", "-f", config)
}

// startBounded starts a proxy and waits until it listens in both families.
func (n *NS) startBounded(env []string, command ...string) (stop func()) {
	n.t.Helper()
	cmd := exec.Command("/proc/self/exe", command...)
	cmd.Env = append(append(os.Environ(), boundedEnv+"=1"), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(TProxy.UID), Gid: uint32(TProxy.GID)}}
	said := &lockedText{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := n.Do(cmd.Start); err != nil {
		n.t.Fatal("start a proxy:", err)
	}
	var once sync.Once
	stop = func() {
		once.Do(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if n.t.Failed() {
				n.t.Logf("%s said: %s", command[0], said)
			}
		})
	}
	n.t.Cleanup(stop)
	Eventually(n.t, "the proxy listens in both families", func() bool {
		listening := 0
		for _, table := range []string{"tcp", "tcp6"} {
			listening += listeners(fmt.Sprintf("/proc/%d/net/%s", cmd.Process.Pid, table), inboundPort)
		}
		return listening == 2
	})
	return stop
}

// listeners counts those on a port in a table of /proc.
func listeners(table string, port int) (n int) {
	file, err := os.Open(table)
	if err != nil {
		return 0
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		fields := strings.Fields(lines.Text()) // sl local_address rem_address st ...
		const listen = "0A"
		if len(fields) > 3 && fields[3] == listen && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) {
			n++
		}
	}
	return n
}

type lockedText struct {
	sync.Mutex
	strings.Builder
}

func (l *lockedText) Write(p []byte) (int, error) {
	l.Lock()
	defer l.Unlock()
	return l.Builder.Write(p)
}

// proxyAndExit is what a process does that startBounded started.
func proxyAndExit() {
	if os.Getenv(boundedEnv) != "" {
		fmt.Fprintln(os.Stderr, becomeBounded())
		os.Exit(1)
	}
	if options := os.Getenv(tproxyEnv); options != "" {
		fmt.Fprintln(os.Stderr, runTProxy(options))
		os.Exit(1)
	}
}

// becomeBounded takes all capabilities but one out of the bounding set, which
// limits what root gets when it executes a program.
func becomeBounded() error {
	runtime.LockOSThread()
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if c == unix.CAP_NET_ADMIN {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	os.Unsetenv(boundedEnv)
	return unix.Exec(os.Args[1], os.Args[1:], os.Environ())
}

func runTProxy(options string) error {
	failed := make(chan error)
	for _, family := range []struct{ network, at string }{{"tcp4", "0.0.0.0:15006"}, {"tcp6", "[::]:15006"}} {
		config := net.ListenConfig{Control: transparent(false)}
		config.SetMultipathTCP(false)
		l, err := config.Listen(context.Background(), family.network, family.at)
		if err != nil {
			return err
		}
		go func() {
			for {
				client, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go carry(client.(*net.TCPConn), family.network, options)
			}
		}()
	}
	return <-failed
}

// transparent lets a socket use addresses that are not the machine's.
func transparent(mark bool) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		level, name := unix.SOL_IP, unix.IP_TRANSPARENT
		if network == "tcp6" {
			level, name = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
		}
		var err error
		refused := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), level, name, 1)
			if mark {
				err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 1337))
			}
		})
		return errors.Join(refused, err)
	}
}

// carry calls the app for a client and copies both ways until both have ended.
func carry(client *net.TCPConn, network, options string) {
	from, to := client.RemoteAddr().(*net.TCPAddr), client.LocalAddr().(*net.TCPAddr)
	if strings.Contains(options, string(ToLoopback)) {
		to.IP = net.IPv6loopback
		if network == "tcp4" {
			to.IP = net.IPv4(127, 0, 0, 1)
		}
	}
	marked := !strings.Contains(options, string(Unmarked))
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.IP}, Control: transparent(marked), Timeout: Patience}
	dialer.SetMultipathTCP(false)
	conn, err := dialer.Dial(network, to.String())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		reset(client)
		return
	}
	app := conn.(*net.TCPConn)
	var both sync.WaitGroup
	for _, way := range []struct{ from, to *net.TCPConn }{{client, app}, {app, client}} {
		both.Go(func() {
			if _, err := io.Copy(way.to, way.from); err != nil {
				reset(app)
				reset(client)
				return
			}
			_ = way.to.CloseWrite()
		})
	}
	both.Wait()
	app.Close()
	client.Close()
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	c.Close()
}

// ForClient makes a socket call the app as a proxy in TPROXY mode does, from a
// client's address.
func ForClient(client netip.AddrPort, mark int) Option {
	return func(o *opts) {
		With(func(fd int) error {
			if client.Addr().Is6() || familyOf(fd) == unix.AF_INET6 {
				return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			}
			return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		})(o)
		if mark != 0 {
			Set(unix.SOL_SOCKET, unix.SO_MARK, mark)(o)
		}
		Set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)(o)
		Bind(client)(o)
	}
}

// BareListen is Listen by somebody without any capability.
func (n *NS) BareListen(id ID, at string) *Sock {
	n.t.Helper()
	ap := netip.MustParseAddrPort(at)
	family := unix.AF_INET
	if ap.Addr().Is6() {
		family = unix.AF_INET6
	}
	var s *Sock
	err := n.Bare(id, func() (err error) {
		if s, err = open(n.t, family, []Option{Set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), Bind(ap)}); err != nil {
			return err
		}
		return unix.Listen(s.FD, 4096)
	})
	if err != nil {
		n.t.Fatalf("listen on %s in %s: %v", at, n.Name, err)
	}
	return s
}

// Impatient sockets give up a connect that nobody answers after Quiet.
func Impatient(o *opts) {
	With(func(fd int) error {
		tv := unix.NsecToTimeval(Quiet.Nanoseconds())
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
	})(o)
}
