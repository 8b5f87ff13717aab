package datapath

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// A version of Sluice may give a map another shape than the one before: its
// entries get a field more, say. Maps describe themselves in the kernel (BTF), so
// that any version can read what any other has written, older or newer, without
// knowing it: by the fields' names (docs/adr/0010).
//
// Two kinds of maps are held to different rules. Those that programs write are
// shared by the versions, as they are, and never change: they are in use while
// programs are replaced. Those that user space alone writes may change, and are
// written anew while nobody else may write.

// sharedMaps are never written anew: programs write them, or pods' stubs, which
// are not replaced, refer to them.
var sharedMaps = []string{
	"pod_facts", "forwarded", "listeners", "orig_dst", "binders", "handshakes", "handshake_use",
	"targets", "target_index", "target_use", "stats", "scratch", "pod_inbound", "pod_tc",
}

func isShared(name string) bool { return slices.Contains(sharedMaps, name) }

// field is one field of a key or value: where it is, in bytes.
type field struct {
	name         string // with those that it is in, "addr4.b"; empty for a bare number
	offset, size int
}

// fieldsOf lists a type's fields in order; size is that of the whole.
func fieldsOf(t btf.Type, size int) ([]field, error) {
	s, ok := btf.UnderlyingType(t).(*btf.Struct)
	if !ok {
		return []field{{size: size}}, nil
	}
	return structFields(s, "", 0)
}

func structFields(s *btf.Struct, prefix string, base int) ([]field, error) {
	var out []field
	for _, m := range s.Members {
		if m.BitfieldSize > 0 {
			return nil, fmt.Errorf("%s%s is a bit field", prefix, m.Name)
		}
		at := base + int(m.Offset.Bytes())
		if inner, ok := btf.UnderlyingType(m.Type).(*btf.Struct); ok {
			fields, err := structFields(inner, prefix+m.Name+".", at)
			if err != nil {
				return nil, err
			}
			out = append(out, fields...)
			continue
		}
		size, err := btf.Sizeof(m.Type)
		if err != nil {
			return nil, fmt.Errorf("%s%s: %w", prefix, m.Name, err)
		}
		out = append(out, field{prefix + m.Name, at, size})
	}
	return out, nil
}

// shape is what a map's entries look like.
type shape struct{ key, value []field }

// shapeOf is the shape that this version's programs and user space know.
func shapeOf(spec *ebpf.MapSpec) (out shape, err error) {
	var keyErr, valueErr error
	out.key, keyErr = fieldsOf(spec.Key, int(spec.KeySize))
	out.value, valueErr = fieldsOf(spec.Value, int(spec.ValueSize))
	return out, errors.Join(keyErr, valueErr)
}

// pinnedShape is the shape of a map in the kernel, whoever made it. Its types are
// found by the names that this version gives them.
func pinnedShape(m *ebpf.Map, spec *ebpf.MapSpec) (shape, error) {
	info, err := m.Info()
	if err != nil {
		return shape{}, fmt.Errorf("read what %s is: %w", spec.Name, err)
	}
	id, ok := info.BTFID()
	if !ok {
		return shape{}, fmt.Errorf("%s does not describe itself", spec.Name)
	}
	handle, err := btf.NewHandleFromID(id)
	if err != nil {
		return shape{}, fmt.Errorf("read the types of %s: %w", spec.Name, err)
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return shape{}, fmt.Errorf("read the types of %s: %w", spec.Name, err)
	}
	there := func(t btf.Type, size uint32) ([]field, error) {
		ours, ok := btf.UnderlyingType(t).(*btf.Struct)
		if !ok {
			return []field{{size: int(size)}}, nil
		}
		var s *btf.Struct
		if err := types.TypeByName(ours.Name, &s); err != nil {
			return nil, fmt.Errorf("%s has no struct %s: %w", spec.Name, ours.Name, err)
		}
		return fieldsOf(s, int(size))
	}
	key, keyErr := there(spec.Key, m.KeySize())
	value, valueErr := there(spec.Value, m.ValueSize())
	return shape{key, value}, errors.Join(keyErr, valueErr)
}

// digestOf names the layout of a set of maps: two versions with the same digest
// may use each other's. Numbers of entries are no part of it.
func digestOf(specs map[string]*ebpf.MapSpec) (string, error) {
	var lines []string
	for name, spec := range specs {
		if !isPinned(spec) {
			continue
		}
		s, err := shapeOf(spec)
		if err != nil {
			return "", fmt.Errorf("read the definition of %s: %w", name, err)
		}
		lines = append(lines, fmt.Sprint(name, spec.Type, spec.KeySize, spec.ValueSize, spec.Flags, s))
	}
	slices.Sort(lines)
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	return hex.EncodeToString(sum[:8]), nil
}

// isPinned leaves out .rodata and the like, which belong to one program.
func isPinned(spec *ebpf.MapSpec) bool { return spec.Type != ebpf.Array && spec.Name[0] != '.' }

// usable says whether a pinned map may be used as it is. A shared one must be, or
// the error wraps ErrLayout: its fields may grow into what was padding, and none
// may move.
func usable(m *ebpf.Map, spec *ebpf.MapSpec) (bool, error) {
	same := m.Type() == spec.Type && m.KeySize() == spec.KeySize && m.ValueSize() == spec.ValueSize && m.Flags() == spec.Flags
	if isShared(spec.Name) {
		if !same {
			return false, fmt.Errorf("%w: %s is a %s with keys of %d and values of %d bytes, and must be a %s with %d and %d", ErrLayout,
				spec.Name, m.Type(), m.KeySize(), m.ValueSize(), spec.Type, spec.KeySize, spec.ValueSize)
		}
		return true, unmoved(m, spec)
	}
	if !same {
		return false, nil
	}
	ours, err := shapeOf(spec)
	if err != nil {
		return false, err
	}
	theirs, err := pinnedShape(m, spec)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrLayout, err)
	}
	return slices.Equal(ours.key, theirs.key) && slices.Equal(ours.value, theirs.value), nil
}

// unmoved wants the fields that two versions of a map have in common to be in the
// same places.
func unmoved(m *ebpf.Map, spec *ebpf.MapSpec) error {
	info, err := m.Info()
	if err != nil {
		return fmt.Errorf("read what %s is: %w", spec.Name, err)
	}
	if _, ok := info.BTFID(); !ok {
		return nil // the kernel keeps no types of socket hashes and program arrays
	}
	ours, err := shapeOf(spec)
	if err != nil {
		return err
	}
	theirs, err := pinnedShape(m, spec)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrLayout, err)
	}
	for _, pair := range [][2][]field{{ours.key, theirs.key}, {ours.value, theirs.value}} {
		for _, f := range pair[0] {
			if i := slices.IndexFunc(pair[1], func(g field) bool { return g.name == f.name }); i >= 0 && pair[1][i] != f {
				return fmt.Errorf("%w: %s of %s is elsewhere", ErrLayout, f.name, spec.Name)
			}
		}
	}
	return nil
}
