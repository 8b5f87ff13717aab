package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

const (
	pollEvery = 2 * time.Millisecond
	patience  = 5 * time.Second // for anything that is waited for
)

// poll asks until done says yes. It says no when it gives up.
func poll(ctx context.Context, limit time.Duration, done func() bool) bool {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if done() {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-deadline.C:
			return done()
		case <-tick.C:
		}
	}
}

// journal is what a process has said so far.
type journal[T any] struct {
	mu    sync.Mutex
	items []T
}

func (j *journal[T]) add(item T) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.items = append(j.items, item)
}

// find returns the first item that is wanted.
func (j *journal[T]) find(wanted func(T) bool) (found T, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, item := range j.items {
		if wanted(item) {
			return item, true
		}
	}
	return found, false
}

func (j *journal[T]) count(wanted func(T) bool) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for _, item := range j.items {
		if wanted(item) {
			n++
		}
	}
	return n
}

// await waits for an item that is wanted.
func (j *journal[T]) await(ctx context.Context, wanted func(T) bool) (found T, ok bool) {
	poll(ctx, patience, func() bool {
		found, ok = j.find(wanted)
		return ok
	})
	return found, ok
}

// place is where a process runs, and as whom.
type place struct {
	ns  *netns.NetNS // nil: the node's
	uid uint32       // and GID; no capability unless it is 0
}

// process is a running program. Stop it.
type process struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer // to be read once it has ended
	ended  chan struct{}
}

// start runs a program in the demo's cgroup and calls line, if it is not nil,
// with each line of its output. The program ends at the latest with the node.
func (n *node) start(at place, line func([]byte), path string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(path, args...), ended: make(chan struct{})}
	p.cmd.Dir = "/"
	p.cmd.Stderr = &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:      true,
		UseCgroupFD: true,
		CgroupFD:    int(n.cgroup.Fd()),
		Credential:  &syscall.Credential{Uid: at.uid, Gid: at.uid},
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	run := p.cmd.Start
	if at.ns != nil {
		run = func() error { return at.ns.Do(p.cmd.Start) }
	}
	if err := run(); err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(path), err)
	}
	go func() {
		defer close(p.ended)
		for scan := bufio.NewScanner(out); scan.Scan(); {
			if line != nil {
				line(scan.Bytes())
			}
		}
		_ = p.cmd.Wait() // what it said counts, not how it ended
	}()
	return p, nil
}

// stop is idempotent and returns when the process is gone.
func (p *process) stop() {
	_ = p.cmd.Process.Kill() // gone already: just as well
	<-p.ended
}

func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// complaint is what an ended process said of its reasons.
func (p *process) complaint() string {
	text := strings.TrimSpace(p.stderr.String())
	if text == "" {
		return p.cmd.ProcessState.String()
	}
	return text
}

// server is a RunServer somewhere.
type server struct {
	*process
	said journal[served]
}

func (n *node) startServer(ctx context.Context, at place, listen ...string) (*server, error) {
	s := &server{}
	record := func(line []byte) {
		var e served
		if json.Unmarshal(line, &e) == nil {
			s.said.add(e)
		}
	}
	var err error
	if s.process, err = n.start(at, record, n.self, append([]string{"demo-role", "server"}, listen...)...); err != nil {
		return nil, err
	}
	n.later(s.stop)
	ready := func(e served) bool { return e.Ready }
	poll(ctx, patience, func() bool {
		_, ok := s.said.find(ready)
		return ok || !s.running()
	})
	if _, ok := s.said.find(ready); !ok {
		s.stop()
		return nil, fmt.Errorf("a server on %s did not start: %s", strings.Join(listen, " and "), s.complaint())
	}
	return s, nil
}

// client runs a RunClient and returns what it saw.
func (n *node) client(ctx context.Context, at place, addr string) called {
	n.calls++
	c := called{ID: fmt.Sprint(n.calls)}
	var answer []byte
	p, err := n.start(at, func(line []byte) { answer = bytes.Clone(line) }, n.self, "demo-role", "client", addr, c.ID)
	if err != nil {
		c.Error = err.Error()
		return c
	}
	if !poll(ctx, 3*callTimeout, func() bool { return !p.running() }) {
		p.stop()
		c.Error = "no answer in time"
		return c
	}
	if err := json.Unmarshal(answer, &c); err != nil {
		c.Error = p.complaint()
	}
	return c
}
