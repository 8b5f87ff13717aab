package cni

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// kernelState is everything that a plugin can leave behind: each key of each map,
// each pin, and in a pod's namespace each qdisc, filter, address and rule.
func (n *node) kernelState(p *kit.Pod) []string {
	n.t.Helper()
	var out []string
	err := filepath.WalkDir(filepath.Join(n.bpffs, datapath.Layout), func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		out = append(out, "pin "+path)
		if filepath.Base(filepath.Dir(path)) != "maps" {
			return nil
		}
		keys, err := mapKeys(path)
		out = append(out, keys...)
		return err
	})
	if err != nil {
		n.t.Fatal("read the pins:", err)
	}
	if p != nil {
		out = append(out, namespaceState(p)...)
	}
	slices.Sort(out)
	return out
}

func mapKeys(path string) ([]string, error) {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	if m.Type() == ebpf.SkStorage || m.Type() == ebpf.PerCPUArray || m.Type() == ebpf.ProgramArray {
		return nil, nil // not lists of pods' things
	}
	var out []string
	key := make([]byte, m.KeySize())
	for err = m.NextKey(nil, &key); err == nil; err = m.NextKey(key, &key) {
		out = append(out, filepath.Base(path)+" "+hex.EncodeToString(key))
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("list %s: %w", path, err)
	}
	return out, nil
}

func namespaceState(p *kit.Pod) (out []string) {
	p.Netlink(func(h *netlink.Handle) error {
		links, err := h.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			name := l.Attrs().Name
			qdiscs, err := h.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				out = append(out, fmt.Sprintf("qdisc %s %s", name, q.Type()))
			}
			for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
				filters, err := h.FilterList(l, parent)
				if err != nil {
					return err
				}
				for _, f := range filters {
					out = append(out, fmt.Sprintf("filter %s %s", name, f.Type()))
				}
			}
			addresses, err := h.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, a := range addresses {
				out = append(out, fmt.Sprintf("address %s %s", name, a.IPNet))
			}
		}
		rules, err := h.RuleList(netlink.FAMILY_ALL)
		for _, r := range rules {
			out = append(out, "rule "+r.String())
		}
		return err
	})
	return out
}

// wantState compares, after a plugin was killed at a step. There is one thing that
// may stay: a clsact qdisc without a filter of ours may be anybody's.
func (n *node) wantState(want []string, p *kit.Pod, step string) {
	n.t.Helper()
	got := n.kernelState(p)
	if step == "enroll: qdisc added" {
		got = slices.DeleteFunc(got, func(line string) bool { return line == "qdisc eth0 clsact" })
	}
	if diff := cmp.Diff(want, got); diff != "" {
		n.t.Error("what is left, or missing:", diff)
	}
}
