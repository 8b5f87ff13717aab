package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// ErrCgroupGone is returned where the programs' cgroup has been removed.
var ErrCgroupGone = errors.New("the programs' cgroup is gone")

// place is the cgroup directory of a hook, and a symbolic link to it beside the
// node's links: the kernel tells a cgroup by number, and not at all once it is
// gone.
func (d *Datapath) place(hook nodeHook) (dir, mark string) {
	if hook.sockopt {
		return d.opts.SockoptCgroup, placeSockopt
	}
	return d.opts.Cgroup, placeCgroup
}

const (
	placeCgroup  = "cgroup"
	placeSockopt = "sockopt-cgroup"
)

// checkPlaces refuses, before anything is changed, to move what is attached: to
// another cgroup never, for the pods that are enrolled would be seen by nobody;
// from one that is gone only at the caller's word, for the default is the whole
// machine.
func (d *Datapath) checkPlaces() error {
	for _, hook := range nodeHooks {
		dir, mark := d.place(hook)
		where, err := d.attachedTo(hook)
		switch {
		case errors.Is(err, os.ErrNotExist) || err == nil && where == cgroupID(dir):
			continue
		case err != nil:
			return err
		}
		was, readErr := os.Readlink(d.nodePin(mark))
		if where != 0 {
			if readErr == nil {
				was = " (" + was + ")"
			}
			return fmt.Errorf("%w: %s is attached to cgroup %d%s, not to %s (%d); give the same cgroup, or run %s first", ErrElsewhere, hook.name, where, was, dir, cgroupID(dir), d.opts.hint("down"))
		}
		if d.opts.Reattach {
			continue
		}
		if readErr != nil {
			was = "its directory is not known"
		}
		return fmt.Errorf("%w: what is pinned below %s was attached to one that has been removed since (%s). Give the cgroup to attach to now with --cgroup, or run %s first", ErrCgroupGone, d.opts.Dir, was, d.opts.hint("down"))
	}
	return nil
}

// attachedTo is the ID of the cgroup that a pinned link is attached to; 0 if that
// is gone.
func (d *Datapath) attachedTo(hook nodeHook) (uint64, error) {
	l, err := link.LoadPinnedLink(d.nodePin(hook.name), nil)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", d.nodePin(hook.name), err)
	}
	defer l.Close()
	return cgroupOf(l), nil
}

// markPlaces writes down where the node's programs are attached, by name.
func (d *Datapath) markPlaces() error {
	for _, hook := range nodeHooks {
		dir, mark := d.place(hook)
		absolute, err := filepath.Abs(dir)
		if err != nil {
			return fmt.Errorf("name the cgroup %s: %w", dir, err)
		}
		path := d.nodePin(mark)
		if was, err := os.Readlink(path); err == nil && was == absolute {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove %s: %w", path, err)
		}
		if err := os.Symlink(absolute, path); err != nil {
			return fmt.Errorf("note the cgroup: %w", err)
		}
	}
	return nil
}

// Find lists where a datapath is pinned: dir itself, and the directories in it.
func Find(dir string) []string {
	candidates := []string{dir}
	entries, _ := os.ReadDir(dir) // what cannot be read is not known
	for _, e := range entries {
		if e.IsDir() {
			candidates = append(candidates, filepath.Join(dir, e.Name()))
		}
	}
	return slices.DeleteFunc(candidates, func(dir string) bool {
		_, err := os.Stat((&Datapath{opts: Options{Dir: dir}}).mapsDir())
		return err != nil
	})
}

// Others are the directories of the other datapaths that are attached to the
// cgroup of this one, which must have been brought up by this process: each knows
// its own pods alone.
func (d *Datapath) Others() ([]string, error) {
	f, err := os.Open(d.opts.Cgroup)
	if err != nil {
		return nil, fmt.Errorf("look who else is attached: %w", err)
	}
	defer f.Close()
	all, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: ebpf.AttachCGroupInet4Connect})
	if err != nil {
		return nil, fmt.Errorf("look who else is attached to %s: %w", d.opts.Cgroup, err)
	}
	own, err := mapID(d.maps["pods"])
	if err != nil {
		return nil, err
	}
	known := pinnedPods()
	others := map[ebpf.MapID]string{}
	for _, p := range all.Programs {
		if id, ok := podsOf(p.ID); ok && id != own {
			others[id] = cmp.Or(known[id], "a directory that is not visible here")
		}
	}
	return slices.Sorted(maps.Values(others)), nil
}

// pinnedPods are the maps of pods that are pinned in sight, and their datapaths'
// directories.
func pinnedPods() map[ebpf.MapID]string {
	out := map[ebpf.MapID]string{}
	for _, mount := range kernel.BPFFSMounts() {
		for _, dir := range Find(mount) {
			pods, err := ebpf.LoadPinnedMap((&Datapath{opts: Options{Dir: dir}}).mapsDir()+"/pods", nil)
			if err != nil {
				continue
			}
			if id, err := mapID(pods); err == nil {
				out[id] = dir
			}
			pods.Close()
		}
	}
	return out
}

// podsOf is the map of pods that a connect program of Sluice's uses.
func podsOf(program ebpf.ProgramID) (ebpf.MapID, bool) {
	prog, err := ebpf.NewProgramFromID(program)
	if err != nil {
		return 0, false // it has gone meanwhile
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil || info.Name != "connect4" {
		return 0, false
	}
	ids, _ := info.MapIDs()
	var pods ebpf.MapID
	names := map[string]bool{}
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue
		}
		if info, err := m.Info(); err == nil {
			names[info.Name] = true
			if info.Name == "pods" {
				pods = id
			}
		}
		m.Close()
	}
	return pods, names["pods"] && names["own_addrs"] && names["proxy_ids"] // a program of anybody's may be named connect4
}
