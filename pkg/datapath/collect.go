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
	tcpClose   = 7
	tcpListen  = 10
)

const (
	listenerSlots = 64   // SLUICE_LISTENER_SLOTS
	listenerMark  = 1339 // SLUICE_LISTENER_MARK
)

// collect looks at the sockets that were open before the pod's entry was
// written. Those whose SYN is out get a verdict, so that the guard leaves a
// retransmitted SYN alone; the proxy's listeners are noted, for sockops sees
// only those that come later. It says whether the pod runs: has any TCP socket.
func (d *Datapath) collect(ns *netns.NetNS, pod connectPod, out *Enrolment) (runs bool, err error) {
	if !ns.HasTCP() {
		return false, nil // do not look at every process of the machine
	}
	sockets, err := ns.TCPSockets(tcpSynSent, tcpListen, tcpClose)
	for _, s := range sockets {
		if s.State == tcpSynSent {
			err = errors.Join(err, d.passBefore(s, out))
		} else {
			err = errors.Join(err, d.noteListener(ns.Cookie(), s, pod, out))
		}
		err = errors.Join(err, s.File.Close())
	}
	return true, err
}

// passBefore marks a socket that the connect hook has not judged.
func (d *Datapath) passBefore(s netns.Socket, out *Enrolment) error {
	record := connectRecord{Reason: connectReasonPASSED_BEFORE}
	err := d.maps["orig_dst"].Update(uint32(s.File.Fd()), record, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return nil // judged meanwhile
	}
	if err != nil {
		return fmt.Errorf("mark a socket of process %d: %w", s.PID, err)
	}
	out.Before++
	return nil
}

// noteListener notes who bound a socket to one of the proxy's ports and, if it
// is the proxy's and listens, the socket itself. A socket that is only bound yet
// is noted by sockops when it listens.
func (d *Datapath) noteListener(cookie uint64, s netns.Socket, pod connectPod, out *Enrolment) error {
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
	if key.Port != pod.OutPort && key.Port != pod.InPort {
		return nil
	}
	binder, err := d.binderOf(s)
	if err != nil {
		return err
	}
	if s.State != tcpListen || !d.isProxy(pod.RulesId, binder) {
		return nil
	}
	if key.Port == pod.InPort && pod.Flags&connectPodFlagsPOD_TPROXY != 0 {
		if err := giveMark(s); err != nil { // needed where Istio's rules are too
			out.Notes = append(out.Notes, err.Error()+"; with Istio's iptables rules in the pod, inbound connections time out")
		}
	}
	if local.Addr().IsLoopback() {
		key.Scope = connectListenerScopeLISTENS_ON_LOOPBACK
	} else if key.Port == pod.OutPort { // as sockops: whether or not a map can hold it
		if err := d.deleteFact(cookie, connectPodFactFACT_WAITING); err != nil {
			return err
		}
	}
	err = d.insertListener(key, s)
	if errors.Is(err, unix.EOPNOTSUPP) {
		if key.Port == pod.InPort && pod.Flags&connectPodFlagsPOD_INBOUND_TC == 0 {
			out.Notes = append(out.Notes, fmt.Sprintf("the proxy's listener on port %d is an MPTCP one, which no socket hash can hold: inbound is refused until the pod is enrolled with --inbound=tc", key.Port))
		}
		return nil
	}
	if err != nil {
		return err
	}
	if key.Scope == connectListenerScopeLISTENS_TO_ALL {
		out.Listeners++
	}
	if key.Family != unix.AF_INET {
		return nil
	}
	if key.Port == pod.OutPort {
		return d.addFact(cookie, connectPodFactFACT_OUT_ASSIGNABLE)
	}
	return d.addFact(cookie, connectPodFactFACT_IN_ASSIGNABLE)
}

// giveMark does what sockops does with an inbound listener in TPROXY mode.
func giveMark(s netns.Socket) error {
	fd := int(s.File.Fd())
	mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err == nil && mark == 0 {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, listenerMark)
	}
	if err != nil {
		return fmt.Errorf("mark the inbound listener of process %d: %w", s.PID, err)
	}
	return nil
}

// isProxy says whether a rule set's proxy bound a socket.
func (d *Datapath) isProxy(rulesID uint32, b connectBinder) bool {
	var flags uint32
	for kind, id := range map[connectIdKind]uint32{connectIdKindID_UID: b.Uid, connectIdKindID_GID: b.Gid} {
		if d.maps["proxy_ids"].Lookup(connectProxyIdKey{RulesId: rulesID, Kind: kind, Id: id}, &flags) == nil {
			return true
		}
	}
	return false
}

// binderOf says who bound a socket: post_bind knows; of one that was bound
// before Sluice was up, the process that has it open.
func (d *Datapath) binderOf(s netns.Socket) (connectBinder, error) {
	fd := uint32(s.File.Fd())
	binder := connectBinder{Uid: s.UID, Gid: s.GID}
	err := d.maps["binders"].Update(fd, binder, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		err = d.maps["binders"].Lookup(fd, &binder)
	}
	if err != nil {
		return connectBinder{}, fmt.Errorf("note who bound a socket of process %d: %w", s.PID, err)
	}
	return binder, nil
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
				key := connectListenerKey{Cookie: cookie, Port: port, Family: family, Slot: uint8(slot)}
				errs = errors.Join(errs, deleteKey(d.maps["listeners"], key))
				key.Scope = connectListenerScopeLISTENS_ON_LOOPBACK
				errs = errors.Join(errs, deleteKey(d.maps["listeners"], key))
			}
		}
	}
	return errs
}
