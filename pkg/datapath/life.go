package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// A link to a network namespace is what tells that the namespace has ended: the
// kernel cuts it then. Nothing else does: a namespace that no process and no name
// leads to may live on, held by a mount or a socket elsewhere. So each pod has
// such a link before it has an entry and until it has none any more: first one
// that passes everything, which enrolment turns into the inbound one at its end.

// progLife is the pin of a link that is to be the inbound one.
const progLife = "life"

// life is what a pod's links say of its namespace.
type life int

const (
	lifeUnknown  life = iota // there is no link: somebody has removed its pin
	lifeOver                 // the kernel has cut it: the namespace has ended, or was being let go
	lifeCutOff               // the namespace lives, and its enrolment was not finished
	lifeComplete             // the namespace lives, and is enrolled completely
)

// lifeOf reads it from the kernel.
func (d *Datapath) lifeOf(cookie uint64) (life, error) {
	out := lifeUnknown
	for _, pin := range []struct {
		name  string
		means life
	}{{progInbound, lifeComplete}, {progLife, lifeCutOff}} {
		attached, err := isAttached(filepath.Join(d.podDir(cookie), pin.name))
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			return lifeUnknown, fmt.Errorf("read the links of pod %d: %w", cookie, err)
		case attached:
			return pin.means, nil
		default:
			out = lifeOver
		}
	}
	return out, nil
}

// isAttached says whether the pinned link to a namespace is not cut.
func isAttached(pin string) (bool, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return false, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	ns := info.NetNs()
	return ns != nil && ns.NetnsInode != 0, nil
}

// beginLife has a link to the namespace, before its entry is written. One that
// is enrolled completely has one.
func (d *Datapath) beginLife(ns *netns.NetNS) error {
	now, err := d.lifeOf(ns.Cookie())
	if err != nil || now == lifeComplete || now == lifeCutOff {
		return err
	}
	dir := d.podDir(ns.Cookie())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: progLife, Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, skPass), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("load the program %s: %w", progLife, err)
	}
	defer prog.Close()
	err = replaceOrPin(filepath.Join(dir, progLife), prog, func() (link.Link, error) {
		return link.AttachNetNs(ns.Fd(), prog)
	})
	if err != nil {
		return fmt.Errorf("attach sk_lookup to %s: %w", ns.Path(), err)
	}
	return nil
}

// attachInbound has the namespace's link run the inbound program, from now on
// under that name.
func (d *Datapath) attachInbound(ns *netns.NetNS, prog *ebpf.Program) error {
	life, inbound := filepath.Join(d.podDir(ns.Cookie()), progLife), filepath.Join(d.podDir(ns.Cookie()), progInbound)
	l, err := link.LoadPinnedLink(life, nil)
	if errors.Is(err, os.ErrNotExist) {
		return replaceOrPin(inbound, prog, func() (link.Link, error) { return link.AttachNetNs(ns.Fd(), prog) })
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", life, err)
	}
	defer l.Close()
	if err := l.Update(prog); err != nil {
		return err
	}
	return os.Rename(life, inbound)
}

// endLife removes the pins of links that are cut, once there is no entry.
func (d *Datapath) endLife(cookie uint64) error {
	if err := os.RemoveAll(d.podDir(cookie)); err != nil {
		return fmt.Errorf("remove the links of pod %d: %w", cookie, err)
	}
	return nil
}

// netnsInode is the inode of an enrolled namespace, for as long as it lives; 0 if
// no link tells.
func (d *Datapath) netnsInode(cookie uint64) uint64 {
	for _, name := range []string{progInbound, progLife} {
		l, err := link.LoadPinnedLink(filepath.Join(d.podDir(cookie), name), nil)
		if err != nil {
			continue
		}
		info, err := l.Info()
		l.Close()
		if err == nil && info.NetNs() != nil && info.NetNs().NetnsInode != 0 {
			return uint64(info.NetNs().NetnsInode)
		}
	}
	return 0
}

// Namespace opens the namespace of an enrolled pod by a process or a name that
// leads to it. found is false if there is none: it has ended, or it is kept by
// something else. Close it.
func (d *Datapath) Namespace(cookie uint64) (ns *netns.NetNS, found bool, err error) {
	path := ""
	if inode := d.netnsInode(cookie); inode != 0 {
		path, found = netns.ByInode(inode)
	} else {
		path, found = netns.ByCookie()[cookie]
	}
	if !found {
		return nil, false, nil
	}
	ns, err = netns.Open(path)
	if err != nil || ns.Cookie() != cookie { // it ended meanwhile, and its number is another's
		if ns != nil {
			err = errors.Join(err, ns.Close())
		}
		return nil, false, err
	}
	return ns, true, nil
}

// find is Namespace for who lets a pod go; nil if there is none.
func (d *Datapath) find(cookie uint64) *netns.NetNS {
	ns, found, err := d.Namespace(cookie)
	if err != nil || !found {
		return nil
	}
	return ns
}
