//go:build sluice_failpoints

package upgrade

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// Who answers a request says so, and where it believes that the client was going.
const (
	byProxy = 'P'
	byApp   = 'A' // nobody was in between: outside the mesh, or escaped
	byWhom  = 'H' // of a server: a PROXY header says that a proxy was in between, and what it was told

	requestSize = 8                        // a number of the client's choice
	answerSize  = 1 + 16 + 2 + requestSize // who, destination, port, the number again
)

// world is a pod with a proxy, its app, and a far host, all answering requests.
type world struct {
	*kit.Pod
	t       *testing.T
	ways    []way
	end     atomic.Bool
	servers sync.WaitGroup
	escaped atomic.Int64 // connections that reached an app
}

// way is one way in which a connection of the pod is captured.
type way struct {
	name string
	from *kit.NS
	id   kit.ID
	to   netip.AddrPort
	bind netip.Addr // the client's choice of a source, if any
}

// server is one that answers in a world.
type server struct {
	in      *kit.NS
	id      kit.ID
	at      string
	who     byte
	options []kit.Option
}

// newWorld has a proxy that answers by itself; inbound are options of its listener
// for inbound.
func newWorld(t *testing.T, inbound ...kit.Option) *world {
	t.Helper()
	w := emptyWorld(t)
	w.start(append(w.apps(byApp),
		server{w.NS, kit.Proxy, "0.0.0.0:15001", byProxy, nil},
		server{w.NS, kit.Proxy, "[::]:15001", byProxy, []kit.Option{kit.V6Only}},
		server{w.NS, kit.Proxy, "0.0.0.0:15006", byProxy, inbound},
		server{w.NS, kit.Proxy, "[::]:15006", byProxy, append([]kit.Option{kit.V6Only}, inbound...)}))
	return w
}

// newHAProxyWorld has HAProxy, which goes on to whom was called; the servers see by
// its header that it was there. By IPv6 it does not ask where a connection was
// going, so there is no way out for it.
func newHAProxyWorld(t *testing.T) *world {
	t.Helper()
	w := emptyWorld(t)
	w.ways = slices.DeleteFunc(w.ways, func(way way) bool { return way.name == outbound6 })
	w.start(w.apps(byWhom))
	w.StartHAProxy(haproxy)
	return w
}

// haproxy goes to the original destination, which is what an address of zeros
// means to it. What it closes leaves no TIME_WAIT, of which there would be many.
const haproxy = `global
  maxconn 2000
  nbthread 1
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option nolinger
frontend by4
  bind 0.0.0.0:15001
  bind 0.0.0.0:15006
  default_backend to4
frontend by6
  bind [::]:15006 v6only
  default_backend to6
backend to4
  server called 0.0.0.0 send-proxy
backend to6
  server called [::] send-proxy
`

const outbound6 = "outbound by IPv6"

func emptyWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Pod: kit.NewPod(t), t: t}
	w.ways = []way{
		{name: "outbound by the address book", from: w.NS, id: kit.App, to: at(kit.Far4, 80)},
		{name: "outbound from a bound source", from: w.NS, id: kit.App, to: at(kit.Far4, 80), bind: kit.Pod4},
		{name: outbound6, from: w.NS, id: kit.App, to: at(kit.Far6, 80)},
		{name: "inbound", from: w.Far, id: kit.Root, to: at(kit.Pod4, 8080)},
		{name: "inbound by IPv6", from: w.Far, id: kit.Root, to: at(kit.Pod6, 8080)},
	}
	t.Cleanup(func() {
		w.end.Store(true)
		w.servers.Wait()
	})
	return w
}

// apps are the servers that the ways lead to.
func (w *world) apps(who byte) []server {
	return []server{
		{w.NS, kit.App, "0.0.0.0:8080", who, nil},
		{w.NS, kit.App, "[::]:8080", who, []kit.Option{kit.V6Only}},
		{w.Far, kit.Root, "0.0.0.0:80", who, nil},
		{w.Far, kit.Root, "[::]:80", who, []kit.Option{kit.V6Only}},
	}
}

func (w *world) start(servers []server) {
	for _, s := range servers {
		listener := s.in.Listen(s.id, s.at, s.options...)
		s.in.Hold(s.id, listener) // enrolment looks for it in the namespace's processes
		w.serve(listener.FD, s.who)
	}
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// serve answers on a listener until the world ends. It polls, for accept on an
// MPTCP listener heeds no SO_RCVTIMEO.
func (w *world) serve(listener int, who byte) {
	if err := unix.SetNonblock(listener, true); err != nil {
		w.t.Fatal(err)
	}
	for range 4 {
		w.servers.Go(func() {
			for !w.end.Load() {
				waiting := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
				if n, err := unix.Poll(waiting, shortTime); n == 0 || err != nil {
					continue
				}
				fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
				if err != nil {
					continue // another was faster
				}
				w.servers.Go(func() {
					defer unix.Close(fd)
					shortWait(fd)
					w.talk(fd, who)
				})
			}
		})
	}
}

// talk answers all requests of a connection.
func (w *world) talk(fd int, who byte) {
	told := func() netip.AddrPort { return originalDst(fd) } // asked for each request
	if who == byWhom {
		caller, dst, ok := w.caller(fd)
		if !ok {
			return // it ended before it said anything
		}
		who, told = caller, func() netip.AddrPort { return dst }
	}
	if who == byApp {
		w.escaped.Add(1)
	}
	for w.answer(fd, who, told) {
	}
}

// caller reads a PROXY header, if that is what comes first: who is byProxy, and
// dst what it was told. Requests are numbers below 2^56, so no request looks like one.
func (w *world) caller(fd int) (who byte, dst netip.AddrPort, ok bool) {
	const begins = 'P'
	first := make([]byte, 1)
	if n, err := w.receive(fd, first, unix.MSG_PEEK); err != nil || n == 0 {
		return 0, dst, false
	}
	if first[0] != begins {
		return byApp, nowhere, true
	}
	var line []byte
	for len(line) == 0 || line[len(line)-1] != '\n' {
		if n, err := w.receive(fd, first, 0); err != nil || n == 0 {
			return 0, dst, false
		}
		line = append(line, first[0])
	}
	var family, src, to string
	var port, srcPort uint16
	if _, err := fmt.Sscanf(string(line), "PROXY %s %s %s %d %d", &family, &src, &to, &srcPort, &port); err != nil {
		w.t.Errorf("a PROXY header %q: %v", line, err)
		return 0, dst, false
	}
	addr, err := netip.ParseAddr(to)
	if err != nil {
		w.t.Errorf("a PROXY header %q: %v", line, err)
	}
	return byProxy, netip.AddrPortFrom(addr, port), err == nil
}

// receive waits for what comes, or for the world's end.
func (w *world) receive(fd int, to []byte, flags int) (int, error) {
	for {
		n, _, err := unix.Recvfrom(fd, to, flags)
		if (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)) && !w.end.Load() {
			continue
		}
		return n, err
	}
}

