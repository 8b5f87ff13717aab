package netns

import (
	"bufio"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// proxyReady asks for capture from the proxy's first listener on.
func proxyReady(pod *datapath.Pod) { pod.Rules.From = rules.ProxyReady }

// wantCapture compares the state of the pod's capture.
func wantCapture(t *testing.T, d *datapath.Datapath, p *kit.Pod, want datapath.Capture, when string) {
	t.Helper()
	pods, err := d.Pods()
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range pods {
		if info.Cookie == p.Cookie() {
			if info.Capture != want {
				t.Errorf("%s capture is %q, want %q", when, info.Capture, want)
			}
			return
		}
	}
	t.Errorf("%s the pod is not enrolled", when)
}

// reachesDirectly dials the far server, which must accept it.
func reachesDirectly(t *testing.T, p *kit.Pod, f family, server *kit.Sock, when string) (client, accepted *kit.Sock) {
	t.Helper()
	client, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	accepted, err = server.Accept()
	if err != nil {
		t.Fatalf("%s, at the far server: %v", when, err)
	}
	kit.Exchange(t, client, accepted, 1<<12)
	return client, accepted
}

// isRefused dials, and neither reaches the far server nor anybody else.
func isRefused(t *testing.T, p *kit.Pod, f family, server *kit.Sock, when string) {
	t.Helper()
	if _, err := p.Dial(kit.App, f.socket, ap(f.far, 80)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%s the dial ends with %v, want ECONNREFUSED", when, err)
	}
	checkNothingReached(t, server)
}

// isCaptured dials, and the proxy learns where to.
func isCaptured(t *testing.T, p *kit.Pod, f family, proxy, server *kit.Sock, when string) {
	t.Helper()
	client, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	accepted := proxy.MustAccept()
	if got, err := accepted.OrigDst(f.level); err != nil || got != ap(f.far, 80) {
		t.Errorf("%s: SO_ORIGINAL_DST is %v, %v", when, got, err)
	}
	kit.Exchange(t, client, accepted, 1<<12)
	client.Close()
	accepted.Close()
	checkNothingReached(t, server)
}

// webServer serves content to whoever comes to port 81 of the far host.
func webServer(t *testing.T, p *kit.Pod, content []byte) {
	t.Helper()
	l := p.Far.Listen(kit.Root, "[::]:81")
	file := os.NewFile(uintptr(dup(t, l.FD)), "listener")
	defer file.Close()
	listener, err := net.FileListener(file)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: kit.Patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(content) // who reads it compares hashes
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
}

func dup(t *testing.T, fd int) int {
	t.Helper()
	copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return copied
}

// download fetches from the far host by HTTP, from a thread in the pod.
func download(t *testing.T, p *kit.Pod, id kit.ID, f family) [32]byte {
	t.Helper()
	s, err := p.Dial(id, f.socket, ap(f.far, 81))
	if err != nil {
		t.Fatal("download:", err)
	}
	file := os.NewFile(uintptr(dup(t, s.FD)), "client")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ap(f.far, 81).String()+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Close = true
	if err := request.Write(conn); err != nil {
		t.Fatal("download:", err)
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), request)
	if err != nil {
		t.Fatal("download:", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal("download:", err)
	}
	return sha256.Sum256(body)
}

// A pod's life in proxy-ready mode: istio-validation, an init container that
// downloads, a proxy that comes (as a native sidecar does, between two init
// containers), dies and comes back.
func TestInitContainersHaveANetworkUntilTheProxyListens(t *testing.T) {
	d := kit.Datapath(t)
	for i, f := range families[:2] {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			content := make([]byte, 4<<20)
			rand.Read(content)
			webServer(t, p, content)
			server := p.Far.Listen(kit.Root, "[::]:80")
			app := p.Listen(kit.App, at(f.wildcard, 8080))
			reachesDirectly(t, p, f, server, "without Sluice")
			direct(t, p, f, app, 8080)
			if download(t, p, kit.App, f) != sha256.Sum256(content) {
				t.Fatal("without Sluice the download is damaged")
			}

			p.Enroll(d, proxyReady)
			if err := validations[i].run(t, p, kit.Proxy, false); err != nil {
				t.Error("istio-validation:", err)
			}
			wantCapture(t, d, p, datapath.CaptureWaiting, "after istio-validation")
			for _, id := range []kit.ID{kit.App, kit.Root} {
				if download(t, p, id, f) != sha256.Sum256(content) {
					t.Error("the init container's download is damaged")
				}
			}
			if n := p.Stat(d, "direct-not-ready"); n != 2 {
				t.Errorf("direct-not-ready is %d, want 2", n)
			}
			if n := p.Stat(d, "guard-no-verdict"); n != 0 {
				t.Errorf("the guard stopped %d", n)
			}
			refused(t, p, f, 8080, "before the proxy listens")
			open, far := reachesDirectly(t, p, f, server, "before the proxy listens")

			proxy := p.Listen(kit.Proxy, "[::]:15001")
			wantCapture(t, d, p, datapath.CaptureReady, "now that the proxy listens")
			isCaptured(t, p, f, proxy, server, "the next init container")
			kit.Exchange(t, open, far, 1<<20) // and what was open stays open
			if open.Peer() != ap(f.far, 80) {
				t.Errorf("the open connection's peer became %v", open.Peer())
			}
			refused(t, p, f, 8080, "while nobody is on the inbound port")
			proxy.Close()
			isRefused(t, p, f, server, "once the proxy is dead")
			isCaptured(t, p, f, p.Listen(kit.Proxy, "[::]:15001"), server, "once it is back")
			untouched(t, app)
		})
	}
}

