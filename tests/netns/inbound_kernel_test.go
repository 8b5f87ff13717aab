package netns

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// proxyOf opens a listener of either kind: TCP's, and MPTCP's, which only the TC
// program can steer to.
var proxyOf = map[string]func(p *kit.Pod) *kit.Sock{
	"TCP":   func(p *kit.Pod) *kit.Sock { return p.Listen(kit.Proxy, "[::]:15006") },
	"MPTCP": func(p *kit.Pod) *kit.Sock { return p.Listen(kit.Proxy, "[::]:15006", kit.MPTCP) },
}

func eachProxy(t *testing.T, run func(*testing.T, datapath.Inbound, family, func(*kit.Pod) *kit.Sock)) {
	for _, way := range inboundWays {
		for name, open := range proxyOf {
			if name == "MPTCP" && way != datapath.InboundTC {
				continue
			}
			for _, f := range families {
				t.Run(fmt.Sprint(way, "/", name, "/", f.name), func(t *testing.T) { run(t, way, f, open) })
			}
		}
	}
}

// procNet reads a file of /proc/net as the namespace sees it.
func procNet(t *testing.T, ns *kit.NS, name string) string {
	t.Helper()
	var text []byte
	err := ns.Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/" + name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// inTimeWait says whether the namespace has a connection of these ports in
// TIME_WAIT.
func inTimeWait(t *testing.T, ns *kit.NS, local, remote int) bool {
	t.Helper()
	for line := range strings.Lines(procNet(t, ns, "tcp") + procNet(t, ns, "tcp6")) {
		fields := strings.Fields(line)
		if len(fields) > 3 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", local)) &&
			strings.HasSuffix(fields[2], fmt.Sprintf(":%04X", remote)) && fields[3] == "06" {
			return true
		}
	}
	return false
}

const fixedPort = 40000

// dialFrom dials the pod from always the same port.
func dialFrom(p *kit.Pod, f family, port int) (*kit.Sock, error) {
	return p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080),
		kit.Set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), kit.Bind(ap(f.far, port)))
}

// endByServer makes the server close first: it keeps the TIME_WAIT.
func endByServer(t *testing.T, p *kit.Pod, client, accepted *kit.Sock) {
	t.Helper()
	kit.Exchange(t, client, accepted, 1<<12)
	accepted.Close()
	if n, err := unix.Read(client.FD, make([]byte, 1)); n != 0 || err != nil {
		t.Fatalf("the client reads %d bytes, %v; want the end", n, err)
	}
	client.Close()
	kit.Eventually(t, "the pod has a TIME_WAIT", func() bool { return inTimeWait(t, p.NS, 8080, fixedPort) })
}

func TestAClientThatReconnectsFromItsPortMeetsTheProxyAgain(t *testing.T) {
	d := kit.Datapath(t)
	eachProxy(t, func(t *testing.T, way datapath.Inbound, f family, open func(*kit.Pod) *kit.Sock) {
		p := kit.NewPod(t)
		app := p.Listen(kit.App, at(f.wildcard, 8080))
		for range 2 {
			client, err := dialFrom(p, f, fixedPort)
			if err != nil {
				t.Fatal("without Sluice:", err)
			}
			endByServer(t, p, client, app.MustAccept())
		}
		p.Enroll(d, inboundBy(way))
		proxy := open(p)
		// The first meets the app's TIME_WAIT, those after it the proxy's own.
		for i := range 3 {
			if !inTimeWait(t, p.NS, 8080, fixedPort) {
				t.Fatal("there is no TIME_WAIT to meet")
			}
			began := time.Now()
			client, err := dialFrom(p, f, fixedPort)
			if err != nil {
				t.Fatalf("reconnect %d: %v", i, err)
			}
			took := time.Since(began)
			t.Logf("reconnect %d took %v", i, took.Round(time.Millisecond))
			if took > 2500*time.Millisecond {
				t.Errorf("reconnect %d took %v", i, took)
			}
			accepted := proxy.MustAccept()
			checkInbound(t, f, client, accepted, 8080)
			endByServer(t, p, client, accepted)
		}
		untouched(t, app)
	})
}

// tcpExt reads a counter of the namespace.
func tcpExt(t *testing.T, ns *kit.NS, name string) string {
	t.Helper()
	var names []string
	for line := range strings.Lines(procNet(t, ns, "netstat")) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "TcpExt:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i := range names {
			if names[i] == name {
				return fields[i]
			}
		}
	}
	t.Fatalf("no %s in netstat", name)
	return ""
}

func TestInboundWorksWithSYNCookies(t *testing.T) {
	d := kit.Datapath(t)
	eachProxy(t, func(t *testing.T, way datapath.Inbound, f family, open func(*kit.Pod) *kit.Sock) {
		p := kit.NewPod(t)
		p.Sysctl("ipv4/tcp_syncookies", "2")
		app := p.Listen(kit.App, at(f.wildcard, 8080))
		direct(t, p, f, app, 8080)
		p.Enroll(d, inboundBy(way))
		refused(t, p, f, 8080, "without a proxy")
		proxy := open(p)
		const dials = 20
		for range dials {
			client, accepted := arrives(t, p, f, 8080, proxy)
			client.Close()
			accepted.Close()
		}
		client, err := p.Far.Dial(kit.Root, f.socket, ap(f.pod, 8080), kit.MPTCP)
		if err != nil {
			t.Fatal("an MPTCP client:", err)
		}
		accepted := proxy.MustAccept()
		checkInbound(t, f, client, accepted, 8080)
		kit.Exchange(t, client, accepted, 1<<16)
		for _, counter := range []string{"SyncookiesSent", "SyncookiesRecv"} {
			if got := tcpExt(t, p.NS, counter); got != fmt.Sprint(dials+2) {
				t.Errorf("%s is %s, want %d", counter, got, dials+2)
			}
		}
		if n := tcpExt(t, p.NS, "SyncookiesFailed"); n != "0" {
			t.Errorf("SyncookiesFailed is %s", n)
		}
		untouched(t, app)
	})
}

func TestOutboundWorksWithSYNCookies(t *testing.T) {
	d := kit.Datapath(t)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.Sysctl("ipv4/tcp_syncookies", "2")
			server := p.Far.Listen(kit.Root, at(f.wildcard, 80))
			c, err := p.Dial(kit.App, f.socket, ap(f.far, 80))
			if err != nil {
				t.Fatal("without Sluice:", err)
			}
			kit.Exchange(t, c, server.MustAccept(), 1<<10)
			p.Enroll(d)
			out, _ := proxyListeners(p)
			for range 20 {
				captured(t, p, kit.App, f, ap(f.far, 80), nil, out[f.wildcard])
			}
			if got := tcpExt(t, p.NS, "SyncookiesRecv"); got != "20" {
				t.Errorf("SyncookiesRecv is %s, want 20", got)
			}
			if n, err := d.HandshakeUse(p.Cookie()); err != nil || n != 0 {
				t.Errorf("%d handshakes are left, %v", n, err)
			}
			if _, err := server.AcceptWithin(0); !errors.Is(err, kit.ErrNobody) {
				t.Error("the far server got a connection behind the proxy's back")
			}
		})
	}
}
