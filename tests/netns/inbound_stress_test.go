package netns

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// A pod that does what it can: while connections flow in both directions, other
// processes in it dial the proxy's ports and listen on them, and the proxy's
// workers close and return at any moment.
func TestAHostilePodTakesNothingAndConfusesNobody(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		t.Run(string(way), func(t *testing.T) {
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			p := kit.NewPod(t)
			app, server := p.Listen(kit.App, "[::]:8080"), p.Far.Listen(kit.Root, "[::]:80")
			for _, f := range families {
				direct(t, p, f, app, 8080)
				c, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
				if err != nil {
					t.Fatal("without Sluice:", err)
				}
				kit.Exchange(t, c, server.MustAccept(), 1<<10)
			}
			p.Enroll(d, inboundBy(way))
			s := &stress{t: t, p: p, reached: map[string]int{}, until: time.Now().Add(1500 * time.Millisecond)}
			s.run(seed)
			t.Log(s.reached)
			if !s.shown() {
				t.Errorf("only %v connections reached the proxy: the test shows little", s.reached)
			}
			untouched(t, app)
			untouched(t, server)
			kit.Eventually(t, "no handshake is left", func() bool { return pending(t, d, p) == 0 })
			l := p.Listen(kit.Proxy, "[::]:15006", kit.ReusePort)
			for _, f := range families {
				arrives(t, p, f, 8080, l)
			}
		})
	}
}

type stress struct {
	t       *testing.T
	p       *kit.Pod
	until   time.Time
	mu      sync.Mutex
	reached map[string]int // the proxy, by kind of dial
}

// goesOn: a busy machine takes longer to show as much.
func (s *stress) goesOn() bool {
	now := time.Now()
	return now.Before(s.until) || now.Before(s.until.Add(kit.Patience)) && !s.shown()
}

// shown: enough has reached the proxy to say something.
func (s *stress) shown() bool {
	const enough = 20
	s.mu.Lock()
	defer s.mu.Unlock()
	return min(s.reached["inbound"], s.reached["outbound"], s.reached["uncaptured"]) >= enough
}

func (s *stress) run(seed uint64) {
	var wg sync.WaitGroup
	start := func(part func(*rand.Rand)) {
		seed++
		random := rand.New(rand.NewPCG(seed, 0))
		wg.Go(func() {
			for s.goesOn() {
				part(random)
			}
		})
	}
	for _, port := range []int{15001, 15006} {
		start(func(r *rand.Rand) { s.worker(r, port) })
		start(func(r *rand.Rand) { s.worker(r, port) })
	}
	for range 2 {
		start(s.outbound)
		start(s.inbound)
		start(s.uncaptured)
	}
	start(s.stranger)
	wg.Wait()
}

// worker is one of the proxy's: it tells some clients what it knows, and goes.
func (s *stress) worker(r *rand.Rand, port int) {
	l, err := s.p.TryListen(kit.Proxy, at("[::]", port), kit.ReusePort)
	if err != nil {
		return // a stranger was first
	}
	defer l.Close()
	for range r.IntN(60) {
		c, err := l.AcceptWithin(20 * time.Millisecond)
		if err != nil {
			break
		}
		got, err := c.OrigDst(unix.SOL_IP)
		if err != nil {
			got, err = c.OrigDst(unix.SOL_IPV6)
		}
		answer := got.String()
		if err != nil {
			answer = "none"
		}
		_, _ = unix.Write(c.FD, []byte(answer))
		c.Close()
	}
	if r.IntN(2) == 0 {
		_ = unix.Shutdown(l.FD, unix.SHUT_RDWR)
	}
}

// dial wants the proxy to know exactly this destination, where it is reached at
// all: with no worker there, or one that goes, there is a refusal or a reset.
func (s *stress) dial(from *kit.NS, id kit.ID, family int, to netip.AddrPort, kind, want string, options ...kit.Option) {
	c, err := from.Dial(id, family, to, options...)
	if err != nil {
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ECONNRESET) {
			s.t.Errorf("%s to %v: %v", kind, to, err)
		}
		return
	}
	got, err := told(c)
	c.Reset()
	if err != nil {
		return
	}
	if got != want {
		s.t.Errorf("%s to %v: the proxy believes it went to %s, want %s", kind, to, got, want)
	}
	s.mu.Lock()
	s.reached[kind]++
	s.mu.Unlock()
}

func (s *stress) outbound(r *rand.Rand) {
	f := families[r.IntN(len(families))]
	to := ap(f.far, 1+r.IntN(14000))
	var options []kit.Option
	if r.IntN(2) == 0 {
		options = announcing(f)
	}
	s.dial(s.p.NS, kit.App, f.socket, to, "outbound", to.String(), options...)
}

func (s *stress) inbound(r *rand.Rand) {
	f := families[r.IntN(len(families))]
	to := ap(f.pod, 1+r.IntN(14000))
	s.dial(s.p.Far, kit.Root, f.socket, to, "inbound", to.String())
}

// uncaptured dials the proxy's ports without a connect that was captured.
func (s *stress) uncaptured(r *rand.Rand) {
	hosts := []string{"127.0.0.1", "127.0.0.9", fmt.Sprintf("127.%d.%d.%d", 128+r.IntN(64), r.IntN(256), 1+r.IntN(254)), kit.Pod4.String()}
	to := netip.MustParseAddrPort(at(hosts[r.IntN(len(hosts))], 15001+5*r.IntN(2)))
	want := to.String()
	if to.Port() == 15001 || to.Addr().As4()[0] == 127 && to.Addr().As4()[1] >= 128 {
		want = "none"
	}
	s.dial(s.p.NS, kit.App, unix.AF_INET, to, "uncaptured", want)
}

// stranger listens where the proxy should, for as long as it may, and must get
// nothing that came from the network.
func (s *stress) stranger(r *rand.Rand) {
	places := []string{"[::1]:15006", "127.0.0.1:15006", at(kit.Pod4.String(), 15006), "[" + kit.Pod6.String() + "]:15006"}
	l, err := s.p.TryListen(kit.App, places[r.IntN(len(places))], kit.ReusePort)
	if err != nil {
		return
	}
	defer l.Close()
	c, err := l.AcceptWithin(5 * time.Millisecond)
	if err != nil {
		return
	}
	if c.Peer().Addr() == kit.Far4 || c.Peer().Addr() == kit.Far6 {
		s.t.Errorf("a stranger on %v got a connection from %v", l.Name(), c.Peer())
	}
	c.Reset()
}
