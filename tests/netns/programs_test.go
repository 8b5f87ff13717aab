package netns

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/tests/kit"
)

// tcxPrograms counts those of an interface, in both directions. Kernels without
// TCX have none.
func tcxPrograms(t *testing.T, p *kit.Pod, name string) int {
	t.Helper()
	n := 0
	var index int
	p.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	})
	err := p.Do(func() error {
		for _, where := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			found, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: where})
			if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
				continue
			}
			if err != nil {
				return err
			}
			n += len(found.Programs)
		}
		return nil
	})
	if err != nil {
		t.Fatal("query TCX programs:", err)
	}
	return n
}

// addFilter adds a clsact qdisc and a BPF filter on egress, as another tool would,
// and returns its name.
func addFilter(t *testing.T, p *kit.Pod, name string) string {
	t.Helper()
	const somebodys = "somebodys"
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	p.Netlink(func(h *netlink.Handle) error {
		l, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		index := l.Attrs().Index
		qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		return errors.Join(h.QdiscAdd(qdisc), h.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_EGRESS, Priority: 1, Protocol: unix.ETH_P_ALL},
			Fd:          prog.FD(), Name: somebodys, DirectAction: true,
		}))
	})
	return somebodys
}
