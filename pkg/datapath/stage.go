package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
)

// Below Dir/Layout, beside maps and links, may be:
//
//	maps-new   maps of another shape, being made from those in maps
//	maps-old   the maps before, being removed
//	halfway    programs are being moved from maps to maps-new: nobody may write
//
// What is in maps is in force until the very end. Who is cut off leaves it, or
// maps-old, as it was, and the next Up, of whatever version, begins again.
const (
	stageSuffix  = "-new" // a bpffs takes no dots
	trashSuffix  = "-old"
	halfwayName  = "halfway"
	layoutPrefix = "layout-" // an empty directory among the pins: the digest of their layout
)

// ErrHalfway is returned while the programs in force are of two versions with
// different maps.
var ErrHalfway = errors.New("a replacement of Sluice's programs was cut off")

func (d *Datapath) halfway() string { return filepath.Join(d.opts.Dir, Layout, halfwayName) }

func (d *Datapath) isHalfway() error {
	if _, err := os.Stat(d.halfway()); err != nil {
		return nil
	}
	return fmt.Errorf("%w below %s; starting sluiced or %s completes it", ErrHalfway, d.opts.Dir, d.opts.hint("up"))
}

// recoverMaps undoes what a replacement that was cut off did to the directories.
func recoverMaps(mapsDir string) error {
	if _, err := os.Stat(mapsDir); errors.Is(err, os.ErrNotExist) {
		err := os.Rename(mapsDir+trashSuffix, mapsDir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("put %s back: %w", mapsDir, err)
		}
	}
	return errors.Join(os.RemoveAll(mapsDir+stageSuffix), os.RemoveAll(mapsDir+trashSuffix))
}

// adoptMaps opens the pinned maps for programs that are about to be loaded: as
// they are where their layout is ours, else as copies, staged. Missing ones are
// created.
func (d *Datapath) adoptMaps() (staged bool, err error) {
	specs, err := d.mapSpecs()
	if err != nil {
		return false, err
	}
	if err := recoverMaps(d.mapsDir()); err != nil {
		return false, err
	}
	if err := os.MkdirAll(d.mapsDir(), 0o700); err != nil {
		return false, fmt.Errorf("make %s: %w", d.mapsDir(), err)
	}
	missing := map[string]*ebpf.MapSpec{}
	var changed []string
	for name, spec := range specs {
		there, err := ebpf.LoadPinnedMap(filepath.Join(d.mapsDir(), name), nil)
		if errors.Is(err, os.ErrNotExist) {
			missing[name] = spec
			continue
		}
		if err != nil {
			return false, fmt.Errorf("open %s: %w", name, err)
		}
		d.maps[name] = there
		spec.MaxEntries = there.MaxEntries() // chosen at the first start
		ok, err := usable(there, spec)
		if err != nil {
			return false, fmt.Errorf("%w; %s removes them, and takes every pod out of the mesh", err, d.opts.hint("down"))
		}
		if !ok {
			changed = append(changed, name)
		}
	}
	for _, name := range changed {
		old := d.maps[name]
		if d.maps[name], err = converted(old, specs[name]); err != nil {
			d.maps[name] = old
			return false, err
		}
		_ = old.Close()
	}
	dir := d.mapsDir()
	if len(changed) > 0 {
		d.opts.Log.WithField("maps", changed).Info("the pinned maps are of another version: copying them")
		dir += stageSuffix
		if err := d.stage(dir); err != nil {
			return false, err
		}
	}
	for name, spec := range missing {
		if d.maps[name], err = createMap(spec, filepath.Join(dir, name)); err != nil {
			delete(d.maps, name)
			return false, err
		}
		failpoint.Step("up: map " + name + " pinned")
	}
	return len(changed) > 0, d.markLayout(dir, specs)
}

// stage pins every map that is open below another directory.
func (d *Datapath) stage(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	for name, m := range d.maps {
		clone, err := m.Clone() // one that is pinned already would be moved
		if err != nil {
			return fmt.Errorf("duplicate %s: %w", name, err)
		}
		err = clone.Pin(filepath.Join(dir, name))
		if err = errors.Join(err, clone.Close()); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
		failpoint.Step("up: map " + name + " staged")
	}
	return nil
}

