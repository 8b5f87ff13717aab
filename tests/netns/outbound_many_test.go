package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// manyDestinations is a network whose every address the far host takes.
func manyDestinations(p *kit.Pod, prefix string) {
	_, ipnet, err := net.ParseCIDR(prefix)
	if err != nil {
		panic(err)
	}
	p.Far.Netlink(func(h *netlink.Handle) error {
		return h.RouteAdd(&netlink.Route{Dst: ipnet, LinkIndex: 1, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST})
	})
}

// destination is the i-th of many, none of which is another's.
func destination(f family, i int) netip.AddrPort {
	if f.far.Is4() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 100, byte(i >> 8), byte(i)}), uint16(80+i%3))
	}
	a := netip.MustParseAddr("fd98::").As16()
	a[14], a[15] = byte(i>>8), byte(i)
	return netip.AddrPortFrom(netip.AddrFrom16(a), uint16(80+i%3))
}

// perThread is how many connections, both ends, fit into one table of
// descriptors.
func perThread(t *testing.T) int {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	return int(min(limit.Cur, 100_000)-500) / 2
}

// holdMany opens connections number from to below to, each to a destination of
// its own, asserts what the proxy is told of each, and holds them until release
// is closed. It ends at the first that cannot be opened. They live in a table of
// descriptors that is its thread's alone, as RLIMIT_NOFILE is per table.
func holdMany(t *testing.T, p *kit.Pod, f family, listener *kit.Sock, from, to int, release <-chan struct{}) (opened int, err error) {
	type result struct {
		thread int
		opened int
		err    error
	}
	results := make(chan result)
	go func() {
		err := p.As(kit.App, func() error {
			runtime.LockOSThread() // once more than it is unlocked: the thread dies with its table
			if err := unix.Unshare(unix.CLONE_FILES); err != nil {
				return fmt.Errorf("unshare the descriptors: %w", err)
			}
			opened, err := openMany(f, listener, from, to)
			results <- result{unix.Gettid(), opened, err}
			<-release
			return nil
		})
		if err != nil {
			results <- result{err: err}
		}
	}()
	r := <-results
	t.Cleanup(func() {
		kit.Eventually(t, "the thread that held connections is gone", func() bool {
			_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", r.thread))
			return r.thread == 0 || errors.Is(err, os.ErrNotExist)
		})
	})
	return r.opened, r.err
}

func openMany(f family, listener *kit.Sock, from, to int) (opened int, err error) {
	for i := from; i < to; i++ {
		fd, err := unix.Socket(f.socket, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return opened, fmt.Errorf("socket: %w", err)
		}
		dst := destination(f, i)
		if err := (&kit.Sock{FD: fd}).Connect(dst); err != nil {
			return opened, fmt.Errorf("connect to %v: %w", dst, err)
		}
		accepted, _, err := unix.Accept4(listener.FD, unix.SOCK_CLOEXEC)
		if err != nil {
			return opened, fmt.Errorf("accept: %w", err)
		}
		if got, err := (&kit.Sock{FD: accepted}).OrigDst(f.level); err != nil || got != dst {
			return opened, fmt.Errorf("connection %d: SO_ORIGINAL_DST is %v, %v; want %v", i, got, err, dst)
		}
		opened++
	}
	return opened, nil
}

func TestOutboundManyConnectionsAtOnceFromFewPorts(t *testing.T) {
	d := kit.Datapath(t)
	const ports, want = 2000, 20000
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Sysctl("ipv4/ip_local_port_range", fmt.Sprintf("32768 %d", 32768+ports-1))
			manyDestinations(p, map[bool]string{true: "10.100.0.0/16", false: "fd98::/64"}[f.far.Is4()])
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			both(t, p.NS, f, destination(f, 0), server).close()
			p.Enroll(d)
			listener := p.Listen(kit.Proxy, at(f.wildcard, 15001))
			started := time.Now()
			release := make(chan struct{})
			defer close(release)
			opened, step := 0, perThread(t)
			var err error
			for err == nil && opened < want {
				var n int
				n, err = holdMany(t, p, f, listener, opened, min(opened+step, want), release)
				opened += n
			}
			t.Logf("%d connections at once, %d ephemeral ports, %v", opened, ports, time.Since(started).Round(time.Millisecond))
			if f.far.Is6() {
				// One loopback address: the range is the limit (docs/compatibility.md).
				if opened != ports || !errors.Is(err, unix.EADDRNOTAVAIL) {
					t.Errorf("%d connections, then %v; want %d, then EADDRNOTAVAIL", opened, err, ports)
				}
			} else if err != nil || opened != want {
				t.Errorf("%d connections, then %v; want %d", opened, err, want)
			}
			checkNothingReached(t, server)
			checkNoHandshakes(t, d, p)
		})
	}
}

