package netns

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Connection is an established TCP connection of a namespace, as the kernel has it.
type Connection struct{ Local, Remote netip.AddrPort }

// Connections lists the established TCP connections that leave the namespace. It
// sees them by the kernel's socket table: no process is looked at.
func (n *NetNS) Connections() ([]Connection, error) {
	var out []Connection
	err := n.Do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := dump(func() ([]*netlink.Socket, error) { return netlink.SocketDiagTCP(family) })
			if err != nil {
				return fmt.Errorf("list the connections of %s: %w", n.path, err)
			}
			for _, s := range sockets {
				if s == nil || s.State != established {
					continue
				}
				local, _ := netip.AddrFromSlice(s.ID.Source)
				remote, _ := netip.AddrFromSlice(s.ID.Destination)
				c := Connection{
					Local:  netip.AddrPortFrom(local.Unmap(), s.ID.SourcePort),
					Remote: netip.AddrPortFrom(remote.Unmap(), s.ID.DestinationPort),
				}
				if !c.Remote.Addr().IsLoopback() && c.Remote.Addr() != c.Local.Addr() {
					out = append(out, c)
				}
			}
		}
		return nil
	})
	return out, err
}

const established = 1 // TCP_ESTABLISHED, tcp_states.h
