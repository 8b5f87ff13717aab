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
	defs := append(of(definitions(), floor, ours), named(definitions(), "iptables-nft", "iptables-legacy")...)
	var out []workload
	for _, family := range []struct{ name, first string }{{"ceiling4", "10.0.0.1"}, {"ceiling6", "2001:db8:1::1"}} {
		first := netip.AddrPortFrom(netip.MustParseAddr(family.first), 80)
		out = append(out, workload{name: family.name, backends: namesOf(defs), rounds: 1, cold: true, slice: func(backend string) (sample, error) {
			return s.ceiling(named(defs, backend)[0], family.name, first)
		}})
	}
	return out, nil
}

func (s *stage) ceiling(def definition, name string, to netip.AddrPort) (_ sample, err error) {
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
	before, err := kernelMemory()
	if err != nil {
		return nil, err
	}
	got, failure, err := s.holdMany(b, to, !b.redirects() && to.Addr().Is6())
	if err != nil {
		return nil, err
	}
	after, err := kernelMemory()
	if err != nil {
		return nil, err
	}
	if failure != "" {
		s.result.Notes[name+", "+def.name] = fmt.Sprintf("ended at %d connections: %s", got, failure)
	}
	return sample{held: {float64(got)}, memory: {(after - before) / float64(max(got, 1))}}, nil
}

// holdMany opens connections with as many pairs of processes as the limit of open
// files asks for. The stand-in's processes share its listener.
//
// One is true where there is one destination only.
func (s *stage) holdMany(b *backend, to netip.AddrPort, one bool) (got int, failure string, err error) {
	listener, err := s.listenerOf(b, to.Addr().Is6())
	if err != nil {
		return 0, "", err
	}
	defer listener.Close()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, "", fmt.Errorf("read the limit of open files: %w", err)
	}
	each := int(min(limit.Max-spareFiles, 40_000))
	cgroup := s.cgroupOf(b)
	var running []*process
	defer func() {
		for _, p := range running {
			err = errors.Join(err, p.Close())
		}
	}()
	for got < target && failure == "" {
		app, err := s.worker("app", b.site.pod, cgroup, appID)
		if err != nil {
			return got, "", err
		}
		running = append(running, app)
		proxy, err := startWorker(s.ctx, "proxy", b.site.pod, cgroup, Identity{UID: proxyID, GID: proxyID, CPU: s.opts.CPU, Inherits: true}, listener)
		if err != nil {
			return got, "", err
		}
		running = append(running, proxy)
		count := min(each, target-got)
		if err := proxy.send(job{Kind: jobServeHold, Addr: inherited, Count: count}); err != nil {
			return got, "", err
		}
		held, err := app.call(job{Kind: jobHold, Addr: to, Count: count, Same: one})
		served, serveErr := proxy.receive()
		if err := errors.Join(err, serveErr); err != nil {
			return got, "", err
		}
		got += held.Done
		failure = held.Failure
		if err := servedRight(b, held, served); err != nil {
			return got, "", err
		}
		for i := 0; i < held.Done && !one; i++ {
			to = netip.AddrPortFrom(to.Addr().Next(), to.Port())
		}
	}
	return got, failure, nil
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
func (s *stage) listenerOf(b *backend, v6 bool) (*os.File, error) {
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
