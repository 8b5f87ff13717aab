package kit

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A link of two tun or tap devices, as a virtual machine has: what one kernel
// sends is read, and written to the other, by a process in between.

// The kinds of Tunnel.
const (
	TUN = unix.IFF_TUN // IP packets
	TAP = unix.IFF_TAP // Ethernet frames
)

// Tunnel wires two namespaces by devices of a name; addresses are a's and b's.
func Tunnel(a, b *NS, name string, kind uint16, as, bs []netip.Prefix) {
	a.t.Helper()
	first, second := a.tunDevice(name, kind), b.tunDevice(name, kind)
	go pump(first, second)
	go pump(second, first)
	for ns, addrs := range map[*NS][]netip.Prefix{a: as, b: bs} {
		ns.Netlink(func(h *netlink.Handle) error {
			l, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			for _, addr := range addrs {
				err = errors.Join(err, h.AddrAdd(l, address(addr)))
			}
			return errors.Join(err, h.LinkSetUp(l))
		})
		for _, addr := range addrs {
			ns.waitForAddress(addr.Addr())
		}
	}
}

func (n *NS) tunDevice(name string, kind uint16) *os.File {
	n.t.Helper()
	var fd int
	err := n.Do(func() (err error) { // the device is in the namespace of the caller
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		request.SetUint16(kind | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	})
	if err != nil {
		n.t.Fatal(fmt.Errorf("make %s: %w", name, err))
	}
	f := os.NewFile(uintptr(fd), name)
	n.t.Cleanup(func() { f.Close() })
	return f
}

// pump ends when a device is closed.
func pump(from, to *os.File) {
	buf := make([]byte, 1<<16)
	for {
		n, err := from.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err == nil {
			_, err = to.Write(buf[:n])
		}
		if errors.Is(err, os.ErrClosed) {
			return
		}
	}
}