// sign is a socket of somebody, and whether it ends the wait for the proxy.
type sign struct {
	name    string
	id      kit.ID
	at      string
	options []kit.Option
	ends    bool
}

var signs = []sign{
	{"IPv4 wildcard", kit.Proxy, "0.0.0.0:15001", nil, true},
	{"IPv6 wildcard", kit.Proxy, "[::]:15001", nil, true},
	{"V6ONLY", kit.Proxy, "[::]:15001", []kit.Option{kit.V6Only}, true},
	{"MPTCP", kit.Proxy, "[::]:15001", []kit.Option{kit.MPTCP}, true},
	{"MPTCP, IPv4", kit.Proxy, "0.0.0.0:15001", []kit.Option{kit.MPTCP}, true},
	{"the pod's IPv4 address", kit.Proxy, "10.99.0.2:15001", nil, true},
	{"the pod's IPv6 address", kit.Proxy, "[fd99::2]:15001", nil, true},
	{"the pod's address, v4-mapped", kit.Proxy, "[::ffff:10.99.0.2]:15001", nil, true},
	{"an address that the pod has not", kit.Proxy, "10.1.2.3:15001", []kit.Option{kit.Set(unix.SOL_IP, unix.IP_FREEBIND, 1)}, true},
	{"the proxy's UID", kit.ProxyUID, "0.0.0.0:15001", nil, true},
	{"the proxy's GID", kit.ProxyGID, "0.0.0.0:15001", nil, true},
	{"a stranger", kit.App, "0.0.0.0:15001", nil, false},
	{"a stranger with MPTCP", kit.App, "[::]:15001", []kit.Option{kit.MPTCP}, false},
	{"root", kit.Root, "[::]:15001", nil, false},
	{"127.0.0.1", kit.Proxy, "127.0.0.1:15001", nil, false},
	{"127.0.0.1 with MPTCP", kit.Proxy, "127.0.0.1:15001", []kit.Option{kit.MPTCP}, false},
	{"127.0.0.1, v4-mapped", kit.Proxy, "[::ffff:127.0.0.1]:15001", nil, false},
	{"::1", kit.Proxy, "[::1]:15001", nil, false},
	{"the inbound port", kit.Proxy, "[::]:15006", nil, false},
	{"another port", kit.Proxy, "[::]:15090", nil, false},
}

