package datapath

import (
	"fmt"
	"net/netip"
	"strings"
)

// Inbound is the way in which inbound connections are captured.
type Inbound string

// The ways. TC is sk_lookup and a TC program beside it, for listeners that no
// socket hash can hold (MPTCP).
const (
	InboundSKLookup Inbound = "sk_lookup"
	InboundTC       Inbound = "tc"
)

// ParseInbound reads a way by its name.
func ParseInbound(text string) (Inbound, error) {
	switch in := Inbound(text); in {
	case InboundSKLookup, InboundTC:
		return in, nil
	}
	return "", fmt.Errorf("%q is not a way to capture inbound connections: choose sk_lookup or tc", text)
}

// TCAttach is the way in which TC programs are attached.
type TCAttach string

// The ways. A clsact filter is attached in a fraction of a millisecond, but the
// kernel drops packets that are under way while it adds the first to an
// interface. A TCX link (Linux 6.6) disturbs nobody and cannot be removed by
// anybody else, but to make one the kernel waits for an RCU grace period under
// the RTNL lock, 5 to 75 ms (docs/adr/0004). Auto is clsact for a namespace
// without connections, a pod that starts, and TCX for one that runs.
const (
	TCAuto TCAttach = "auto"
	Clsact TCAttach = "clsact"
	TCX    TCAttach = "tcx"
)

// ParseTCAttach reads a way by its name.
func ParseTCAttach(text string) (TCAttach, error) {
	switch a := TCAttach(text); a {
	case TCAuto, Clsact, TCX:
		return a, nil
	}
	return "", fmt.Errorf("%q is not a way to attach TC programs: choose auto, clsact or tcx", text)
}

// Reason is why a connection was captured, passed or stopped.
type Reason = connectReason

var reasonNames = [...]string{
	"none", "captured-out", "captured-self", "captured-in",
	"direct-proxy", "direct-port-out", "direct-cidr", "direct-local", "direct-proxy-source",
	"direct-loopback", "direct-port-in", "left-to-kernel", "passed-before",
	"refused-no-memory", "refused-table-full", "refused-no-handshake", "refused-no-listener",
	"refused-no-pod", "refused-no-record", "guard-no-verdict", "guard-loopback",
	"listener-not-mappable", "listener-slots-full", "refused-loop",
	"captured-dns", "captured-rerouted", "direct-interface", "direct-owner-group", "direct-not-ready",
	"guard-other-interface",
	"refused-rerouted",
}

// ReasonName is a reason as people read it.
func ReasonName(r Reason) string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason-%d", r)
}

// UnitOf is what a reason counts. The guard sees packets, and a SYN that it drops
// is sent again.
func UnitOf(r Reason) string {
	switch r {
	case connectReasonGUARD_NO_VERDICT, connectReasonGUARD_OTHER_INTERFACE:
		return "SYNs"
	case connectReasonGUARD_LOOPBACK, connectReasonREFUSED_REROUTED:
		return "packets"
	case connectReasonREFUSED_NO_RECORD:
		return "calls"
	case connectReasonLISTENER_NOT_MAPPABLE, connectReasonLISTENER_SLOTS_FULL:
		return "listeners"
	}
	return "connections"
}

func toAddr(a netip.Addr) (out connectAddr) {
	if a.IsValid() {
		out.B = a.As16()
	}
	return out
}

func fromAddr(b [16]byte) netip.Addr {
	a := netip.AddrFrom16(b).Unmap()
	if a == netip.IPv6Unspecified() {
		return netip.Addr{}
	}
	return a
}

func text(b []int8) string {
	var s strings.Builder
	for _, c := range b {
		if c == 0 {
			break
		}
		s.WriteByte(byte(c))
	}
	return s.String()
}

func setText(to []int8, from string) {
	for i := 0; i < len(from) && i < len(to)-1; i++ {
		to[i] = int8(from[i])
	}
}
