package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// attachPod attaches what the pod should have and is not attached yet, replaces
// what is, and detaches what it should not have. The inbound program comes
// last: where its pin is, the pod is complete.
func (d *Datapath) attachPod(ns *netns.NetNS, network netns.Network, entries podNetwork, flags connectPodFlags, already bool) error {
	if _, err := d.attachInterfaces(ns, network, entries, flags, false); err != nil {
		return err
	}
	failpoint.Step("attach: interfaces")
	prog, err := d.loadStub(progInbound, ns.Cookie(), false)
	if err != nil {
		return err
	}
	defer prog.Close()
	if err := d.attachInbound(ns, prog); err != nil {
		return fmt.Errorf("attach sk_lookup to %s: %w", ns.Path(), err)
	}
	failpoint.Step("attach: inbound")
	if !already {
		return nil
	}
	return d.detachInterfaces(ns, network, entries, flags)
}

// attachInterfaces attaches the TC programs, or just the missing ones, and says
// which. What goes through an excluded interface is nobody's business: it gets
// none.
func (d *Datapath) attachInterfaces(ns *netns.NetNS, network netns.Network, entries podNetwork, flags connectPodFlags, missing bool) (attached []string, err error) {
	dir := d.podDir(ns.Cookie())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make %s: %w", dir, err)
	}
	failpoint.Step("attach: directory made")
	for _, name := range tcProgramNames(flags) {
		for _, l := range network.Links {
			if !d.wantsTC(l, name, entries) || missing && d.hasTC(ns, l, name, flags) {
				continue
			}
			e := d.attachTC(ns, l, name, flags)
			switch {
			case e == nil:
				attached = append(attached, name+" to "+l.Name)
				failpoint.Step("attach: " + name)
			case !missing || !isGone(e): // an interface may go while it is looked at
				err = errors.Join(err, fmt.Errorf("attach %s to %s of %s: %w", name, l.Name, ns.Path(), e))
			}
		}
	}
	if err != nil {
		return attached, err
	}
	rerouted, err := d.rerouteInterfaces(ns, network, entries, flags, missing)
	return append(attached, rerouted...), err
}

// detachInterfaces removes TC programs that the pod should not have, and the
// pins of those whose interface is gone.
func (d *Datapath) detachInterfaces(ns *netns.NetNS, network netns.Network, entries podNetwork, flags connectPodFlags) error {
	wanted := map[string]bool{progInbound: true}
	for _, name := range tcProgramNames(flags) {
		for _, l := range network.Links {
			wanted[tcPin(name, l.Index)] = d.wantsTC(l, name, entries)
		}
	}
	for _, l := range network.Links {
		for _, name := range rerouting {
			wanted[tcPin(name, l.Index)] = entries.reroutes(l.Index)
		}
	}
	return d.detachExcept(d.podDir(ns.Cookie()), wanted, flags, ns)
}

// hasTC says whether a TC program is attached to an interface.
func (d *Datapath) hasTC(ns *netns.NetNS, l netns.Link, name string, flags connectPodFlags) bool {
	if flags&connectPodFlagsPOD_TCX == 0 {
		return hasClsact(ns, l, name)
	}
	there, err := link.LoadPinnedLink(filepath.Join(d.podDir(ns.Cookie()), tcPin(name, l.Index)), nil)
	if err != nil {
		return false
	}
	defer there.Close()
	info, err := there.Info()
	return err == nil && info.TCX() != nil && int(info.TCX().Ifindex) == l.Index // 0: its interface is gone
}

func isGone(err error) bool { return isNoDevice(err) || errors.Is(err, os.ErrNotExist) }

// tcProgramNames are the TC programs that a pod with these flags has.
func tcProgramNames(flags connectPodFlags) []string {
	var names []string
	if flags&connectPodFlagsPOD_GUARD != 0 {
		names = append(names, progGuard)
	}
	if flags&connectPodFlagsPOD_INBOUND_TC != 0 {
		names = append(names, progTCInbound)
	}
	return names
}

func tcPin(name string, ifindex int) string { return name + "_" + strconv.Itoa(ifindex) }

