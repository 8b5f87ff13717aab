package oracle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// How long an answer may take: on a machine with much else to do, or where it
// may well never come.
const (
	patience   = 15 * time.Second
	vanishTime = 2 * time.Second // before ARP gives up
)

// client is a probe under way.
type client struct {
	probe
	fd      int
	out     outcome
	heard   []byte
	linked  bool // the connection stands
	waiting bool
	until   time.Time
}

// run carries out all probes at once.
func (s *site) run(probes []probe) (map[probe]outcome, error) {
	clients := make([]*client, len(probes))
	type who struct {
		place
		kit.ID
		twice bool
	}
	groups := map[who][]*client{}
	for i, p := range probes {
		clients[i] = &client{probe: p, fd: -1}
		key := who{p.From, p.ID, p.Then.IsValid()}
		groups[key] = append(groups[key], clients[i])
	}
	var work sync.WaitGroup
	errs := make(chan error, len(groups))
	for key, group := range groups {
		work.Go(func() {
			// The IDs are the thread's own. The sockets belong to them for good.
			errs <- s.at(key.place).As(key.ID, func() error {
				for _, c := range group {
					if key.twice {
						c.twice()
					} else {
						c.start(c.To)
					}
				}
				return nil
			})
		})
	}
	work.Wait()
	for range groups {
		if err := <-errs; err != nil {
			return nil, err
		}
	}
	if err := await(clients); err != nil {
		return nil, err
	}
	out := map[probe]outcome{}
	for _, c := range clients {
		out[c.probe] = c.out
	}
	return out, nil
}

// fail ends the probe.
func (c *client) fail(what string) {
	c.out.Result = what
	c.end()
}

func (c *client) end() {
	c.waiting = false
	if c.fd >= 0 { // with a RST, to leave no TIME_WAIT behind
		_ = unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(c.fd)
		c.fd = -1
	}
}

func (c *client) start(to netip.AddrPort) {
	if c.fd < 0 {
		if err := c.open(); err != nil {
			c.fail(errno(err))
			return
		}
	}
	c.waiting = true
	c.until = time.Now().Add(patience)
	if c.MayVanish {
		c.until = time.Now().Add(vanishTime)
	}
	var err error
	switch sa := sockaddr(c.family(), to); {
	case c.Sendto:
		err = unix.Sendto(c.fd, []byte("?"), 0, sa)
	case c.UDP:
		if err = unix.Connect(c.fd, sa); err == nil {
			_, err = unix.Write(c.fd, []byte("?"))
		}
	default:
		err = unix.Connect(c.fd, sa)
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		c.fail(errno(err))
	}
}

func (c *client) open() (err error) {
	kind := unix.SOCK_STREAM
	if c.UDP {
		kind = unix.SOCK_DGRAM
	}
	if c.fd, err = unix.Socket(c.family(), kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return err
	}
	if c.family() == unix.AF_INET6 {
		err = unix.SetsockoptInt(c.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if err == nil && c.Device != "" {
		err = unix.BindToDevice(c.fd, c.Device)
	}
	if err == nil && c.ForClient {
		err = makeTransparent(c.fd, c.family())
	}
	if err == nil && c.Mark != 0 {
		err = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_MARK, c.Mark)
	}
	if err == nil && c.Source.IsValid() {
		err = unix.Bind(c.fd, sockaddr(c.family(), netip.AddrPortFrom(c.Source, 0)))
	}
	return err
}

// twice is one connection to its end, and another one with the same socket, as
// the same caller.
func (c *client) twice() {
	c.start(c.To)
	c.alone()
	first := c.out
	if c.fd < 0 || first.Result != "connected" && first.Result != "answered" {
		c.out = outcome{Result: "not tried", First: &first}
		return
	}
	c.out, c.heard, c.linked = outcome{}, nil, false
	if err := (&kit.Sock{FD: c.fd}).Disconnect(); err != nil {
		c.fail("disconnect: " + errno(err))
	} else {
		c.start(c.Then)
		c.alone()
	}
	c.out.First = &first
	c.end()
}

// alone waits for this one.
func (c *client) alone() {
	for c.waiting {
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: c.events()}}
		if _, err := unix.Poll(fds, 100); err == nil && fds[0].Revents != 0 {
			c.proceed(false)
		}
		c.tire(false)
	}
}