const nameSize = 64 // an original destination as text, padded

// tellingProxy accepts until stopped, waits for a byte, writes the original
// destination on each connection and closes it. Closed closes at once, with
// whatever waits.
func tellingProxy(listener *kit.Sock, f family) (closed func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		defer listener.Close()
		for {
			select {
			case <-stop:
				return
			default:
			}
			c, err := listener.AcceptWithin(10 * time.Millisecond)
			if err != nil {
				continue
			}
			to, err := c.OrigDst(f.level)
			_ = c.ReadFull(make([]byte, 1))
			_ = c.WriteAll(fmt.Appendf(nil, "%-*s", nameSize, fmt.Sprint(to, " ", err)))
			c.Close()
		}
	}()
	return sync.OnceFunc(func() { close(stop); <-done })
}

// ask dials, reads what the proxy tells and compares.
func ask(p *kit.Pod, f family, to netip.AddrPort) error {
	s, err := p.Dial(kit.App, f.socket, to)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer s.Close()
	// Who only reads may wait for ever where a listener closes and the last
	// packet of a handshake is lost, as on a busy machine: say something.
	if err := s.WriteAll([]byte{'?'}); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	got := make([]byte, nameSize)
	if err := s.ReadFull(got); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if want := fmt.Sprintf("%-*s", nameSize, fmt.Sprint(to, " ", nil)); string(got) != want {
		return fmt.Errorf("%w: the proxy was told %q, want %q", errMisdirected, got, want)
	}
	return nil
}

var errMisdirected = errors.New("misdirected")

func TestOutboundOfManyClientsAtOnce(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Enroll(d)
			defer tellingProxy(p.Listen(kit.Proxy, at(f.wildcard, 15001)), f)()
			var clients sync.WaitGroup
			for client := range 50 {
				clients.Go(func() {
					for i := range 20 {
						if err := ask(p, f, destination(f, client*20+i)); err != nil {
							t.Errorf("client %d, connection %d: %v", client, i, err)
							return
						}
					}
				})
			}
			clients.Wait()
			checkNoHandshakes(t, d, p)
		})
	}
}

func TestOutboundWhileReuseportWorkersComeAndGo(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Enroll(d)
			var workers [4]func()
			start := func(i int) {
				workers[i] = tellingProxy(p.Listen(kit.Proxy, at(f.wildcard, 15001), kit.ReusePort), f)
			}
			for i := range workers {
				start(i)
				defer func() { workers[i]() }()
			}
			load := func(stop <-chan struct{}, clients int, judge func(error) bool) *sync.WaitGroup {
				var wait sync.WaitGroup
				for client := range clients {
					wait.Go(func() {
						for i := 0; ; i++ {
							select {
							case <-stop:
								return
							default:
							}
							if err := ask(p, f, destination(f, client<<12|i)); err != nil && !judge(err) {
								t.Errorf("client %d, connection %d: %v", client, i, err)
								return
							}
						}
					})
				}
				return &wait
			}
			// While one closes, what it has in its queue is reset; nothing is
			// refused, as three others listen, and nothing is misdirected.
			stop := make(chan struct{})
			running := load(stop, 8, func(err error) bool {
				return errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
			})
			for round := range 8 {
				workers[round%4]()
				start(round % 4)
			}
			close(stop)
			running.Wait()

			// The set is stable again, without the first's successor.
			workers[0]()
			for i := range 400 {
				if err := ask(p, f, destination(f, i)); err != nil {
					t.Errorf("with three workers, connection %d: %v", i, err)
				}
			}
			checkNoHandshakes(t, d, p)
		})
	}
}