// replaceOrPin replaces the program of a pinned link, or attaches and pins.
func replaceOrPin(pin string, prog *ebpf.Program, attach func() (link.Link, error)) error {
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		err := old.Update(prog)
		if err == nil {
			return nil
		}
		// What it was attached to is gone: attach anew.
		if err := old.Unpin(); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := attach()
	if err != nil {
		return err
	}
	defer l.Close()
	failpoint.Step("attach: link made, not pinned")
	return l.Pin(pin)
}

func (d *Datapath) attachTC(ns *netns.NetNS, l netns.Link, name string, flags connectPodFlags) error {
	prog, err := d.loadStub(name, ns.Cookie(), l.Ethernet)
	if err != nil {
		return err
	}
	defer prog.Close()
	if flags&connectPodFlagsPOD_TCX == 0 {
		return attachClsact(ns, l, name, prog)
	}
	where := ebpf.AttachTCXEgress
	if name == progTCInbound || name == progRerouteIn {
		where = ebpf.AttachTCXIngress
	}
	return replaceOrPin(filepath.Join(d.podDir(ns.Cookie()), tcPin(name, l.Index)), prog, func() (out link.Link, err error) {
		err = ns.Do(func() error {
			out, err = link.AttachTCX(link.TCXOptions{Interface: l.Index, Program: prog, Attach: where, Anchor: link.Head()})
			return err
		})
		return out, err
	})
}

// detachExcept removes the pod's links and filters that are not wanted: by flags
// a wanted TC program is a link or a filter.
func (d *Datapath) detachExcept(dir string, wanted map[string]bool, flags connectPodFlags, ns *netns.NetNS) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", dir, err)
	}
	var errs error
	for _, e := range entries {
		if wanted == nil && (e.Name() == progInbound || e.Name() == progLife) {
			continue
		}
		isLink := e.Name() == progInbound || flags&connectPodFlagsPOD_TCX != 0
		if !wanted[e.Name()] || !isLink {
			pin := filepath.Join(dir, e.Name())
			if wanted != nil { // the pod lives on: not in a while, but now
				errs = errors.Join(errs, detachNow(pin))
			}
			if err := os.Remove(pin); !errors.Is(err, os.ErrNotExist) {
				errs = errors.Join(errs, err)
			}
		}
	}
	if ns == nil {
		return errs // filters are gone with the namespace
	}
	return errors.Join(errs, detachClsact(ns, func(name string, ifindex int) bool {
		return wanted[tcPin(name, ifindex)] && flags&connectPodFlagsPOD_TCX == 0
	}))
}

// detachPod removes all of a pod's programs. A dead namespace has taken them
// along, and leaves only pins.
func (d *Datapath) detachPod(cookie uint64, ns *netns.NetNS) error {
	dir := d.podDir(cookie)
	// Removing a pin detaches later, from a worker: until then the pod, which is
	// not in the map any more, would be refused everything.
	// Their pins stay until the entry is gone (endLife): killed in between, they say
	// that the pod was being let go.
	err := errors.Join(cut(filepath.Join(dir, progInbound)), cut(filepath.Join(dir, progLife)))
	failpoint.Step("detach: inbound")
	err = errors.Join(err, d.detachExcept(dir, nil, 0, ns))
	failpoint.Step("detach: interfaces")
	return err
}

// cut detaches a link and leaves its pin.
func cut(pin string) error { return detachAfter(pin, func(link.Link) error { return nil }) }

// detachNow removes the pin before it detaches: a link that is pinned and attached
// to nothing is, for who finds it, one whose namespace is gone. Killed in between,
// we take the link along.
func detachNow(pin string) error {
	return detachAfter(pin, func(l link.Link) error {
		if err := l.Unpin(); err != nil {
			return fmt.Errorf("unpin %s: %w", pin, err)
		}
		failpoint.Step("unenroll: link unpinned")
		return nil
	})
}

// detachAfter detaches a pinned link, if there is one, once first is done.
func detachAfter(pin string, first func(link.Link) error) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", pin, err)
	}
	defer l.Close()
	if err := first(l); err != nil {
		return err
	}
	if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("detach %s: %w", pin, err)
	}
	return nil
}