func (c *client) events() int16 {
	if c.linked || c.UDP {
		return unix.POLLIN
	}
	return unix.POLLOUT
}

// tire ends a probe that waits for too long.
func (c *client) tire(end bool) {
	if !c.waiting || time.Now().Before(c.until) {
		return
	}
	c.waiting = false
	c.out.Result = "timed out"
	if c.linked {
		c.out.Result = "connected, no answer"
	}
	if end {
		c.end()
	}
}

func await(clients []*client) error {
	for {
		var fds []unix.PollFd
		var waiting []*client
		for _, c := range clients {
			if c.waiting {
				fds = append(fds, unix.PollFd{Fd: int32(c.fd), Events: c.events()})
				waiting = append(waiting, c)
			}
		}
		if len(fds) == 0 {
			return nil
		}
		if _, err := unix.Poll(fds, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll: %w", err)
		}
		for i, c := range waiting {
			if fds[i].Revents != 0 {
				c.proceed(true)
			}
			c.tire(true)
		}
	}
}

// proceed does what the socket is ready for. At the end of the answer the socket
// is closed, if end is set.
func (c *client) proceed(end bool) {
	if !c.linked && !c.UDP {
		if e, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || e != 0 {
			c.fail(c.later(errno(errors.Join(err, unix.Errno(e)))))
			return
		}
		c.linked, c.until = true, time.Now().Add(patience) // the answer does come
		return
	}
	var buf [1024]byte
	n, from, err := unix.Recvfrom(c.fd, buf[:], 0)
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return
	case err != nil:
		c.fail("answer: " + errno(err))
		return
	case n == 0:
		c.fail("connected, closed without an answer")
		return
	}
	c.heard = append(c.heard, buf[:n]...)
	if !bytes.HasSuffix(c.heard, []byte("\n")) {
		return
	}
	c.finish(from)
	c.waiting = false
	if end {
		c.end()
	}
}

// later is what an error is called that comes while an answer is waited for. That
// nobody answers ARP is said after about as long as a probe waits that may vanish,
// and routers say that there is no route only so many times a second.
func (c *client) later(errno string) string {
	if c.MayVanish && (errno == "EHOSTUNREACH" || errno == "ENETUNREACH") {
		return "timed out"
	}
	return errno
}

func (c *client) finish(from unix.Sockaddr) {
	var said saying
	if err := json.Unmarshal(c.heard, &said); err != nil {
		c.fail("the answer makes no sense: " + err.Error())
		return
	}
	name, _ := unix.Getsockname(c.fd)
	mine := addrPort(name).Port()
	c.out.Result = "connected"
	c.out.Name = shownAs(shown(name), mine)
	if peer, err := unix.Getpeername(c.fd); err == nil {
		c.out.Peer = shown(peer)
	}
	if c.UDP {
		c.out.Result = "answered"
		c.out.Peer = strings.TrimSpace(c.out.Peer + " answer from " + shown(from))
	}
	c.out.By, c.out.ByName, c.out.OrigDst = said.By, unnumbered(said.Name), said.OrigDst
	c.out.ByPeer = shownAs(unnumbered(said.Peer), mine)
}

// shownAs replaces the port that the kernel chose for the client.
func shownAs(text string, mine uint16) string {
	host, port, err := net.SplitHostPort(text)
	switch {
	case err != nil:
		return text
	case port == strconv.Itoa(int(mine)):
		return host + " p"
	}
	return host + " other"
}

// unnumbered shows the addresses that Sluice uses up one after another, or draws
// by a hash, by what they are.
func unnumbered(text string) string {
	ap, err := netip.ParseAddrPort(text)
	if err != nil {
		return text
	}
	for prefix, kind := range map[string]string{"127.192.0.0/10": "booked", "fd73:6c75:6963:6500::/96": "booked", "127.128.0.0/10": "announced"} {
		if netip.MustParsePrefix(prefix).Contains(ap.Addr()) {
			return fmt.Sprintf("%s:%d", kind, ap.Port())
		}
	}
	return text
}
