package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// TCP states, as in tcp_states.h.
const (
	tcpSynSent = 2
	tcpListen  = 10
)

const listenerSlots = 64 // SLUICE_LISTENER_SLOTS

// collect looks at the sockets that were open before the pod's entry was
// written. Those whose SYN is out get a verdict, so that the guard leaves a
// retransmitted SYN alone; the proxy's listeners are noted, for sockops sees
// only those that come later.
func (d *Datapath) collect(ns *netns.NetNS, pod Pod, out *Enrolment) error {
	sockets, err := ns.TCPSockets(tcpSynSent, tcpListen)
	compiled := pod.Rules.Compile()
	for _, s := range sockets {
		_, uid := compiled.UIDs[s.UID]
		_, gid := compiled.GIDs[s.GID]
		switch {
		case s.State == tcpSynSent:
			err = errors.Join(err, d.writeRecord(s, connectRecord{Reason: connectReasonPASSED_BEFORE}, &out.Before))
		case uid || gid:
			err = errors.Join(err, d.noteListener(ns.Cookie(), s, pod, out))
		}
		err = errors.Join(err, s.File.Close())
	}
	return err
}

// writeRecord adds a record to a socket that has none.
func (d *Datapath) writeRecord(s netns.Socket, record connectRecord, n *int) error {
	err := d.maps["orig_dst"].Update(uint32(s.File.Fd()), record, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return nil // it was judged by the connect hook meanwhile
	}
	if err != nil {
		return fmt.Errorf("mark a socket of process %d: %w", s.PID, err)
	}
	*n++
	return nil
}

func (d *Datapath) noteListener(cookie uint64, s netns.Socket, pod Pod, out *Enrolment) error {
	sa, err := unix.Getsockname(int(s.File.Fd()))
	if err != nil {
		return fmt.Errorf("name a listener of process %d: %w", s.PID, err)
	}
	var local netip.AddrPort
	key := connectListenerKey{Cookie: cookie, Family: unix.AF_INET}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		local = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		local = netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
		key.Family = unix.AF_INET6
	default:
		return nil
	}
	key.Port = local.Port()
	if key.Port != pod.Rules.OutboundPort && key.Port != pod.Rules.InboundPort {
		return nil
	}
	n := 0
	if err := d.writeRecord(s, connectRecord{Flags: connectRecordFlagsRECORD_PROXY_BOUND}, &n); err != nil {
		return err
	}
	if local.Addr().IsLoopback() {
		return nil // istio-validation's: the kernel finds it by itself
	}
	err = d.insertListener(key, s)
	if errors.Is(err, unix.EOPNOTSUPP) {
		if key.Port == pod.Rules.InboundPort && pod.Inbound != InboundTC {
			out.Notes = append(out.Notes, fmt.Sprintf("the proxy's listener on port %d is an MPTCP one, which no socket hash can hold: inbound is refused until the pod is enrolled with --inbound=tc", key.Port))
		}
		return nil
	}
	if err == nil {
		out.Listeners++
	}
	return err
}

// insertListener puts a listener into the first free slot, unless it is in one.
func (d *Datapath) insertListener(key connectListenerKey, s netns.Socket) error {
	mine, err := unix.GetsockoptUint64(int(s.File.Fd()), unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return fmt.Errorf("identify a listener: %w", err)
	}
	for slot := range listenerSlots {
		key.Slot = uint8(slot)
		var there uint64
		if d.maps["listeners"].Lookup(key, &there) == nil && there == mine {
			return nil
		}
		err := d.maps["listeners"].Update(key, uint64(s.File.Fd()), ebpf.UpdateNoExist)
		if !errors.Is(err, ebpf.ErrKeyExist) {
			return err
		}
	}
	return fmt.Errorf("%w: the proxy has more than %d listeners on port %d", ErrTableFull, listenerSlots, key.Port)
}

func (d *Datapath) deleteListeners(cookie uint64, p connectPod) error {
	var errs error
	for _, port := range []uint16{p.OutPort, p.InPort} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			for slot := range listenerSlots {
				errs = errors.Join(errs, deleteKey(d.maps["listeners"], connectListenerKey{Cookie: cookie, Port: port, Family: family, Slot: uint8(slot)}))
			}
		}
	}
	return errs
}
