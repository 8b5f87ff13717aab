package netns

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// proxiedPod is a pod in which the app has been reached directly, and which is
// enrolled now.
func proxiedPod(t *testing.T, d *datapath.Datapath, way datapath.Inbound, f family) (p *kit.Pod, app *kit.Sock) {
	t.Helper()
	p = kit.NewPod(t)
	app = p.Listen(kit.App, at(f.wildcard, 8080))
	direct(t, p, f, app, 8080)
	p.Enroll(d, inboundBy(way))
	return p, app
}

func TestWorkersThatCloseAndComeBackTakeEveryConnection(t *testing.T) {
	d := kit.Datapath(t)
	// Each line is what happens to the four workers, one after another: -N
	// closes worker N, +N opens it again.
	orders := map[string][]int{
		"the first goes":               {-1},
		"the last goes":                {-4},
		"the first goes and returns":   {-1, +1},
		"all but the last go":          {-1, -2, -3},
		"all but the first go":         {-4, -3, -2},
		"they go and return in a ring": {-1, +1, -2, +2, -3, +3, -4, +4},
		"all go and two return":        {-1, -2, -3, -4, +3, +1},
		"the old ones go last":         {-3, +3, -4, +4, -1, -2},
	}
	for _, way := range inboundWays {
		for _, f := range families {
			t.Run(fmt.Sprint(way, "/", f.name), func(t *testing.T) {
				p, app := proxiedPod(t, d, way, f)
				for name, order := range orders {
					workers := fourWorkers(p, kit.Proxy)
					for _, step := range order {
						if step < 0 {
							workers[-step-1].Close()
						} else {
							workers[step-1] = p.Listen(kit.Proxy, "[::]:15006", kit.ReusePort)
						}
					}
					if t.Failed() {
						t.Fatal("before: ", name)
					}
					for range 8 {
						client, accepted := arrives(t, p, f, 8080, workers...)
						client.Reset()
						accepted.Close()
					}
					for _, w := range workers {
						w.Close()
					}
					refused(t, p, f, 8080, name+", then all are closed:")
				}
				untouched(t, app)
			})
		}
	}
}

func TestAShutDownListenerIsReplacedByTheNext(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		for _, f := range families {
			t.Run(fmt.Sprint(way, "/", f.name), func(t *testing.T) {
				p, app := proxiedPod(t, d, way, f)
				old := p.Listen(kit.Proxy, "[::]:15006", kit.ReusePort)
				arrives(t, p, f, 8080, old)
				if err := unix.Shutdown(old.FD, unix.SHUT_RDWR); err != nil {
					t.Fatal("shutdown:", err)
				}
				refused(t, p, f, 8080, "with the listener shut down")
				arrives(t, p, f, 8080, p.Listen(kit.Proxy, "[::]:15006", kit.ReusePort))
				untouched(t, app)
			})
		}
	}
}

func TestAShutDownListenerThatListensAgainTakesConnections(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		t.Run(string(way), func(t *testing.T) {
			p, app := proxiedPod(t, d, way, families[0])
			l := p.Listen(kit.Proxy, "[::]:15006")
			for range 10 {
				if err := errors.Join(unix.Shutdown(l.FD, unix.SHUT_RDWR), unix.Listen(l.FD, 8)); err != nil {
					t.Fatal("shut down, and listen again:", err)
				}
			}
			arrives(t, p, families[0], 8080, l)
			untouched(t, app)
		})
	}
}

// Envoy binds when it reads its configuration, and listens when it is warm.
func TestASocketBoundBeforeEnrolmentThatListensLaterTakesConnections(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		for _, f := range families {
			t.Run(fmt.Sprint(way, "/", f.name), func(t *testing.T) {
				p := kit.NewPod(t)
				app := p.Listen(kit.App, at(f.wildcard, 8080))
				direct(t, p, f, app, 8080)
				bound, err := p.Socket(kit.Proxy, unix.AF_INET6, kit.With(func(fd int) error {
					return unix.Bind(fd, &unix.SockaddrInet6{Port: 15006})
				}))
				if err != nil {
					t.Fatal(err)
				}
				p.Hold(kit.Proxy, bound)
				p.Enroll(d, inboundBy(way))
				refused(t, p, f, 8080, "while it does not listen")
				if err := unix.Listen(bound.FD, 8); err != nil {
					t.Fatal(err)
				}
				arrives(t, p, f, 8080, bound)
				untouched(t, app)
			})
		}
	}
}

func TestEnrollingAPodWhoseProxyRunsRefusesNobody(t *testing.T) {
	d := kit.Datapath(t)
	for _, way := range inboundWays {
		for _, kind := range listenerKinds {
			if !kind.takes(way, families[0]) || !slices.Contains([]string{"wildcard dual-stack", "reuseport, 4 workers", "MPTCP"}, kind.name) {
				continue
			}
			t.Run(fmt.Sprint(way, "/", kind.name), func(t *testing.T) { enrolUnderFire(t, d, way, kind) })
		}
	}
}

// enrolUnderFire dials all the time while the pod is enrolled and un-enrolled.
func enrolUnderFire(t *testing.T, d *datapath.Datapath, way datapath.Inbound, kind listenerKind) {
	p := kit.NewPod(t)
	app := p.Listen(kit.App, "0.0.0.0:8080")
	direct(t, p, families[0], app, 8080)
	p.Hold(kit.Proxy, kind.open(p, kit.Proxy)...)
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- dialUntil(stop, p.Far) }()
	for range 3 {
		p.Enroll(d, inboundBy(way))
		if _, err := d.Unenroll(p.Cookie(), p.NetNS); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error("a dial during enrolment:", err)
	}
}

func dialUntil(stop <-chan struct{}, from *kit.NS) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		c, err := from.Dial(kit.Root, unix.AF_INET, ap(kit.Pod4, 8080))
		if err != nil {
			return err
		}
		c.Reset()
		// Nobody accepts, and a backlog holds 4096: not more in some seconds.
		time.Sleep(2 * time.Millisecond)
	}
}
