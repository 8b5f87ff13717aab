package demo

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	payloadSize = 1 << 20 // each way, on every connection
	callTimeout = 5 * time.Second
)

// served is a line of a server's output: first that it is ready, then one when
// it has accepted a connection, and one with an ID when it has answered it.
type served struct {
	Ready    bool           `json:"ready,omitempty"`
	Listener netip.AddrPort `json:"listener"` // as it was asked for
	ID       string         `json:"id,omitempty"`
	Local    netip.AddrPort `json:"local"`
	Peer     netip.AddrPort `json:"peer"`
	Received string         `json:"received,omitempty"` // SHA-256
	Sent     string         `json:"sent,omitempty"`     // SHA-256
}

// called is a client's output.
type called struct {
	ID       string         `json:"id"`
	Local    netip.AddrPort `json:"local"`
	Peer     netip.AddrPort `json:"peer"`
	Received string         `json:"received"` // SHA-256
	Sent     string         `json:"sent"`     // SHA-256
	Refused  bool           `json:"refused,omitempty"`
	Error    string         `json:"error,omitempty"`
}

// RunServer listens on every address, IPv6 ones V6ONLY, and answers each
// connection with a payload of its own once the client has sent everything. It
// tells what it sees on out and does not return without an error.
func RunServer(out io.Writer, listen []string) error {
	enc := &lines{enc: json.NewEncoder(out)}
	listeners := map[netip.AddrPort]net.Listener{}
	for _, text := range listen {
		addr, err := netip.ParseAddrPort(text)
		if err != nil {
			return err
		}
		network := "tcp4"
		if addr.Addr().Is6() {
			network = "tcp6" // Go sets V6ONLY
		}
		l, err := net.Listen(network, text)
		if err != nil {
			return err
		}
		listeners[addr] = l
	}
	errs := make(chan error)
	for addr, l := range listeners {
		go func() { errs <- serve(l, addr, enc) }()
	}
	enc.write(served{Ready: true})
	return <-errs
}

// lines serialises what several goroutines write.
type lines struct {
	mu  sync.Mutex
	enc *json.Encoder
}

func (l *lines) write(v any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.enc.Encode(v) != nil {
		os.Exit(1) // nobody listens any more
	}
}

func serve(l net.Listener, addr netip.AddrPort, enc *lines) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		s := served{Listener: addr}
		s.Local, s.Peer = names(c)
		enc.write(s)
		go func() {
			defer c.Close()
			if answer(c, &s) == nil {
				enc.write(s)
			}
		}()
	}
}

// answer reads an ID's line and a payload up to the end, then sends its own.
func answer(c net.Conn, s *served) error {
	if err := c.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return err
	}
	in := bufio.NewReader(c)
	id, err := in.ReadString('\n')
	if err != nil {
		return err
	}
	s.ID = strings.TrimSpace(id)
	if s.Received, err = digest(in); err != nil {
		return err
	}
	s.Sent, err = sendPayload(c)
	return err
}

// RunClient connects to addr once, sends and receives, and tells what it saw
// on out.
func RunClient(out io.Writer, addr, id string) error {
	c := called{ID: id}
	if err := call(addr, &c); err != nil {
		c.Error = err.Error()
		c.Refused = errors.Is(err, unix.ECONNREFUSED)
	}
	return json.NewEncoder(out).Encode(c)
}

func call(addr string, c *called) error {
	dialer := net.Dialer{Timeout: callTimeout}
	conn, err := dialer.DialContext(context.Background(), "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return err
	}
	c.Local, c.Peer = names(conn)
	if _, err := fmt.Fprintln(conn, c.ID); err != nil {
		return err
	}
	if c.Sent, err = sendPayload(conn); err != nil {
		return err
	}
	c.Received, err = digest(conn)
	return err
}

// sendPayload sends random bytes and the end of the stream, and returns their
// digest.
func sendPayload(c net.Conn) (string, error) {
	payload := make([]byte, payloadSize)
	if _, err := rand.Read(payload); err != nil {
		return "", err
	}
	if _, err := c.Write(payload); err != nil {
		return "", err
	}
	sum := sha256.Sum256(payload)
	half, ok := c.(*net.TCPConn)
	if !ok {
		return "", errors.New("not a TCP connection")
	}
	return hex.EncodeToString(sum[:]), half.CloseWrite()
}

func digest(r io.Reader) (string, error) {
	h := sha256.New()
	if n, err := io.Copy(h, r); err != nil {
		return "", err
	} else if n != payloadSize {
		return "", fmt.Errorf("the stream ended after %d of %d bytes", n, payloadSize)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// names asks the kernel, as getsockname and getpeername do: net.Conn's own
// answers may be what was dialled.
func names(c net.Conn) (local, peer netip.AddrPort) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return local, peer
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return local, peer
	}
	_ = raw.Control(func(fd uintptr) { // closed: the names stay empty, and no check passes
		if sa, err := unix.Getsockname(int(fd)); err == nil {
			local = addrPort(sa)
		}
		if sa, err := unix.Getpeername(int(fd)); err == nil {
			peer = addrPort(sa)
		}
	})
	return local, peer
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
