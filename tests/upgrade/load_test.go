//go:build sluice_failpoints

package upgrade

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// load connects by every way of some worlds without end, and keeps one connection
// of each open all the time.
type load struct {
	t       *testing.T
	worlds  []*world
	stop    atomic.Bool
	clients sync.WaitGroup
	began   time.Time
	rest    time.Duration // between two connections of a client

	done, failed, escaped atomic.Int64

	mu     sync.Mutex
	errs   []error // the first few
	opened []opened
}

// opened is a connection that stays.
type opened struct {
	way
	fd int
}

// startLoad begins; each way has one client, and there is no rest between two of
// its connections.
func startLoad(t *testing.T, worlds ...*world) *load {
	t.Helper()
	return start(t, 0, worlds)
}

// startGentleLoad leaves the machine to others most of the time.
func startGentleLoad(t *testing.T, worlds ...*world) *load {
	t.Helper()
	return start(t, 5*time.Millisecond, worlds)
}

func start(t *testing.T, rest time.Duration, worlds []*world) *load {
	t.Helper()
	l := &load{t: t, worlds: worlds, began: time.Now(), rest: rest}
	for _, w := range worlds {
		w.each(func(way way) error {
			fd, err := way.connect()
			if err == nil {
				err = way.ask(fd, 0)
				l.opened = append(l.opened, opened{way, fd})
			}
			return err
		})
	}
	t.Cleanup(func() {
		l.end()
		for _, o := range l.opened {
			unix.Close(o.fd)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	for _, w := range worlds {
		for _, way := range w.ways {
			l.clients.Go(func() { _ = way.from.As(way.id, func() error { l.run(way); return nil }) })
		}
	}
	return l
}

func (l *load) run(w way) {
	for n := uint64(1); !l.stop.Load(); n++ {
		err := w.once(n)
		l.done.Add(1)
		if err != nil {
			l.note(w, err)
		}
		time.Sleep(l.rest)
	}
}

func (l *load) note(w way, err error) {
	if errors.Is(err, errEscaped) {
		l.escaped.Add(1)
	} else {
		l.failed.Add(1)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	const enough = 10
	if len(l.errs) < enough {
		l.errs = append(l.errs, errors.Join(errors.New(w.name), err))
	}
}

// goOn waits until some more connections have been made.
func (l *load) goOn(more int64) {
	l.t.Helper()
	want := l.done.Load() + more
	kit.Eventually(l.t, "the clients connect", func() bool { return l.done.Load() >= want })
}

func (l *load) end() {
	l.stop.Store(true)
	l.clients.Wait()
}

// wantNone ends the load and wants nothing failed and nothing escaped, also of
// the connections that were open all the time.
func (l *load) wantNone() {
	l.t.Helper()
	l.end()
	took := time.Since(l.began)
	l.openStill()
	l.t.Logf("%d connections, %.0f per second: %d failed, %d escaped", l.done.Load(), float64(l.done.Load())/took.Seconds(), l.failed.Load(), l.escaped.Load())
	if l.failed.Load()+l.escaped.Load() > 0 {
		l.t.Errorf("%d failed, %d escaped; the first of them: %v", l.failed.Load(), l.escaped.Load(), errors.Join(l.errs...))
	}
	for _, w := range l.worlds {
		if n := w.escaped.Load(); n > 0 {
			l.t.Errorf("%d connections have reached an app", n)
		}
	}
}

// openStill asks on the connections that have been open since the beginning: the
// proxy asks for their destination again.
func (l *load) openStill() {
	l.t.Helper()
	for _, o := range l.opened {
		if err := o.ask(o.fd, 2); err != nil {
			l.t.Errorf("open since the beginning, %s: %v", o.name, err)
		}
	}
}
