package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
)

// converted makes a map of this version's from one of another's, not pinned yet,
// with the entries of the other. Give a map that user space alone writes.
func converted(from *ebpf.Map, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	ours, err := shapeOf(spec)
	if err != nil {
		return nil, err
	}
	theirs, err := pinnedShape(from, spec)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLayout, err)
	}
	to, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("create map %s: %w", spec.Name, err)
	}
	var key, value []byte
	entries := from.Iterate()
	for entries.Next(&key, &value) {
		ourKey, keyErr := convert(key, theirs.key, ours.key, int(spec.KeySize))
		ourValue, valueErr := convert(value, theirs.value, ours.value, int(spec.ValueSize))
		if err := errors.Join(keyErr, valueErr); err != nil {
			return nil, errors.Join(fmt.Errorf("%w: convert an entry of %s: %w", ErrLayout, spec.Name, err), to.Close())
		}
		if err := to.Put(ourKey, ourValue); err != nil {
			return nil, errors.Join(tableError(spec.Name, err), to.Close())
		}
	}
	if err := entries.Err(); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", spec.Name, err), to.Close())
	}
	return to, nil
}

// convert writes the fields of an entry where another shape has them. A field
// that only the old shape has is left out, one that only the new one has is zero,
// which must mean what was before it was there. Numbers and texts may grow; they
// may shrink where nothing but zeroes is lost.
func convert(entry []byte, from, to []field, size int) ([]byte, error) {
	out := make([]byte, size)
	for _, f := range to {
		i := slices.IndexFunc(from, func(g field) bool { return g.name == f.name })
		if i < 0 {
			continue
		}
		old := entry[from[i].offset : from[i].offset+from[i].size]
		n := copy(out[f.offset:f.offset+f.size], old) // little-endian, as the objects are
		if lost := old[n:]; len(bytes.Trim(lost, "\x00")) > 0 {
			return nil, fmt.Errorf("%q has %d bytes and does not fit into %d", f.name, from[i].size, f.size)
		}
	}
	return out, nil
}

// readable opens a pinned map that user space alone writes for reading: a copy of
// it where its layout is another version's.
func (d *Datapath) readable(name string) (*ebpf.Map, error) {
	there, err := ebpf.LoadPinnedMap(filepath.Join(d.mapsDir(), name), nil)
	if err != nil {
		return nil, err
	}
	specs, err := d.mapSpecs()
	if err != nil {
		return nil, errors.Join(err, there.Close())
	}
	specs[name].MaxEntries = there.MaxEntries()
	if ok, err := usable(there, specs[name]); err != nil || ok {
		return there, err
	}
	defer there.Close()
	return converted(there, specs[name])
}

// clear empties a pinned map of whatever layout.
func (d *Datapath) clear(name string) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(d.mapsDir(), name), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer m.Close()
	for {
		var key []byte
		if key, err = m.NextKeyBytes(nil); err != nil || key == nil {
			break
		}
		if err = m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("empty %s: %w", name, err)
	}
	return nil
}
