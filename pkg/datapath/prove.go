package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// ErrUnproven is returned when a connection that should have been captured was
// not: the programs are attached where they see nobody.
var ErrUnproven = errors.New("the programs are attached, but a connection of this process was not captured")

// The proof's addresses are of TEST-NET-1 (RFC 5737): nothing has them.
var (
	proofSource = netip.MustParseAddr("192.0.2.1")
	proofDst    = netip.MustParseAddrPort("192.0.2.2:9")
)

const soOriginalDst = 80

// Prove enrols a throw-away namespace and connects in it to an address that
// does not exist: captured, the connection arrives at a listener on the
// outbound port, which is told where it was meant to go. The calling process
// must be below the datapath's cgroup.
func (d *Datapath) Prove() error {
	ns, err := netns.New()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := addSource(ns); err != nil {
		return err
	}
	pod := Pod{Namespace: "sluice", Name: "proof", Rules: rules.Default()}
	if _, err := d.Enroll(ns, pod); err != nil {
		return fmt.Errorf("enroll a throw-away namespace: %w", err)
	}
	err = ns.Do(connectOnce)
	if _, undo := d.Unenroll(ns.Cookie(), ns); undo != nil {
		err = errors.Join(err, undo)
	}
	return err
}

func addSource(ns *netns.NetNS) error {
	handle, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: proofSource.AsSlice(), Mask: net.CIDRMask(32, 32)}}
	if err := handle.AddrAdd(lo, addr); err != nil {
		return fmt.Errorf("add %s: %w", proofSource, err)
	}
	return nil
}

func connectOnce() error {
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a listener: %w", err)
	}
	defer unix.Close(listener)
	at := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: rules.DefaultOutboundPort}
	if err := errors.Join(unix.Bind(listener, at), unix.Listen(listener, 1)); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a client: %w", err)
	}
	defer unix.Close(client)
	timeout := unix.Timeval{Sec: 2}
	for _, fd := range []int{listener, client} {
		for _, name := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, name, &timeout); err != nil {
				return fmt.Errorf("set a time limit: %w", err)
			}
		}
	}
	to := &unix.SockaddrInet4{Addr: proofDst.Addr().As4(), Port: int(proofDst.Port())}
	if err := unix.Connect(client, to); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("%w: connect: %w", ErrUnproven, err)
	}
	accepted, err := acceptOne(listener)
	if err != nil {
		return fmt.Errorf("%w: accept: %w", ErrUnproven, err)
	}
	defer unix.Close(accepted)
	return askOriginalDst(accepted)
}

func acceptOne(listener int) (int, error) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

func askOriginalDst(fd int) error {
	// GetsockoptIPv6Mreq is a getsockopt with a buffer of 20 bytes: enough for
	// a sockaddr_in.
	raw, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, soOriginalDst)
	if err != nil {
		return fmt.Errorf("%w: SO_ORIGINAL_DST: %w", ErrUnproven, err)
	}
	port := binary.BigEndian.Uint16(raw.Multiaddr[2:4])
	got := netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw.Multiaddr[4:8])), port)
	if got != proofDst {
		return fmt.Errorf("%w: SO_ORIGINAL_DST is %s, not %s", ErrUnproven, got, proofDst)
	}
	return nil
}
