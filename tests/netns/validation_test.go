package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// validation is what istio-validation does in a pod: see its Go code in Istio,
// tools/istio-iptables/pkg/validation.
type validation struct {
	name          string
	self, virtual netip.Addr // where it listens and dials from, what it dials
	level         int        // of SO_ORIGINAL_DST
}

var validations = []validation{
	{"IPv4", netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.6"), unix.SOL_IP},
	{"IPv6", netip.MustParseAddr("::1"), netip.MustParseAddr("::6"), unix.SOL_IPV6},
}

const (
	validationPort   = 15002
	validationBuffer = 32
)

// run listens, dials and asks, as somebody without capabilities. Nil is success.
func (v validation) run(t *testing.T, p *kit.Pod, id kit.ID, multipath bool) error {
	t.Helper()
	listen := net.ListenConfig{Control: reuse}
	listen.SetMultipathTCP(multipath)
	return p.Bare(id, func() error {
		inbound, err := v.listen(t, listen, 15006)
		if err != nil {
			return err
		}
		defer inbound.Close()
		outbound, err := v.listen(t, listen, 15001)
		if err != nil {
			return err
		}
		defer outbound.Close()
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(ap(v.self, 0)), Timeout: kit.Patience}
		client, err := dialer.Dial("tcp", ap(v.virtual, validationPort).String())
		if err != nil {
			return fmt.Errorf("dial: %w", err)
		}
		defer client.Close()
		accepted, err := inbound.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		defer accepted.Close()
		return v.ask(accepted.(*net.TCPConn))
	})
}

func (v validation) listen(t *testing.T, config net.ListenConfig, port int) (net.Listener, error) {
	l, err := config.Listen(t.Context(), "tcp", ap(v.self, port).String())
	if err != nil {
		return nil, fmt.Errorf("listen on port %d: %w", port, err)
	}
	t.Cleanup(func() { l.Close() })
	return l, nil
}

func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	}), err)
}

func (v validation) ask(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var answer []byte
	var asked error
	if err := raw.Control(func(fd uintptr) {
		answer, asked = (&kit.Sock{FD: int(fd)}).Getsockopt(v.level, kit.SOOriginalDst, validationBuffer)
	}); err != nil {
		return err
	}
	if asked != nil {
		return fmt.Errorf("SO_ORIGINAL_DST: %w", asked)
	}
	if port := binary.BigEndian.Uint16(answer[2:]); port != validationPort {
		return fmt.Errorf("SO_ORIGINAL_DST says port %d, want %d", port, validationPort)
	}
	return nil
}

func TestWhatIstioValidationDoesWorksInAnEnrolledPodOnly(t *testing.T) {
	d := kit.Datapath(t)
	for _, v := range validations {
		for _, multipath := range []bool{false, true} {
			for _, way := range []datapath.Inbound{datapath.InboundSKLookup, datapath.InboundTC} {
				t.Run(fmt.Sprintf("%s/multipath %v/%s", v.name, multipath, way), func(t *testing.T) {
					p := kit.NewPod(t)
					p.AddAddr("lo", netip.PrefixFrom(netip.MustParseAddr("::6"), 128))
					if err := v.run(t, p, kit.Proxy, multipath); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("before enrolment it ends with %v, want ECONNREFUSED", err)
					}
					p.Enroll(d, func(pod *datapath.Pod) { pod.Inbound = way })
					if err := v.run(t, p, kit.Proxy, multipath); err != nil {
						t.Error("enrolled:", err)
					}
					if n := p.Stat(d, "captured-self"); n != 1 {
						t.Errorf("captured-self is %d, want 1", n)
					}
					if err := v.run(t, p, kit.Root, multipath); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("as root it ends with %v, want ECONNREFUSED", err)
					}
					// It runs once a second until it succeeds.
					for range 3 {
						if err := v.run(t, p, kit.Proxy, multipath); err != nil {
							t.Error("once more:", err)
						}
					}
				})
			}
		}
	}
}

// Go programs listen with MPTCP unless told otherwise.
func TestValidationWithGosOwnListeners(t *testing.T) {
	d := kit.Datapath(t)
	for _, v := range validations {
		t.Run(v.name, func(t *testing.T) {
			p := kit.NewPod(t)
			p.AddAddr("lo", netip.PrefixFrom(netip.MustParseAddr("::6"), 128))
			p.Enroll(d)
			err := p.Bare(kit.Proxy, func() error {
				l, err := v.listen(t, net.ListenConfig{}, 15006)
				if err != nil {
					return err
				}
				// Unbound, a call of ::6 would come from ::6, as the proxy calls the app.
				dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(ap(v.self, 0))}
				client, err := dialer.DialContext(context.Background(), "tcp", ap(v.virtual, validationPort).String())
				if err != nil {
					return err
				}
				defer client.Close()
				accepted, err := l.Accept()
				if err != nil {
					return err
				}
				defer accepted.Close()
				if got := accepted.RemoteAddr().String(); got != client.LocalAddr().String() {
					return fmt.Errorf("the accepted socket's peer is %s, the client's name %s", got, client.LocalAddr())
				}
				return v.ask(accepted.(*net.TCPConn))
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}
