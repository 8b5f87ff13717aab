package datapath

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// TC programs are filters of a clsact qdisc unless TCX is asked for. They are
// found again by their name.
const (
	clsactPriority = 0x51 // ours alone on the interface, first in evaluation
	filterPrefix   = "sluice_"
)

func clsactParent(name string) uint32 {
	if name == progTCInbound || name == progRerouteIn {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

// clsactHandle tells apart the filters of one direction.
func clsactHandle(name string) uint32 {
	if name == progRerouteIn || name == progRerouteOut {
		return 2
	}
	return 1
}

func attachClsact(ns *netns.NetNS, l netns.Link, name string, prog *ebpf.Program) error {
	handle, err := ns.Handle()
	if err != nil {
		return err
	}
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := handle.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add a clsact qdisc: %w", err)
	}
	failpoint.Step("enroll: qdisc added")
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: l.Index, Parent: clsactParent(name), Handle: clsactHandle(name),
			Protocol: unix.ETH_P_ALL, Priority: clsactPriority,
		},
		Fd: prog.FD(), Name: filterPrefix + name, DirectAction: true,
	}
	if err := handle.FilterReplace(filter); err != nil {
		return fmt.Errorf("add a bpf filter: %w", err)
	}
	return nil
}

// hasClsact says whether our filter is on an interface.
func hasClsact(ns *netns.NetNS, l netns.Link, name string) bool {
	handle, err := ns.Handle()
	if err != nil {
		return false
	}
	on := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.Index}}
	filters, err := handle.FilterList(on, clsactParent(name))
	return err == nil && slices.ContainsFunc(filters, func(f netlink.Filter) bool {
		bpf, ok := f.(*netlink.BpfFilter)
		return ok && bpf.Name == filterPrefix+name
	})
}

// detachClsact removes our filters that are not wanted, and the qdisc where
// nobody else has a filter on it.
func detachClsact(ns *netns.NetNS, wanted func(name string, ifindex int) bool) error {
	handle, err := ns.Handle()
	if err != nil {
		return err
	}
	links, err := handle.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs error
	for _, l := range links {
		err := detachClsactFrom(handle, l, wanted)
		if !isNoDevice(err) { // an interface that went meanwhile has taken them along
			errs = errors.Join(errs, err)
		}
	}
	return errs
}

func detachClsactFrom(handle *netlink.Handle, l netlink.Link, wanted func(string, int) bool) error {
	left, ours := 0, 0
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := handle.FilterList(l, parent)
		if err != nil {
			return fmt.Errorf("list the filters of %s: %w", l.Attrs().Name, err)
		}
		for _, f := range filters {
			bpf, ok := f.(*netlink.BpfFilter)
			if !ok || !strings.HasPrefix(bpf.Name, filterPrefix) || wanted(strings.TrimPrefix(bpf.Name, filterPrefix), l.Attrs().Index) {
				left++
				continue
			}
			ours++
			if err := handle.FilterDel(f); err != nil {
				return fmt.Errorf("remove %s from %s: %w", bpf.Name, l.Attrs().Name, err)
			}
		}
	}
	if left > 0 || ours == 0 {
		return nil
	}
	err := handle.QdiscDel(&netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove the clsact qdisc from %s: %w", l.Attrs().Name, err)
	}
	return nil
}
