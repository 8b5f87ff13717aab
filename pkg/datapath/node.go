package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/kernel"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// nodeHook is a program of the node and the point it is attached to.
type nodeHook struct {
	name    string
	attach  ebpf.AttachType
	sockopt bool // on Options.SockoptCgroup
}

// hooks, in the order in which they are attached and replaced: what hands over
// an original destination comes before what captures, so that a connection that
// is captured always finds its other half.
var nodeHooks = []nodeHook{
	{"getsockopt", ebpf.AttachCGroupGetsockopt, true},
	{"getpeername4", ebpf.AttachCgroupInet4GetPeername, false},
	{"getpeername6", ebpf.AttachCgroupInet6GetPeername, false},
	{"getsockname4", ebpf.AttachCgroupInet4GetSockname, false},
	{"getsockname6", ebpf.AttachCgroupInet6GetSockname, false},
	{"post_bind4", ebpf.AttachCGroupInet4PostBind, false},
	{"post_bind6", ebpf.AttachCGroupInet6PostBind, false},
	{"sock_ops", ebpf.AttachCGroupSockOps, false},
	{"recvmsg4", ebpf.AttachCGroupUDP4Recvmsg, false},
	{"recvmsg6", ebpf.AttachCGroupUDP6Recvmsg, false},
	{"sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, false},
	{"sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, false},
	{"connect4", ebpf.AttachCGroupInet4Connect, false},
	{"connect6", ebpf.AttachCGroupInet6Connect, false},
}

// udpHooks capture DNS over UDP, and are left out where the kernel lacks one.
var udpHooks = []string{"recvmsg4", "recvmsg6", "sendmsg4", "sendmsg6"}

func isUDP(hook string) bool { return slices.Contains(udpHooks, hook) }

// Up loads, pins and attaches the node's programs. Where they are attached
// already it replaces them in place, each link atomically, and those of every
// enrolled pod. A start that was cut off is completed by the next.
func Up(opts Options) (*Datapath, error) {
	opts.complete()
	d := &Datapath{opts: opts, maps: map[string]*ebpf.Map{}}
	features, err := opts.probe()
	if err != nil {
		return nil, err
	}
	d.probed = func() Features { return features }
	if err := d.prepare(); err != nil {
		return nil, err
	}
	unlock, err := lock(opts.Dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.up(); err != nil {
		if d.isHalfway() == nil { // no program uses what was staged
			err = errors.Join(err, os.RemoveAll(d.mapsDir()+stageSuffix))
		}
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// up loads everything before it changes anything that is in force.
func (d *Datapath) up() error {
	if err := d.checkPlaces(); err != nil {
		return err
	}
	staged, err := d.adoptMaps()
	if err != nil {
		return err
	}
	if err := d.settleShares(); err != nil {
		return err
	}
	programs, closeAll, err := d.loadNode()
	if err != nil {
		return err
	}
	defer closeAll()
	shared, closeShared, err := d.loadShared()
	if err != nil {
		return err
	}
	defer closeShared()
	if staged {
		if err := d.enterHalfway(); err != nil {
			return err
		}
	}
	if err := d.replaceShared(shared); err != nil {
		return err
	}
	for _, hook := range nodeHooks {
		if isUDP(hook.name) && !d.Features().UDP {
			continue
		}
		if err := d.attachNode(hook, programs[hook.name]); err != nil {
			return err
		}
		failpoint.Step("up: " + hook.name + " in force")
	}
	if err := d.commit(staged); err != nil {
		return err
	}
	if err := d.markPlaces(); err != nil { // only messages need it
		d.opts.Log.WithError(err).Warn("the name of the programs' cgroup is not written down")
	}
	return d.repairPods()
}

func (d *Datapath) loadNode() (map[string]*ebpf.Program, func(), error) {
	specs, err := loadNodeSpecs()
	if err != nil {
		return nil, nil, fmt.Errorf("read the node programs: %w", err)
	}
	values := map[string]any{
		"have_set_retval": d.Features().SetRetval,
		"have_mptcp_sock": d.Features().MPTCPSock,
		"handshake_share": d.opts.HandshakeShare,
		"target_share":    d.opts.TargetShare,
	}
	wanted := []*ebpf.CollectionSpec{specs.connect, specs.names, specs.sockops, specs.sockopt}
	if d.Features().UDP {
		wanted = append(wanted, specs.udp)
	}
	programs, closeAll, err := d.loadAll(wanted, values)
	if err != nil {
		return nil, nil, fmt.Errorf("load the node programs: %w", err)
	}
	return programs, closeAll, nil
}

// loadAll loads the programs of some objects, by name.
func (d *Datapath) loadAll(specs []*ebpf.CollectionSpec, values map[string]any) (map[string]*ebpf.Program, func(), error) {
	programs := map[string]*ebpf.Program{}
	var loaded []*ebpf.Collection
	closeAll := func() {
		for _, c := range loaded {
			c.Close()
		}
	}
	for _, spec := range specs {
		c, err := d.load(spec, values)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		loaded = append(loaded, c)
		for name, p := range c.Programs {
			programs[name] = p
		}
	}
	return programs, closeAll, nil
}

// attachNode replaces the program of a pinned link, or attaches and pins a new
// one. A link whose cgroup is gone is made anew: see checkPlaces.
func (d *Datapath) attachNode(hook nodeHook, prog *ebpf.Program) error {
	dir, _ := d.place(hook)
	pin := d.nodePin(hook.name)
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		if cgroupOf(old) != 0 {
			if err := old.Update(prog); err != nil {
				return fmt.Errorf("replace %s: %w", hook.name, err)
			}
			return nil
		}
		if err := old.Unpin(); err != nil {
			return fmt.Errorf("unpin %s: %w", pin, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("open %s: %w", pin, err)
	}
	l, err := attachCgroup(dir, hook.attach, prog)
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", hook.name, dir, err)
	}
	defer l.Close()
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin %s: %w", pin, err)
	}
	return nil
}

func attachCgroup(dir string, attach ebpf.AttachType, prog *ebpf.Program) (link.Link, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	opts := link.RawLinkOptions{Target: int(f.Fd()), Program: prog, Attach: attach, Flags: unix.BPF_F_PREORDER}
	l, err := link.AttachRawLink(opts)
	if errors.Is(err, unix.EINVAL) {
		// Older kernels have no PREORDER: programs of child cgroups run first.
		opts.Flags = 0
		l, err = link.AttachRawLink(opts)
	}
	return l, err
}

// cgroupOf is the ID of the cgroup that a link is attached to; 0 if it is gone.
func cgroupOf(l link.Link) uint64 {
	info, err := l.Info()
	if err != nil || info.Cgroup() == nil {
		return 0
	}
	return info.Cgroup().CgroupId
}

func cgroupID(dir string) uint64 {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return 0
	}
	return st.Ino
}

// Down removes every link, filter, map and pin below dir, waits until the kernel
// has let go of them, and reports how many pods were enrolled. Without any of it,
// it does nothing.
func Down(dir string) (pods int, err error) {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err := kernel.IsBPFFS(dir); err != nil {
		return 0, err // whatever that directory is, it is not ours to remove
	}
	unlock, err := lock(dir)
	if err != nil {
		return 0, err
	}
	defer unlock()
	if err := recoverMaps((&Datapath{opts: Options{Dir: dir}}).mapsDir()); err != nil {
		return 0, err
	}
	held := holdingsOf(&Datapath{opts: Options{Dir: dir}})
	pods, podErrs := removePods(dir)
	failpoint.Step("down: pods forgotten")
	// Captures first: connect programs go before what completes a handshake.
	for i := len(nodeHooks) - 1; i >= 0; i-- {
		pin := (&Datapath{opts: Options{Dir: dir}}).nodePin(nodeHooks[i].name)
		if e := os.Remove(pin); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("unpin %s: %w", pin, e))
		}
		failpoint.Step("down: " + nodeHooks[i].name + " unpinned")
	}
	err = errors.Join(err, removeOurs(dir))
	held.awaitGone()
	return pods, errors.Join(err, podErrs)
}

// removeOurs removes what Up makes below dir, and dir where nothing else is in
// it: dir is a user's word, and may be a whole bpffs with other people's pins.
func removeOurs(dir string) error {
	var errs error
	for _, name := range []string{"maps", halfwayName, filepath.Join("links", "node"), filepath.Join("links", "pods")} {
		if err := os.RemoveAll(filepath.Join(dir, Layout, name)); err != nil {
			errs = errors.Join(errs, fmt.Errorf("remove the pins: %w", err))
		}
		failpoint.Step("down: " + name + " removed")
	}
	for _, path := range []string{filepath.Join(dir, Layout, "links"), filepath.Join(dir, Layout), dir} {
		err := os.Remove(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) {
			errs = errors.Join(errs, fmt.Errorf("remove %s: %w", path, err))
		}
	}
	return errs
}

// removePods takes the programs of every pod away, then forgets it: a filter in
// a namespace that cannot be found any more passes everything after that. A pod
// whose enrolment was cut off may have an entry and no links.
func removePods(dir string) (int, error) {
	d := &Datapath{opts: Options{Dir: dir}}
	pods := map[uint64]connectPod{}
	entries, err := os.ReadDir(filepath.Join(d.linksDir(), "pods"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("list the pods' links: %w", err)
	}
	for _, e := range entries {
		if cookie, err := strconv.ParseUint(e.Name(), 10, 64); err == nil {
			pods[cookie] = connectPod{}
		}
	}
	table, err := d.readable("pods")
	if err == nil {
		defer table.Close()
		if err := eachPod(table, func(cookie uint64, p connectPod) { pods[cookie] = p }); err != nil {
			return len(pods), err
		}
	}
	if len(pods) == 0 {
		return 0, nil
	}
	reroutes, err := d.readable("reroutes")
	if err == nil {
		defer reroutes.Close()
	}
	paths := netns.ByCookie()
	var errs error
	for cookie, pod := range pods {
		var ns *netns.NetNS
		if path, ok := paths[cookie]; ok {
			if ns, err = netns.Open(path); err != nil {
				ns = nil // it ended meanwhile
			}
		}
		if reroutes != nil {
			errs = errors.Join(errs, unreroute(reroutes, cookie, ns))
		}
		errs = errors.Join(errs, d.detachPod(cookie, ns), restoreNamespace(ns, pod))
		if ns != nil {
			errs = errors.Join(errs, ns.Close())
		}
	}
	return len(pods), errors.Join(errs, d.clear("pods"))
}

// Attached says which of the node's programs are attached, by name, and to
// which cgroup ID.
func (d *Datapath) Attached() map[string]uint64 {
	out := map[string]uint64{}
	for _, hook := range nodeHooks {
		l, err := link.LoadPinnedLink(d.nodePin(hook.name), &ebpf.LoadPinOptions{ReadOnly: false})
		if err != nil {
			continue
		}
		if info, err := l.Info(); err == nil && info.Cgroup() != nil {
			out[hook.name] = info.Cgroup().CgroupId
		}
		l.Close()
	}
	return out
}

func isNoDevice(err error) bool { return errors.Is(err, unix.ENODEV) }