func TestOnlyTheProxysOwnListenerEndsTheWait(t *testing.T) {
	d := kit.Datapath(t)
	needMPTCP(t)
	f := families[0]
	for _, before := range []bool{false, true} {
		for _, sign := range signs {
			t.Run(fmt.Sprintf("%s/before enrolment %v", sign.name, before), func(t *testing.T) {
				p := kit.NewPod(t)
				server := p.Far.Listen(kit.Root, "[::]:80")
				reachesDirectly(t, p, f, server, "without Sluice")
				if !before {
					p.Enroll(d, proxyReady)
					wantCapture(t, d, p, datapath.CaptureWaiting, "at first")
					reachesDirectly(t, p, f, server, "before anybody listens")
				}
				l := p.Listen(sign.id, sign.at, sign.options...)
				if before {
					p.Hold(sign.id, l)
					p.Enroll(d, proxyReady)
				}
				if !sign.ends {
					wantCapture(t, d, p, datapath.CaptureWaiting, "in the end")
					reachesDirectly(t, p, f, server, "in the end")
					return
				}
				wantCapture(t, d, p, datapath.CaptureReady, "in the end")
				// Captured; accepted or, where the listener is not for it, refused.
				if c, err := p.Dial(kit.App, f.socket, ap(f.far, 80)); err == nil {
					kit.Exchange(t, c, l.MustAccept(), 100)
				} else if !errors.Is(err, unix.ECONNREFUSED) {
					t.Error("in the end:", err)
				}
				checkNothingReached(t, server)
			})
		}
	}
}

// Envoy binds when it reads its configuration, and listens when it is warm.
func TestABoundSocketEndsTheWaitWhenItListens(t *testing.T) {
	d := kit.Datapath(t)
	for _, before := range []bool{false, true} {
		for name, options := range map[string][]kit.Option{"TCP": nil, "MPTCP": {kit.MPTCP}} {
			t.Run(fmt.Sprintf("%s/before enrolment %v", name, before), func(t *testing.T) {
				p, f := kit.NewPod(t), families[0]
				server := p.Far.Listen(kit.Root, "[::]:80")
				reachesDirectly(t, p, f, server, "without Sluice")
				if !before {
					p.Enroll(d, proxyReady)
				}
				bound, err := p.Socket(kit.Proxy, unix.AF_INET6, append(options, kit.Bind(netip.MustParseAddrPort("[::]:15001")))...)
				if err != nil {
					t.Fatal(err)
				}
				if before {
					p.Hold(kit.Proxy, bound)
					p.Enroll(d, proxyReady)
				}
				reachesDirectly(t, p, f, server, "while it does not listen")
				if err := unix.Listen(bound.FD, 8); err != nil {
					t.Fatal(err)
				}
				isCaptured(t, p, f, bound, server, "once it listens")
			})
		}
	}
}

// Where DNS is captured, it goes without the proxy too.
func TestDNSByTCPGoesDirectUntilTheProxyListens(t *testing.T) {
	d := kit.Datapath(t)
	p := kit.NewPod(t)
	server := p.Far.Listen(kit.Root, "[::]:53")
	dns := p.Listen(kit.Proxy, "127.0.0.1:15053")
	dial := func(listener *kit.Sock, when string) {
		t.Helper()
		client, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 53))
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		kit.Exchange(t, client, listener.MustAccept(), 100)
	}
	dial(server, "without Sluice")
	p.Enroll(d, proxyReady, func(pod *datapath.Pod) { pod.Rules.DNS = true })
	dial(server, "before")
	p.Listen(kit.Proxy, "[::]:15001")
	dial(dns, "after")
	checkNothingReached(t, server)
}
