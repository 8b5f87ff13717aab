package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

func haproxySections() []section {
	return []section{{name: "haproxy", workloads: []string{"haproxy_keepalive", "haproxy_close"}, quick: -1, full: 4, open: openHAProxy}}
}

// via is the header that the pod's HAProxy puts into what passes it.
const via = "Via-Sidecar"

// haproxyCommon begins both configurations.
const haproxyCommon = `global
  nbthread 1
  maxconn 1000
defaults
  mode http
  timeout connect 5s
  timeout client 10s
  timeout server 10s
`

// haproxyPod is the sidecar. "option transparent" makes it ask with
// SO_ORIGINAL_DST where a connection was going, and go there; without redirection
// its server has to be named.
const haproxyPod = haproxyCommon + `frontend outbound
  bind 0.0.0.0:15001
  http-response set-header ` + via + ` 1
  default_backend original
backend original
  %s
`

const haproxyFar = haproxyCommon + `frontend web
  bind 0.0.0.0:80
  http-request return status 200 content-type text/plain string ok
`

var webServer = netip.AddrPortFrom(farPrefix.Addr(), 80)

// openHAProxy: requests through a real proxy to a far server, from wrk.
func openHAProxy(s *stage) ([]workload, error) {
	for _, command := range []string{"haproxy", "wrk"} {
		if _, err := find(command); err != nil {
			s.leaveOut("haproxy_keepalive, haproxy_close", err)
			return nil, nil
		}
	}
	dir, err := os.MkdirTemp("", "sluice-bench-haproxy-")
	if err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	s.closing(func() error { return os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // the proxy is not root
		return nil, fmt.Errorf("open a directory: %w", err)
	}
	defs := of(definitions(), floor, rival, ours)
	sites := fleet{}
	s.closing(sites.Close)
	var names []string
	for _, def := range defs {
		b, err := s.start(def, world{rules: rules.Default(), noWork: true})
		if err == nil {
			sites[def.name] = b
			err = s.haproxies(b, dir)
		}
		if err != nil && def.role == rival {
			s.leaveOut(def.name, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		names = append(names, def.name)
	}
	with := func(name, header string) workload {
		return workload{name: name, backends: names, rounds: 3, cold: true, ratios: throughputRatios(rate), slice: func(name string) (sample, error) {
			return s.wrk(sites[name], header)
		}}
	}
	return []workload{with("haproxy_keepalive", "Connection: keep-alive"), with("haproxy_close", "Connection: close")}, nil
}

// webTarget is what a client in the pod asks.
func (b *backend) webTarget() netip.AddrPort {
	if b.redirects() {
		return webServer
	}
	return netip.MustParseAddrPort("127.0.0.1:15001")
}

// haproxies starts a proxy in the pod and a server far away, and sees by the
// proxy's header that requests pass it, or do not where nothing redirects.
func (s *stage) haproxies(b *backend, dir string) error {
	backend := "option transparent"
	if !b.redirects() {
		backend = "server far " + webServer.String()
	}
	for _, p := range []struct {
		name, config string
		ns           *netns.NetNS
		id           uint32
	}{{"pod", fmt.Sprintf(haproxyPod, backend), b.site.pod, proxyID}, {"far", haproxyFar, b.site.far, 0}} {
		path := filepath.Join(dir, b.name+"-"+p.name+".cfg")
		if err := os.WriteFile(path, []byte(p.config), 0o644); err != nil {
			return fmt.Errorf("configure HAProxy: %w", err)
		}
		cmd := exec.CommandContext(s.ctx, "haproxy", "-db", "-f", path)
		if err := s.inPod(cmd, b, p.ns, p.id); err != nil {
			return err
		}
		s.closing(func() error { _ = cmd.Process.Kill(); _ = cmd.Wait(); return nil }) // killed, as it is to be
	}
	app, err := s.worker(b.name+"/web", b.site.pod, s.cgroupOf(b), appID)
	if err != nil {
		return err
	}
	s.closing(app.Close)
	deadline := time.Now().Add(20 * time.Second)
	for {
		through, err := passes(app, b.webTarget())
		if err == nil && !through {
			return fmt.Errorf("backend %s: requests to %s do not pass the proxy", b.name, b.webTarget())
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("backend %s: ask through HAProxy: %w", b.name, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if b.redirects() {
		return nil
	}
	through, err := passes(app, webServer)
	if err != nil {
		return fmt.Errorf("backend %s: ask without the proxy: %w", b.name, err)
	}
	if through {
		return fmt.Errorf("backend %s: nothing should redirect requests to %s, but they pass the proxy", b.name, webServer)
	}
	return nil
}

// passes asks once from within the pod whether the proxy was passed.
func passes(app *process, to netip.AddrPort) (bool, error) {
	r, err := app.call(job{Kind: jobGet, Addr: to})
	if err == nil && r.Failure != "" {
		err = errors.New(r.Failure)
	}
	return r.Done > 0, err
}

// inPod starts a command where a backend's processes are.
func (s *stage) inPod(cmd *exec.Cmd, b *backend, ns *netns.NetNS, id uint32) error {
	cgroup := s.node.plain
	if ns == b.site.pod {
		cgroup = s.cgroupOf(b)
	}
	dir, err := os.Open(cgroup)
	if err != nil {
		return fmt.Errorf("open a cgroup: %w", err)
	}
	defer dir.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Setpgid: true, Credential: &syscall.Credential{Uid: id, Gid: id}}
	if err := ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("run %s: %w", cmd.Path, err)
	}
	return nil
}

var (
	wrkRate   = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	wrkP99    = regexp.MustCompile(`\s99%\s+([0-9.]+)(us|ms|s)`)
	wrkErrors = regexp.MustCompile(`(Socket errors|Non-2xx).*`)
)

// wrk loads the proxy for a second.
func (s *stage) wrk(b *backend, header string) (sample, error) {
	var out, complaint strings.Builder
	cmd := exec.CommandContext(s.ctx, "wrk", "-t1", "-c16", "-d1s", "--latency", "-H", header, "http://"+b.webTarget().String()+"/")
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := s.inPod(cmd, b, b.site.pod, appID); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("wrk: %w: %s", err, strings.TrimSpace(complaint.String()))
	}
	return parseWrk(out.String())
}

// parseWrk reads what wrk prints: requests per second, and the 99th percentile as
// the total's only sample.
func parseWrk(text string) (sample, error) {
	if complaint := wrkErrors.FindString(text); complaint != "" {
		return nil, errors.New("wrk: " + complaint)
	}
	perSecond, slowest := wrkRate.FindStringSubmatch(text), wrkP99.FindStringSubmatch(text)
	if perSecond == nil || slowest == nil {
		return nil, fmt.Errorf("wrk printed neither rate nor latency:\n%s", text)
	}
	n, err := strconv.ParseFloat(perSecond[1], 64)
	if err != nil {
		return nil, fmt.Errorf("wrk: %w", err)
	}
	took, err := time.ParseDuration(slowest[1] + slowest[2])
	if err != nil {
		return nil, fmt.Errorf("wrk: %w", err)
	}
	return sample{rate: {n}, p99: {float64(took)}}, nil
}
