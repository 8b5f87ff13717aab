package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// target is how many connections one pod is to hold at once.
const target = 150_000

// spareFiles are descriptors that a process needs beside its connections.
const spareFiles = 64

func ceilingSections() []section {
	return []section{{name: "ceiling", workloads: []string{"ceiling4", "ceiling6"}, quick: -1, full: 1, open: openCeiling}}
}

// openCeiling: connections from one pod to distinct destinations, held until one
// fails. Each contestant has a namespace of its own and gives it back afterwards.
func openCeiling(s *stage) ([]workload, error) {
	// No memory cgroup: the tables are there before one could be, and what is put into
	// them is charged to who made them.
	m := &meter{}
	defs := append(of(definitions(), floor, ours), named(definitions(), "iptables-nft", "iptables-legacy")...)
	var out []workload
	for _, family := range []struct{ name, first string }{{"ceiling4", "10.0.0.1"}, {"ceiling6", "2001:db8:1::1"}} {
		first := netip.AddrPortFrom(netip.MustParseAddr(family.first), 80)
		out = append(out, workload{name: family.name, backends: namesOf(defs), rounds: 1, cold: true, ratios: ceilingRatios, slice: func(backend string) (sample, error) {
			return s.ceiling(m, named(defs, backend)[0], family.name, first)
		}})
	}
	return out, nil
}

func ceilingRatios(r *Result, m *measured) {
	r.set(m.workload.name+"_held", m.p50(sluice, held))
}

func (s *stage) ceiling(m *meter, def definition, name string, to netip.AddrPort) (_ sample, err error) {
	s.node.ipv6 = true
	defer func() { s.node.ipv6 = false }()
	b, err := s.start(def, world{rules: rules.Default(), noFar: true, ipv6: true})
	if err != nil {
		if def.role == floor || def.role == ours {
			return nil, err
		}
		s.leaveOut(def.name, err)
		return nil, nil
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	if err := b.prove(); err != nil {
		return nil, err
	}
	if !b.redirects() {
		to = netip.MustParseAddrPort("127.0.1.1:15001")
		if name == "ceiling6" {
			to = netip.MustParseAddrPort("[::1]:15001")
		}
	}
	before, err := m.read()
	if err != nil {
		return nil, err
	}
	h := holding{stage: s, backend: b, one: !b.redirects() && to.Addr().Is6()}
	defer func() { err = errors.Join(err, h.Close()) }()
	if err := h.many(to); err != nil {
		return nil, err
	}
	after, err := m.read()
	if err != nil {
		return nil, err
	}
	if h.failure != "" {
		s.result.Notes[name+", "+def.name] = fmt.Sprintf("ended at %d connections: %s", h.got, h.failure)
	}
	out := after.since(before, max(h.got, 1))
	out[held] = []float64{float64(h.got)}
	return out, nil
}

// holding is the connections that are held, and who holds them.
type holding struct {
	*stage
	*backend
	one     bool // there is one destination only
	running []*process
	got     int
	failure string // what ended it; empty: the target was reached
}

// Close gives the connections back.
func (h *holding) Close() error {
	var err error
	for _, p := range h.running {
		err = errors.Join(err, p.Close())
	}
	h.running = nil
	return err
}

// many opens connections with as many pairs of processes as the limit of open
// files asks for. The stand-in's processes share its listener.
func (h *holding) many(to netip.AddrPort) error {
	listener, err := h.listenerOf(to.Addr().Is6())
	if err != nil {
		return err
	}
	defer listener.Close()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	each := int(min(limit.Max-spareFiles, 40_000))
	for h.got < target && h.failure == "" {
		done, err := h.some(to, min(each, target-h.got), listener)
		if err != nil {
			return err
		}
		for i := 0; i < done && !h.one; i++ {
			to = netip.AddrPortFrom(to.Addr().Next(), to.Port())
		}
	}
	return nil
}

// some opens up to count connections by a pair of processes.
func (h *holding) some(to netip.AddrPort, count int, listener *os.File) (int, error) {
	cgroup := h.cgroupOf(h.backend)
	app, err := h.worker("app", h.site.pod, cgroup, appID)
	if err != nil {
		return 0, err
	}
	h.running = append(h.running, app)
	proxy, err := startWorker(h.ctx, "proxy", h.site.pod, cgroup, Identity{UID: proxyID, GID: proxyID, CPU: h.opts.CPU, Inherits: true}, listener)
	if err != nil {
		return 0, err
	}
	h.running = append(h.running, proxy)
	if err := proxy.send(job{Kind: jobServeHold, Addr: inherited, Count: count}); err != nil {
		return 0, err
	}
	held, err := app.call(job{Kind: jobHold, Addr: to, Count: count, Same: h.one})
	nextErr := proxy.send(job{Kind: jobNumber, Addr: inherited}) // it need not wait for more
	served, serveErr := proxy.receive()
	if err := errors.Join(err, nextErr, serveErr); err != nil {
		return 0, err
	}
	h.got += held.Done
	h.failure = held.Failure
	return held.Done, servedRight(h.backend, held, served)
}

// servedRight says whether the stand-in accepted all that the app holds, and was
// told the destination of each, or of none without redirection.
func servedRight(b *backend, held, served reply) error {
	answers := 0
	if b.redirects() {
		answers = served.Accepted
	}
	if served.Accepted < held.Done || served.Answered != answers {
		return fmt.Errorf("of %d connections %d were accepted, and SO_ORIGINAL_DST answered %d times, want %d (%s)", held.Done, served.Accepted, served.Answered, answers, served.Refused)
	}
	return nil
}

// listenerOf is the stand-in's listener on the outbound port, by a descriptor of
// our own.
func (b *backend) listenerOf(v6 bool) (*os.File, error) {
	at := outboundPort
	if v6 {
		at = outboundPort6
	}
	number, err := b.proxy.call(job{Kind: jobNumber, Addr: at})
	if err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(b.proxy.cmd.Process.Pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open the stand-in's process: %w", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, number.Done, 0)
	if err != nil {
		return nil, fmt.Errorf("take the stand-in's listener: %w", err)
	}
	return os.NewFile(uintptr(fd), "listener"), nil
}
