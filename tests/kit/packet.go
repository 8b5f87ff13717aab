package kit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TCP flags.
const (
	SYN = 0x02
	ACK = 0x10
)

// IP is a packet of either family around a payload.
func IP(src, dst netip.Addr, protocol uint8, payload []byte) []byte {
	if src.Is6() {
		h := []byte{0x60, 0, 0, 0, 0, 0, protocol, 64}
		binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
		h = append(append(h, src.AsSlice()...), dst.AsSlice()...)
		return append(h, payload...)
	}
	h := []byte{0x45, 0, 0, 0, 0x51, 0x51, 0, 0, 64, protocol, 0, 0}
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	h = append(append(h, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

// Fragment makes an IPv4 packet of IP a fragment: offset in bytes, a multiple
// of 8.
func Fragment(packet []byte, offset int, more bool) []byte {
	p := bytes.Clone(packet)
	field := uint16(offset / 8)
	if more {
		field |= 0x2000
	}
	binary.BigEndian.PutUint16(p[6:], field)
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	return p
}

// Segment is a TCP segment with flags and content, to go into IP.
func Segment(src, dst netip.AddrPort, flags uint8, content string) []byte {
	s := make([]byte, 20, 20+len(content))
	binary.BigEndian.PutUint16(s, src.Port())
	binary.BigEndian.PutUint16(s[2:], dst.Port())
	binary.BigEndian.PutUint32(s[4:], 0x51515151)
	s[12], s[13] = 5<<4, flags
	binary.BigEndian.PutUint16(s[14:], 0xffff)
	return sum(append(s, content...), 16, src.Addr(), dst.Addr(), unix.IPPROTO_TCP)
}

// Datagram is a UDP datagram, to go into IP.
func Datagram(src, dst netip.AddrPort, content string) []byte {
	d := make([]byte, 8, 8+len(content))
	binary.BigEndian.PutUint16(d, src.Port())
	binary.BigEndian.PutUint16(d[2:], dst.Port())
	binary.BigEndian.PutUint16(d[4:], uint16(8+len(content)))
	return sum(append(d, content...), 6, src.Addr(), dst.Addr(), unix.IPPROTO_UDP)
}

// sum writes the checksum of a payload with its pseudo header.
func sum(p []byte, at int, src, dst netip.Addr, protocol uint8) []byte {
	pseudo := append(append(src.AsSlice(), dst.AsSlice()...), 0, protocol, 0, 0)
	binary.BigEndian.PutUint16(pseudo[len(pseudo)-2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[at:], checksum(append(pseudo, p...)))
	return p
}

func checksum(p []byte) uint16 {
	var total uint32
	for i := 0; i < len(p); i += 2 {
		word := uint32(p[i]) << 8
		if i+1 < len(p) {
			word |= uint32(p[i+1])
		}
		total += word
	}
	for total>>16 != 0 {
		total = total&0xffff + total>>16
	}
	return ^uint16(total)
}

// SendRaw sends a whole IP packet through a raw socket (IPPROTO_RAW), by the
// namespace's routes.
func (n *NS) SendRaw(packet []byte) error {
	return n.Do(func() error {
		src, dst := addresses(packet)
		family := unix.AF_INET
		if src.Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("open a raw socket: %w", err)
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, sockaddr(family, netip.AddrPortFrom(dst, 0)))
	})
}

// SendFrame sends a whole IP packet through a packet socket to the other end of
// an interface, whatever the routes say.
func (p *Pod) SendFrame(link string, packet []byte) error {
	from, to := p.hardware(link), p.Far.hardware(link)
	protocol := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		protocol = unix.ETH_P_IPV6
	}
	frame := append(bytes.Clone(to.HardwareAddr), from.HardwareAddr...)
	frame = append(binary.BigEndian.AppendUint16(frame, protocol), packet...)
	return p.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open a packet socket: %w", err)
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: from.Index, Protocol: bits16(protocol)})
	})
}

func (n *NS) hardware(link string) *netlink.LinkAttrs {
	n.t.Helper()
	var out *netlink.LinkAttrs
	n.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(link)
		if err == nil {
			out = l.Attrs()
		}
		return err
	})
	return out
}

// bits16 is a number in network byte order.
func bits16(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

func addresses(packet []byte) (src, dst netip.Addr) {
	if packet[0]>>4 == 6 {
		return netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
}

// Sniffer sees every frame of an interface from its making on.
type Sniffer struct{ *Sock }

// Sniff opens a Sniffer.
func (n *NS) Sniff(link string) *Sniffer {
	n.t.Helper()
	index := n.hardware(link).Index
	s := &Sniffer{&Sock{FD: -1, t: n.t}}
	err := n.Do(func() (err error) {
		all := bits16(unix.ETH_P_ALL)
		if s.FD, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		return unix.Bind(s.FD, &unix.SockaddrLinklayer{Ifindex: index, Protocol: all})
	})
	n.t.Cleanup(s.Close)
	if err != nil {
		n.t.Fatalf("open a packet socket in %s: %v", n.Name, err)
	}
	s.timeout(Patience / 10)
	return s
}

// SawBefore reads frames up to one that holds a marker, and says whether one of
// those before it held the content.
func (s *Sniffer) SawBefore(content, marker string) bool {
	s.t.Helper()
	saw := false
	buf := make([]byte, 1<<16)
	for deadline := time.Now().Add(Patience); time.Now().Before(deadline); {
		n, err := unix.Read(s.FD, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			s.t.Fatal("read frames:", err)
		}
		saw = saw || bytes.Contains(buf[:n], []byte(content))
		if bytes.Contains(buf[:n], []byte(marker)) {
			return saw
		}
	}
	s.t.Fatalf("no frame with %q within %v", marker, Patience)
	return false
}
