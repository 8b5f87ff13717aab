package netns

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// standIn is a proxy that tells each client where it believes it wanted to go.
// As HAProxy does, it takes getsockname where SO_ORIGINAL_DST fails, and goes
// there: that must never be itself.
type standIn struct {
	listener *kit.Sock
	pod      *kit.Pod
	level    int
	lost     int // connections without SO_ORIGINAL_DST
	done     chan struct{}
}

func (s *standIn) run() {
	defer close(s.done)
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return
		}
		dst, err := c.OrigDst(s.level)
		if err != nil {
			if s.lost++; s.lost > 50 {
				return // it goes round
			}
			if on, err := s.pod.Dial(kit.Proxy, unix.AF_INET6, c.Name()); err == nil {
				defer on.Close()
			}
		}
		_, _ = unix.Write(c.FD, []byte(dst.String()))
		c.Close()
	}
}

// told is where the proxy believes that this client wanted to go.
func told(c *kit.Sock) (string, error) {
	buf := make([]byte, 128)
	n := 0
	for {
		m, err := unix.Read(c.FD, buf[n:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return "", err
		case m == 0 && n == 0:
			return "", io.ErrUnexpectedEOF
		case m == 0:
			return string(buf[:n]), nil
		}
		n += m
	}
}

// Four entries, and the proxy accepts nobody until every connect has begun: all
// but a few are refused, and those few reach what they dialled.
func TestAFullTableRefusesAndNeverMixesUp(t *testing.T) {
	d := kit.OwnDatapath(t, datapath.Options{Handshakes: 4, HandshakeShare: 4})
	for _, f := range families {
		for _, accepts := range []bool{false, true} {
			t.Run(fmt.Sprint(f.name, "/", map[bool]string{false: "a proxy that sleeps", true: "a proxy that works"}[accepts]), func(t *testing.T) {
				p := handshakePod(t, d, f)
				p.Sysctl("ipv4/tcp_syn_retries", "4")
				l := p.Listen(kit.Proxy, at(f.wildcard, 15001))
				backlog := map[bool]int{false: 8, true: 64}[accepts]
				if err := unix.Listen(l.FD, backlog); err != nil {
					t.Fatal(err)
				}
				proxy := &standIn{listener: l, pod: p, level: f.level, done: make(chan struct{})}
				if accepts {
					go proxy.run()
				}
				clients := connectAtOnce(t, p, f, 1000)
				if !accepts {
					if n := pending(t, d, p); n != 4 {
						t.Errorf("%d handshakes are waiting, want 4", n)
					}
					go proxy.run()
				}
				arrived, refusals := fates(t, clients)
				t.Logf("%d arrived, %d were refused", arrived, refusals)
				if refusals == 0 && !accepts || arrived == 0 {
					t.Error("the test shows nothing: the table was never full, or never usable")
				}
				wantStat(t, d, p, "refused-table-full", refusals)
				kit.Eventually(t, "the table is empty", func() bool {
					n, err := d.Handshakes()
					return err == nil && n == 0 && pending(t, d, p) == 0
				})
				worksAgain(t, p, f)
				if err := unix.Shutdown(l.FD, unix.SHUT_RDWR); err != nil {
					t.Error(err)
				}
				<-proxy.done
				if proxy.lost != 0 {
					t.Errorf("the proxy got %d connections without SO_ORIGINAL_DST", proxy.lost)
				}
			})
		}
	}
}

// worksAgain shows that a table that was full works like any other.
func worksAgain(t *testing.T, p *kit.Pod, f family) {
	t.Helper()
	for i := range 20 {
		to := ap(f.far, 2000+i)
		c, err := p.Dial(kit.App, f.socket, to, announcing(f)...)
		if err != nil {
			t.Fatal("afterwards:", err)
		}
		if got, err := told(c); err != nil || got != to.String() {
			t.Errorf("afterwards a dial to %v reaches %s, %v", to, got, err)
		}
		c.Close()
	}
}

// connectAtOnce begins n connects to as many destinations, from several
// threads. A connect that is refused at once is a nil in the answer.
func connectAtOnce(t *testing.T, p *kit.Pod, f family, n int) map[netip.AddrPort]*kit.Sock {
	t.Helper()
	const threads = 4
	clients := make(map[netip.AddrPort]*kit.Sock, n)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for thread := range threads {
		wg.Go(func() {
			for i := thread; i < n; i += threads {
				to := ap(f.far, 1000+i)
				c, err := begin(p.NS, kit.App, f, to, announcing(f)...)
				if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("connect to %v: %v", to, err)
				}
				mu.Lock()
				clients[to] = c
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return clients
}

// fates counts what became of the connects, and checks where they came to.
func fates(t *testing.T, clients map[netip.AddrPort]*kit.Sock) (arrived, refusals int) {
	t.Helper()
	for to, c := range clients {
		err := error(unix.ECONNREFUSED)
		// A SYN that was dropped is sent again after 1, 3 and 7 seconds.
		for try := 0; c != nil && (try == 0 || try < 3 && errors.Is(err, unix.ETIMEDOUT)); try++ {
			err = finish(c)
		}
		if errors.Is(err, unix.ETIMEDOUT) {
			t.Fatalf("a dial to %v waits for ever", to) // the others would, too
		}
		if errors.Is(err, unix.ECONNREFUSED) {
			refusals++
			continue
		}
		got, err := told(c)
		if err != nil || got != to.String() {
			t.Errorf("a dial to %v reached %s, %v", to, got, err)
		}
		arrived++
		c.Close()
	}
	return arrived, refusals
}

func TestAPodThatUsesUpItsShareLeavesTheOthersAlone(t *testing.T) {
	opts := datapath.Options{Dir: filepath.Join(kit.BPFFS(t), "shares"), Cgroup: kit.Cgroup(t), Handshakes: 64}
	d := kit.OwnDatapath(t, opts)
	opts.Handshakes = 0 // whoever comes later need not know the size: a quarter of it stays a quarter
	again, err := datapath.Up(opts)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			greedy, other := handshakePod(t, d, f), handshakePod(t, d, f)
			greedy.Sysctl("ipv4/tcp_syn_retries", "4")
			fullBacklog(t, d, greedy, f, 0)
			var clients []*kit.Sock
			for range 100 {
				c, err := begin(greedy.NS, kit.App, f, ap(f.far, 80), announcing(f)...)
				if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
					t.Fatal(err)
				}
				if c != nil {
					clients = append(clients, c)
				}
			}
			if n := pending(t, d, greedy); n != 16 {
				t.Errorf("the pod holds %d handshakes, want its share of 16", n)
			}
			wantStat(t, d, greedy, "refused-table-full", 100-16)
			l := other.Listen(kit.Proxy, at(f.wildcard, 15001))
			for range 50 {
				captured(t, other, kit.App, f, ap(f.far, 80), announcing(f), l)
			}
			wantStat(t, d, other, "refused-table-full", 0)
			for _, c := range clients {
				c.Close()
			}
			if n := pending(t, d, greedy); n != 0 {
				t.Errorf("%d handshakes are left", n)
			}
		})
	}
}
