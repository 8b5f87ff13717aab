package datapath

import (
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// ErrKernel is returned for a kernel on which Sluice cannot work.
var ErrKernel = errors.New("this kernel cannot run Sluice")

// Features are the optional abilities of the running kernel, found by trying.
type Features struct {
	SetRetval      bool // a refused connect() gets ECONNREFUSED, not EPERM
	MPTCPSock      bool // MPTCP clients and proxies see the original destination
	IngressIfindex bool // sk_lookup knows loopback traffic by its interface
	TCX            bool // TC programs can be attached by link
	UDP            bool // DNS over UDP can be captured
}

// A Finding is one thing that was looked for, and what follows from it.
type Finding struct {
	Name     string `json:"name"`
	Required bool   `json:"required"`
	OK       bool   `json:"ok"`
	Means    string `json:"means,omitempty"` // what follows from its absence
	Error    string `json:"error,omitempty"`
}

type probe struct {
	name  string
	since string
	means string
	try   func() error
}

func helper(t ebpf.ProgramType, fn asm.BuiltinFunc) func() error {
	return func() error { return features.HaveProgramHelper(t, fn) }
}

var required = []probe{
	{"sk_lookup programs", "5.9", "inbound connections cannot be captured", func() error { return features.HaveProgramType(ebpf.SkLookup) }},
	{"socket storage in connect programs", "5.8", "the original destination has no place", helper(ebpf.CGroupSockAddr, asm.FnSkStorageGet)},
	{"network namespace cookie in connect programs", "5.7", "a socket's pod cannot be told", helper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie)},
	{"network namespace cookie in sockops programs", "5.15", "a connection's pod cannot be told when the proxy accepts it", helper(ebpf.SockOps, asm.FnGetNetnsCookie)},
	{"network namespace cookie in sockopt programs", "5.15", "SO_ORIGINAL_DST cannot be answered for the right pod", helper(ebpf.CGroupSockopt, asm.FnGetNetnsCookie)},
	{"socket storage in sockopt programs", "5.9", "SO_ORIGINAL_DST cannot be answered", helper(ebpf.CGroupSockopt, asm.FnSkStorageGet)},
	{"socket hash of listeners", "5.9", "the proxy's listeners cannot be kept", func() error { return features.HaveMapType(ebpf.SockHash) }},
}

func (f *Features) optional() []struct {
	probe
	found *bool
} {
	type p = struct {
		probe
		found *bool
	}
	return []p{
		{probe{"bpf_set_retval in connect programs", "5.18", "a connection that is refused for want of memory ends with EPERM rather than ECONNREFUSED", probeSetRetval}, &f.SetRetval},
		{probe{"bpf_skc_to_mptcp_sock", "5.19", "MPTCP sockets do not see the original destination", helper(ebpf.SockOps, asm.FnSkcToMptcpSock)}, &f.MPTCPSock},
		{probe{"ingress_ifindex in sk_lookup programs", "5.17", "loopback traffic is told by its addresses, and TPROXY mode cannot be had", probeIngressIfindex}, &f.IngressIfindex},
		{probe{"TCX links", "6.6", "--tc=tcx cannot be asked for; --inbound=tc refuses MPTCP listeners with SO_REUSEPORT", probeTCX}, &f.TCX},
		{probe{"sendmsg and recvmsg programs", "5.2", "--dns cannot be asked for: DNS over UDP cannot be captured", probeUDP}, &f.UDP},
	}
}

// Probe returns the kernel's features, or ErrKernel with what is missing.
func Probe() (Features, error) {
	f, findings := examine()
	for _, finding := range findings {
		if finding.Required && !finding.OK {
			return Features{}, fmt.Errorf("%w: it lacks %s (%s), so %s. Linux 5.15 or newer has it", ErrKernel, finding.Name, finding.Error, finding.Means)
		}
	}
	return f, nil
}

// Findings lists everything that Probe looks at.
func Findings() []Finding {
	_, findings := examine()
	return findings
}

func examine() (Features, []Finding) {
	var f Features
	var out []Finding
	// Before 5.11 probes count against the limit of locked memory; where it
	// cannot be raised, the probes say so themselves.
	_ = rlimit.RemoveMemlock()
	for _, p := range required {
		out = append(out, p.finding(true))
	}
	for _, p := range f.optional() {
		finding := p.finding(false)
		*p.found = finding.OK
		out = append(out, finding)
	}
	return f, out
}

func (p probe) finding(isRequired bool) Finding {
	out := Finding{Name: p.name, Required: isRequired, Means: p.means}
	err := p.try()
	switch {
	case err == nil:
		out.OK = true
	case errors.Is(err, ebpf.ErrNotSupported):
		out.Error = "not in this kernel, since Linux " + p.since
	default:
		// A probe that a new kernel refuses for its form says nothing about
		// what is needed: loading the real programs decides.
		out.OK = isRequired && !errors.Is(err, unix.EPERM)
		out.Error = "could not be probed: " + err.Error()
	}
	return out
}

func probeSetRetval() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, -1),
			asm.FnSetRetval.Call(),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return(),
		},
	})
	return closeProbe(prog, err)
}

func probeIngressIfindex() error {
	const offset = 64 // offsetof(struct bpf_sk_lookup, ingress_ifindex)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, offset, asm.Word),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return(),
		},
	})
	return closeProbe(prog, err)
}

// probeUDP tries the youngest of the four: recvmsg came for both families at once,
// after sendmsg.
func probeUDP() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupUDP4Recvmsg, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	return closeProbe(prog, err)
}

// probeTCX attaches to an interface that cannot exist: a kernel that has TCX
// looks for it, one that has not refuses the attach type first.
func probeTCX() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return err
	}
	defer prog.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: math.MaxInt32, Program: prog, Attach: ebpf.AttachTCXEgress})
	if err == nil {
		return errors.Join(errors.New("interface 2147483647 exists"), l.Close())
	}
	if errors.Is(err, os.ErrNotExist) || isNoDevice(err) {
		return nil
	}
	return ebpf.ErrNotSupported
}

func closeProbe(prog *ebpf.Program, err error) error {
	if err != nil {
		return fmt.Errorf("%w: %w", ebpf.ErrNotSupported, err)
	}
	return prog.Close()
}