// markLayout says whose layout the maps in a directory have.
func (d *Datapath) markLayout(dir string, specs map[string]*ebpf.MapSpec) error {
	digest, err := digestOf(specs)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list %s: %w", dir, err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), layoutPrefix) && e.Name() != layoutPrefix+digest {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("remove the mark of another version: %w", err)
			}
		}
	}
	if err := os.Mkdir(filepath.Join(dir, layoutPrefix+digest), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("mark the maps' layout: %w", err)
	}
	failpoint.Step("up: layout marked")
	return nil
}

// checkLayout wants the pinned maps to have this version's layout.
func (d *Datapath) checkLayout(digest string) error {
	if _, err := os.Stat(filepath.Join(d.mapsDir(), layoutPrefix+digest)); err == nil {
		return nil
	}
	if marks, _ := filepath.Glob(filepath.Join(d.mapsDir(), layoutPrefix+"*")); len(marks) > 0 {
		return fmt.Errorf("%w: those in %s are for %s, and this version has %s; %s or sluiced of this version converts them", ErrLayout, d.mapsDir(), filepath.Base(marks[0]), layoutPrefix+digest, d.opts.hint("up"))
	}
	return fmt.Errorf("%w completely: the maps in %s are not all there; %s repairs it", ErrNotUp, d.mapsDir(), d.opts.hint("up"))
}

// enterHalfway forbids writing, before the first program uses staged maps.
func (d *Datapath) enterHalfway() error {
	if err := os.Mkdir(d.halfway(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make %s: %w", d.halfway(), err)
	}
	failpoint.Step("up: halfway")
	return nil
}

// commit puts staged maps in force, once every program uses them, and allows
// writing again. A directory cannot be exchanged on a bpffs of every kernel, so
// there is a moment without one.
func (d *Datapath) commit(staged bool) error {
	dir := d.mapsDir()
	if staged {
		if err := os.Rename(dir, dir+trashSuffix); err != nil {
			return fmt.Errorf("put the old maps aside: %w", err)
		}
		failpoint.Step("up: old maps aside")
		if err := os.Rename(dir+stageSuffix, dir); err != nil {
			return fmt.Errorf("put the new maps in force: %w", err)
		}
		failpoint.Step("up: new maps in force")
	}
	if err := os.Remove(d.halfway()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", d.halfway(), err)
	}
	failpoint.Step("up: whole again")
	if err := os.RemoveAll(dir + trashSuffix); err != nil {
		return fmt.Errorf("remove the old maps: %w", err)
	}
	failpoint.Step("up: old maps removed")
	return d.removeStrangers()
}

// removeStrangers removes programs and maps of another version that this one does
// not have: it would not keep them current.
func (d *Datapath) removeStrangers() error {
	ours := map[string]bool{placeCgroup: true, placeSockopt: true}
	for _, hook := range nodeHooks {
		ours[hook.name] = true
	}
	nodeErr := removeExcept(filepath.Join(d.linksDir(), "node"), func(name string) bool { return ours[name] })
	return errors.Join(nodeErr, removeExcept(d.mapsDir(), func(name string) bool {
		return d.maps[name] != nil || strings.HasPrefix(name, layoutPrefix)
	}))
}

func removeExcept(dir string, keep func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list %s: %w", dir, err)
	}
	var errs error
	for _, e := range entries {
		if keep(e.Name()) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			errs = errors.Join(errs, fmt.Errorf("remove a pin of another version: %w", err))
		}
		failpoint.Step("up: stranger removed")
	}
	return errs
}

// lock is the datapath's lock for who writes maps: nothing may have been put in
// the place of what was opened meanwhile, and all programs must use one set.
func (d *Datapath) lock() (unlock func(), err error) {
	unlock, err = lock(d.opts.Dir)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(d.isHalfway(), d.StillUp()); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// foreignScheme refuses a directory with pins of a scheme that is not this one.
func (o Options) foreignScheme() error {
	entries, err := os.ReadDir(o.Dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		return fmt.Errorf("list %s: %w", o.Dir, err)
	}
	for _, e := range entries {
		name := e.Name()
		if len(name) > 1 && name[0] == 'v' && strings.Trim(name[1:], "0123456789") == "" && name != Layout {
			return fmt.Errorf("%w: %s is pinned in a way that this version does not know; run %s of the version that made it", ErrLayout, filepath.Join(o.Dir, name), o.hint("down"))
		}
	}
	return nil
}