// answer answers one request; false: there is no more to come.
func (w *world) answer(fd int, who byte, told func() netip.AddrPort) bool {
	var request [requestSize]byte
	for read := 0; read < requestSize; {
		n, err := w.receive(fd, request[read:], 0)
		if err != nil || n == 0 {
			return false
		}
		read += n
	}
	answer := make([]byte, 0, answerSize)
	answer = append(answer, who)
	dst := told()
	address := dst.Addr().As16()
	answer = append(answer, address[:]...)
	answer = binary.BigEndian.AppendUint16(answer, dst.Port())
	answer = append(answer, request[:]...)
	n, err := unix.SendmsgN(fd, answer, nil, nil, unix.MSG_NOSIGNAL)
	return err == nil && n == answerSize
}

// originalDst is what a proxy is told; nothing where it is told nothing.
func originalDst(fd int) netip.AddrPort {
	s := kit.Sock{FD: fd}
	for _, level := range []int{unix.SOL_IP, unix.SOL_IPV6} {
		if dst, err := s.OrigDst(level); err == nil {
			return dst
		}
	}
	return nowhere
}

var nowhere = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)

// shortTime, in milliseconds, is after what time a server looks for the world's end.
const shortTime = 100

func shortWait(fd int) {
	tv := unix.NsecToTimeval((shortTime * time.Millisecond).Nanoseconds())
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// errEscaped is returned where an app answered.
var errEscaped = errors.New("nobody was in between")

// connect makes a connection. Call it in the client's namespace as the client.
func (w way) connect() (fd int, err error) {
	family := unix.AF_INET
	if w.to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	tv := unix.NsecToTimeval((8 * kit.Patience).Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		// Closed by a RST, it leaves no TIME_WAIT, of which there would be many.
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
	)
	if err == nil && w.bind.IsValid() {
		// As glibc's and Go's users do who want no port to be reserved.
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
			unix.Bind(fd, &unix.SockaddrInet4{Addr: w.bind.As4()}))
	}
	if err != nil {
		return -1, fmt.Errorf("set the socket up: %w", err)
	}
	s := kit.Sock{FD: fd}
	if err := s.Connect(w.to); err != nil {
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

// ask sends a request and judges the answer: errEscaped if the wrong one answered.
func (w way) ask(fd int, number uint64) error {
	request := binary.BigEndian.AppendUint64(nil, number)
	if _, err := unix.SendmsgN(fd, request, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	var answer [answerSize]byte
	for read := 0; read < answerSize; {
		n, err := unix.Read(fd, answer[read:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return fmt.Errorf("read after %d bytes: %w", read, errors.Join(err, errors.New("the connection is at its end")))
		}
		read += n
	}
	if got := binary.BigEndian.Uint64(answer[answerSize-requestSize:]); got != number {
		return fmt.Errorf("the answer is to request %d, not %d", got, number)
	}
	if answer[0] == byApp {
		return errEscaped
	}
	dst := netip.AddrPortFrom(netip.AddrFrom16([16]byte(answer[1:17])).Unmap(), binary.BigEndian.Uint16(answer[17:19]))
	if dst != w.to {
		return fmt.Errorf("the proxy was told %s, and %s was called", dst, w.to)
	}
	return nil
}

// once makes one connection and asks once.
func (w way) once(number uint64) error {
	fd, err := w.connect()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return w.ask(fd, number)
}

// each runs a check of every way, as its client.
func (w *world) each(check func(way) error) {
	w.t.Helper()
	for _, way := range w.ways {
		if err := way.from.As(way.id, func() error { return check(way) }); err != nil {
			w.t.Errorf("%s: %v", way.name, err)
		}
	}
}

// provesDirect wants every way to lead to an app: there is no Sluice, and the
// test would see an escape.
func (w *world) provesDirect() {
	w.t.Helper()
	before := w.escaped.Load()
	w.each(func(way way) error {
		if err := way.once(1); !errors.Is(err, errEscaped) {
			return fmt.Errorf("without Sluice the app answers: %w", errors.Join(err, errors.New("it did not")))
		}
		return nil
	})
	if got := w.escaped.Load() - before; got != int64(len(w.ways)) {
		w.t.Errorf("the apps have seen %d connections, not %d", got, len(w.ways))
	}
	w.escaped.Store(0)
	if w.t.Failed() {
		w.t.FailNow()
	}
}
