package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
)

// A stub is what is attached to a pod: it leaves the pod's cookie in scratch
// and calls the shared program. It is written here, instruction by instruction,
// rather than in C, because an object file brings BTF and a map of constants
// for every pod: this one is verified and attached in a tenth of a millisecond.
//
// What a stub does is part of Layout: those of a running pod are not replaced.
type stub struct {
	name   string
	kind   ebpf.ProgramType
	attach ebpf.AttachType
	table  string // the program array with the shared program
	index  uint32
	miss   int32 // what to return if it is not there
}

const (
	skDrop        = 0
	skPass        = 1
	tcNext        = -1
	tcShot        = 2
	skLookupProto = 12 // offsetof(struct bpf_sk_lookup, protocol)
	ipprotoTCP    = 6
)

// The names of the pod's programs, under which they are pinned too.
const (
	progInbound   = "inbound"
	progGuard     = "guard"
	progTCInbound = "tc_inbound"

	progRerouteIn  = "reroute_in"
	progRerouteOut = "reroute_out"
)

var stubs = map[string]stub{
	progInbound:   {progInbound, ebpf.SkLookup, ebpf.AttachSkLookup, "pod_inbound", 0, skDrop},
	progGuard:     {progGuard, ebpf.SchedCLS, ebpf.AttachNone, "pod_tc", uint32(connectTcProgTC_GUARD), tcNext},
	progTCInbound: {progTCInbound, ebpf.SchedCLS, ebpf.AttachNone, "pod_tc", uint32(connectTcProgTC_INBOUND), tcNext},

	progRerouteIn:  {progRerouteIn, ebpf.SchedCLS, ebpf.AttachNone, "pod_tc", uint32(connectTcProgTC_REROUTE_IN), tcShot},
	progRerouteOut: {progRerouteOut, ebpf.SchedCLS, ebpf.AttachNone, "pod_tc", uint32(connectTcProgTC_REROUTE_OUT), tcShot},
}

const (
	scratchCookie   = 0  // offsetof(struct scratch, cookie)
	scratchL3Offset = 12 // offsetof(struct scratch, l3_offset)
	ethernetHeader  = 14
)

// loadStub loads a pod's stub. Close it once it is attached. A TC stub is for
// interfaces with an Ethernet header, or without.
func (d *Datapath) loadStub(name string, cookie uint64, ethernet bool) (*ebpf.Program, error) {
	s := stubs[name]
	var ins asm.Instructions
	ins = append(ins, asm.Mov.Reg(asm.R6, asm.R1))
	if s.kind == ebpf.SkLookup { // it runs for each datagram of an unconnected socket too
		ins = append(ins,
			asm.LoadMem(asm.R2, asm.R1, skLookupProto, asm.Word),
			asm.JNE.Imm(asm.R2, ipprotoTCP, "pass"),
		)
	}
	l3 := int64(0)
	if ethernet {
		l3 = ethernetHeader
	}
	ins = append(ins,
		// this = bpf_map_lookup_elem(&scratch, &zero)
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, d.maps["scratch"].FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "miss"),
		// this->cookie = cookie
		asm.LoadImm(asm.R1, int64(cookie), asm.DWord),
		asm.StoreMem(asm.R0, scratchCookie, asm.R1, asm.DWord),
		// this->l3_offset = l3
		asm.StoreImm(asm.R0, scratchL3Offset, l3, asm.Word),
		// bpf_tail_call(ctx, table, index)
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, d.maps[s.table].FD()),
		asm.Mov.Imm(asm.R3, int32(s.index)),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, s.miss).WithSymbol("miss"),
		asm.Return(),
		asm.Mov.Imm(asm.R0, skPass).WithSymbol("pass"),
		asm.Return(),
	)
	if s.kind != ebpf.SkLookup {
		ins = ins[:len(ins)-2] // nothing passes by itself
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: s.name, Type: s.kind, AttachType: s.attach, License: "Dual BSD/GPL", Instructions: ins,
	})
	if err != nil {
		return nil, fmt.Errorf("load the stub of %s: %w", name, err)
	}
	return prog, nil
}

// loadShared loads the programs that every pod's stubs call, by name.
func (d *Datapath) loadShared() (map[string]*ebpf.Program, func(), error) {
	inbound, inboundErr := loadInbound()
	tc, tcErr := loadTc()
	reroute, rerouteErr := loadReroute()
	if err := errors.Join(inboundErr, tcErr, rerouteErr); err != nil {
		return nil, nil, fmt.Errorf("read the pods' shared programs: %w", err)
	}
	values := map[string]any{
		"target_share":         d.opts.TargetShare,
		"have_ingress_ifindex": d.Features().IngressIfindex,
		"have_mptcp_sock":      d.Features().MPTCPSock,
	}
	programs, closeAll, err := d.loadAll([]*ebpf.CollectionSpec{inbound, tc, reroute}, values)
	if err != nil {
		return nil, nil, fmt.Errorf("load the pods' shared programs: %w", err)
	}
	return programs, closeAll, nil
}

// replaceShared puts programs in the place that the stubs call: that replaces them
// for every pod at once, atomically for each.
func (d *Datapath) replaceShared(programs map[string]*ebpf.Program) error {
	for name, prog := range programs {
		s := stubs[name]
		if err := d.maps[s.table].Put(s.index, prog); err != nil {
			return fmt.Errorf("put %s in place: %w", name, err)
		}
		failpoint.Step("up: " + name + " in force")
	}
	return nil
}
