package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// TCP states, as in tcp_states.h.
const (
	tcpEstablished = 1
	tcpSynSent     = 2
)

// Connection is a TCP connection of a namespace, as the kernel has it.
type Connection struct {
	Local, Remote netip.AddrPort
	UID           uint32 // of the socket's owner, as this process sees it

	family uint8
	inode  uint32 // 0: no process has it open
	id     netlink.SocketID
}

// Owner is a process that has a socket open: its real IDs, as this process sees
// them.
type Owner struct{ UID, GID uint32 }

// Connections lists the TCP connections, established or being so, whose other end
// is not in the namespace too: those that somebody redirects to a proxy in it are
// left out. It sees them by the kernel's socket table: no process is looked at.
func (n *NetNS) Connections() ([]Connection, error) {
	var all []Connection
	err := n.Do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := dump(func() ([]*netlink.Socket, error) { return netlink.SocketDiagTCP(family) })
			if err != nil {
				return fmt.Errorf("list the connections of %s: %w", n.path, err)
			}
			for _, s := range sockets {
				if s != nil && (s.State == tcpEstablished || s.State == tcpSynSent) {
					all = append(all, connectionOf(s))
				}
			}
		}
		return nil
	})
	inside := map[netip.AddrPort]bool{} // ends that something in the namespace is connected to
	for _, c := range all {
		inside[c.Remote] = true
	}
	return slices.DeleteFunc(all, func(c Connection) bool { return c.Remote.Addr().IsLoopback() || inside[c.Local] }), err
}

func connectionOf(s *netlink.Socket) Connection {
	local, _ := netip.AddrFromSlice(s.ID.Source)
	remote, _ := netip.AddrFromSlice(s.ID.Destination)
	return Connection{
		Local:  netip.AddrPortFrom(local.Unmap(), s.ID.SourcePort),
		Remote: netip.AddrPortFrom(remote.Unmap(), s.ID.DestinationPort),
		UID:    s.UID, family: s.Family, inode: s.INode, id: s.ID,
	}
}

// Owners finds the processes of the namespace that have connections open, for
// each of these: none where it is not known.
func (n *NetNS) Owners(connections []Connection) ([][]Owner, error) {
	pids, err := n.processes()
	if err != nil {
		return nil, err
	}
	byInode := map[string][]Owner{}
	for _, pid := range pids {
		uid, gid, err := realIDs(pid)
		if err != nil {
			continue // it ended
		}
		links, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "fd", "*")) // the pattern is right
		for _, l := range links {
			if target, err := os.Readlink(l); err == nil {
				byInode[target] = append(byInode[target], Owner{uid, gid})
			}
		}
	}
	out := make([][]Owner, len(connections))
	for i, c := range connections {
		out[i] = byInode[fmt.Sprintf("socket:[%d]", c.inode)]
	}
	return out, nil
}

// ErrNoReset is returned where the kernel closes no connections of others.
var ErrNoReset = errors.New("this kernel cannot close the connections of a process (CONFIG_INET_DIAG_DESTROY is not set)")

// CanReset returns ErrNoReset if Reset cannot work: it closes a connection that
// does not exist.
func CanReset() error {
	nowhere := Connection{family: unix.AF_INET, id: netlink.SocketID{Cookie: [2]uint32{1, 1}}}
	if err := destroy(nowhere); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// Reset closes a connection: who has it open gets ECONNABORTED, and the other end
// an RST. One that is closed already is no error.
func (n *NetNS) Reset(c Connection) error {
	err := n.Do(func() error { return destroy(c) })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("close %s - %s: %w", c.Local, c.Remote, err)
	}
	return nil
}

// destroy asks for SOCK_DESTROY, sock_diag(7), in the caller's namespace.
func destroy(c Connection) error {
	request := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	request.AddData(diagRequest{c})
	_, err := request.Execute(unix.NETLINK_INET_DIAG, 0)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return ErrNoReset
	}
	return err
}

// diagRequest is a struct inet_diag_req_v2 that names one socket.
type diagRequest struct{ Connection }

const diagRequestSize = 56

// Len is what netlink asks.
func (diagRequest) Len() int { return diagRequestSize }

// Serialize is what netlink asks.
func (r diagRequest) Serialize() []byte {
	out := []byte{r.family, unix.IPPROTO_TCP, 0, 0}
	out = binary.NativeEndian.AppendUint32(out, ^uint32(0)) // in any state
	out = binary.BigEndian.AppendUint16(out, r.id.SourcePort)
	out = binary.BigEndian.AppendUint16(out, r.id.DestinationPort)
	for _, ip := range [][]byte{r.id.Source, r.id.Destination} {
		var field [16]byte
		if r.family == unix.AF_INET && len(ip) == len(field) {
			ip = ip[12:] // netlink gives IPv4 addresses as mapped ones
		}
		copy(field[:], ip)
		out = append(out, field[:]...)
	}
	for _, v := range []uint32{r.id.Interface, r.id.Cookie[0], r.id.Cookie[1]} {
		out = binary.NativeEndian.AppendUint32(out, v)
	}
	return out
}
