package netns

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// needTools skips where a package is not installed, and fails in CI.
func needTools(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv(kit.RequireRootEnv) == "1" {
				t.Fatalf("%v (hack/deps.sh test installs it)", err)
			}
			t.Skip(err)
		}
	}
}

// inPod runs a program in the pod as the app, with an /etc/resolv.conf of its own
// that names these servers.
func inPod(t *testing.T, p *kit.Pod, servers []netip.Addr, command ...string) (string, error) {
	t.Helper()
	var conf strings.Builder
	for _, s := range servers {
		fmt.Fprintln(&conf, "nameserver", s)
	}
	conf.WriteString("options timeout:1 attempts:2\n")
	file := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(file, []byte(conf.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	const script = `mount --bind "$1" /etc/resolv.conf && shift && exec setpriv --reuid 1000 --regid 1000 --clear-groups "$@"`
	cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-c", script, "sh", file}, command...)...)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := p.Do(cmd.Start); err != nil { // a child is in the namespace of the thread that makes it
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("%v: %w: %s%s", command, err, &out, &stderr)
	}
	return out.String(), nil
}

// muslResolver compiles testdata/resolve.c with musl's C library.
func muslResolver(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice-test-musl-") // the app may not look into t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "resolve")
	out, err := exec.Command("musl-gcc", "-static", "-o", program, "testdata/resolve.c").CombinedOutput()
	if err != nil {
		t.Fatalf("musl-gcc: %v\n%s", err, out)
	}
	return program
}

// The resolvers that programs have, with whichever servers: each finds the
// answers of the far host's servers, enrolled those of the DNS proxy.
func TestDNSOfRealResolvers(t *testing.T) {
	needTools(t, "getent", "musl-gcc", "unshare", "setpriv", "mount")
	d := kit.Datapath(t)
	resolve := muslResolver(t)
	resolvers := map[string][]string{
		"glibc": {"getent", "-s", "hosts:dns", "ahosts", "who.test"},
		"musl":  {resolve, "who.test"},
	}
	p := newDNSPod(t)
	for _, enrolled := range []bool{false, true} {
		want := farServer
		if enrolled {
			enrollDNS(p, d)
			startDNSProxy(t, p)
			want = proxyServer
		}
		for servers, list := range map[string][]netip.Addr{
			"one by IPv4": servers4[:1], "one by IPv6": servers6[:1], "three by IPv4": servers4, "three by IPv6": servers6,
			"both": {servers4[0], servers6[0]},
		} {
			for name, command := range resolvers {
				t.Run(fmt.Sprintf("%s, %s, enrolled %v", name, servers, enrolled), func(t *testing.T) {
					before := p.Stat(d, "captured-dns")
					out, err := inPod(t, p, list, command...)
					if err != nil {
						t.Fatal(err)
					}
					if found := foundIn(out); len(found) == 0 || slices.ContainsFunc(found, func(a netip.Addr) bool { return a != want.v4 && a != want.v6 }) {
						t.Errorf("it finds %v, want the addresses of %s", found, want.name)
					}
					if captured := p.Stat(d, "captured-dns") > before; captured != enrolled {
						t.Errorf("captured: %v", captured)
					}
				})
			}
		}
	}
}

// foundIn are the addresses at the beginnings of lines.
func foundIn(text string) []netip.Addr {
	var out []netip.Addr
	for line := range strings.Lines(text) {
		word, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if a, err := netip.ParseAddr(word); err == nil && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// Go's own resolver: a connected socket, or TCP for what is too long.
func TestDNSOfGosResolver(t *testing.T) {
	d := kit.Datapath(t)
	p := newDNSPod(t)
	for _, enrolled := range []bool{false, true} {
		want := farServer
		if enrolled {
			enrollDNS(p, d)
			startDNSProxy(t, p)
			want = proxyServer
		}
		for _, server := range []netip.AddrPort{ap(kit.Far4, 53), ap(kit.Far6, 53)} {
			r := net.Resolver{PreferGo: true, Dial: func(_ context.Context, network, _ string) (conn net.Conn, err error) {
				err = p.As(kit.App, func() error {
					conn, err = net.Dial(network, server.String())
					return err
				})
				return conn, err
			}}
			found, err := r.LookupNetIP(t.Context(), "ip", "who.test.")
			if err != nil {
				t.Fatal(err)
			}
			if len(found) != 2 || !slices.Contains(found, want.v4) || !slices.Contains(found, want.v6) {
				t.Errorf("enrolled %v, server %v: found %v, want the addresses of %s", enrolled, server, found, want.name)
			}
			long, err := r.LookupTXT(t.Context(), "4096.big.test.")
			if err != nil || long[0] != want.name || len(long) < 10 {
				t.Errorf("enrolled %v, server %v: %d records, %v", enrolled, server, len(long), err)
			}
		}
	}
}

// dig checks that an answer is from the server it asked.
func TestDNSOfDig(t *testing.T) {
	needTools(t, "dig", "unshare", "setpriv", "mount")
	d := kit.Datapath(t)
	p := newDNSPod(t)
	for _, enrolled := range []bool{false, true} {
		want := "far"
		if enrolled {
			enrollDNS(p, d)
			startDNSProxy(t, p)
			want = "proxy"
		}
		for _, server := range []netip.Addr{kit.Far4, kit.Far6} {
			source := map[bool]netip.Addr{true: kit.Pod4, false: kit.Pod6}[server.Is4()]
			for name, options := range map[string][]string{
				"UDP":                {"+notcp", "+ignore", "who.test"},
				"TCP":                {"+tcp", "who.test"},
				"a long answer":      {"+notcp", "+ignore", "+bufsize=4096", "3000.big.test"},
				"truncated, by TCP":  {"+bufsize=1232", "3000.big.test"},
				"TCP, long":          {"+tcp", "60000.big.test"},
				"the pod's address":  {"+notcp", "-b", source.String(), "who.test"},
				"TCP, pod's address": {"+tcp", "-b", source.String(), "who.test"},
			} {
				t.Run(fmt.Sprintf("%s, %v, enrolled %v", name, server, enrolled), func(t *testing.T) {
					command := append([]string{"dig", "@" + server.String(), "-t", "TXT", "+short", "+tries=1", "+time=5"}, options...)
					out, err := inPod(t, p, []netip.Addr{server}, command...)
					if err != nil {
						t.Fatal(err)
					}
					if !strings.HasPrefix(out, `"`+want+`"`) {
						t.Errorf("it prints %.200q, want %q first", out, want)
					}
					if strings.Contains(options[len(options)-1], "big") && len(out) < 2500 {
						t.Errorf("it prints %d bytes only", len(out))
					}
				})
			}
		}
	}
}
