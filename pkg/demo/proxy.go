package demo

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// haproxyConfig listens as Envoy does. "option transparent" makes HAProxy ask
// with SO_ORIGINAL_DST where a connection was going, and go there. It calls the
// app from 127.0.0.6 or ::6, as Envoy does; 127.0.0.6 can be bound as it is.
const haproxyConfig = `global
  log stdout format raw local0
  maxconn 100
  nbthread 1
defaults
  mode tcp
  log global
  timeout connect 2s
  timeout client 5s
  timeout server 5s
frontend outbound
  bind 0.0.0.0:15001
  default_backend original
  log-format "outbound %[src] %[src_port] %[dst] %[dst_port] %U %B"
frontend inbound4
  bind 0.0.0.0:15006
  default_backend app4
  log-format "inbound %[src] %[src_port] %[dst] %[dst_port] %U %B"
backend original
  option transparent
backend app4
  option transparent
  source 127.0.0.6
`

// haproxyConfig6 is the same for IPv6, except that on port 15001 of IPv6 there
// is the helper, which hands connections on to port 15101: see RunHelper.
const haproxyConfig6 = `frontend outbound6
  bind [::1]:15101 accept-proxy
  default_backend original
  log-format "outbound %[src] %[src_port] %[dst] %[dst_port] %U %B"
frontend inbound6
  bind [::]:15006 v6only
  default_backend app6
  log-format "inbound %[src] %[src_port] %[dst] %[dst_port] %U %B"
backend app6
  option transparent
  source ipv6@[::6]
`

const (
	helperListens = "[::]:15001"
	helperHandsTo = "[::1]:15101"
)

// carried is a line of HAProxy's log: a connection that it has closed.
type carried struct {
	Inbound  bool
	Src, Dst netip.AddrPort // the client, and where it meant to go
	Up, Down int            // bytes
}

func parseCarried(line string) (carried, error) {
	var way, src, dst string
	var srcPort, dstPort uint16
	var c carried
	if _, err := fmt.Sscan(line, &way, &src, &srcPort, &dst, &dstPort, &c.Up, &c.Down); err != nil {
		return carried{}, fmt.Errorf("%q is not a connection: %w", line, err)
	}
	from, err := netip.ParseAddr(src)
	if err != nil {
		return carried{}, err
	}
	to, err := netip.ParseAddr(dst)
	if err != nil {
		return carried{}, err
	}
	c.Inbound = way == "inbound"
	c.Src, c.Dst = netip.AddrPortFrom(from, srcPort), netip.AddrPortFrom(to, dstPort)
	return c, nil
}

// proxy is a HAProxy that runs, or has run, in a pod, with its helper.
type proxy struct {
	*process
	helper *process // nil without IPv6
	log    journal[carried]
}

// stop ends both; it is idempotent.
func (p *proxy) stop() {
	if p.helper != nil {
		p.helper.stop()
	}
	p.process.stop()
}

// startProxy starts HAProxy as the mesh's proxy: UID and GID 1337, without any
// capability. It returns when all listeners are open.
func (n *node) startProxy(ctx context.Context, at *pod) (*proxy, error) {
	config := filepath.Join(n.cfg.Dir, "haproxy.cfg")
	text, listeners := haproxyConfig, 2
	if n.ipv6 {
		text, listeners = text+haproxyConfig6, 4
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	p := &proxy{}
	record := func(line []byte) {
		if c, err := parseCarried(string(line)); err == nil {
			p.log.add(c)
		}
	}
	as := place{at.ns, rules.DefaultProxyID}
	var err error
	if p.process, err = n.start(as, record, n.cfg.Tools.HAProxy, "-db", "-f", config); err != nil {
		return nil, err
	}
	n.later(p.stop)
	if n.ipv6 {
		if p.helper, err = n.start(as, nil, n.self, "demo-role", "helper", helperListens, helperHandsTo); err != nil {
			return nil, err
		}
	}
	// Asking by connecting would send the proxy to itself: look instead.
	open := func() bool { return listening(p.cmd.Process.Pid) == listeners }
	poll(ctx, patience, func() bool { return open() || !p.running() })
	if !open() {
		p.stop()
		return nil, fmt.Errorf("HAProxy did not open its %d listeners: %s", listeners, p.complaint())
	}
	return p, nil
}

// listening counts the listeners on the proxy's ports in a process's namespace.
func listening(pid int) int {
	n := 0
	for _, table := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line) // sl local_address rem_address st ...
			const listen = "0A"
			if len(fields) < 4 || fields[3] != listen {
				continue
			}
			_, hex, _ := strings.Cut(fields[1], ":")
			port, err := strconv.ParseUint(hex, 16, 16)
			if err == nil && (port == rules.DefaultOutboundPort || port == rules.DefaultInboundPort) {
				n++
			}
		}
	}
	return n
}

// identity says who a process is, from what the kernel shows of it.
func identity(pid int) string {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return "gone"
	}
	value := func(key string) []string {
		_, rest, _ := bytes.Cut(status, []byte("\n"+key+":"))
		line, _, _ := bytes.Cut(rest, []byte("\n"))
		return strings.Fields(string(line))
	}
	uids, gids, caps := value("Uid"), value("Gid"), "no capabilities"
	for _, set := range []string{"CapPrm", "CapEff", "CapAmb"} {
		if got := strings.Join(value(set), ""); strings.Trim(got, "0") != "" {
			caps = set + " " + got
		}
	}
	if len(uids) == 0 || len(gids) == 0 {
		return "gone"
	}
	return fmt.Sprintf("UID %s, GID %s, %s", uids[0], gids[0], caps)
}

// addProxySource gives lo the address ::6, from which the proxy calls the app.
// Istio does the same: unlike 127.0.0.6, it cannot be bound without.
func addProxySource(ns *netns.NetNS) error {
	return addAddress(ns, "lo", netip.MustParsePrefix("::6/128"))
}
