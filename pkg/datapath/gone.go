package datapath

import (
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// The kernel lets go of links and programs from workers of its own, a moment
// after their last pin is removed. Who looks for leftovers right then finds
// some, and opening a program array by its ID at that moment leaks it (seen on
// 6.18: prog_array_map_clear takes a reference for work that is queued already).

// holdings are the kernel objects of a datapath, by ID.
type holdings struct {
	programs []ebpf.ProgramID
	maps     []ebpf.MapID
}

// holdingsOf finds the pinned maps, and all programs that use one: the node's,
// the shared ones, and every pod's stubs, wherever they are attached.
func holdingsOf(d *Datapath) holdings {
	var out holdings
	pins, _ := filepath.Glob(filepath.Join(d.mapsDir(), "*"))
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			continue
		}
		if info, err := m.Info(); err == nil {
			if id, ok := info.ID(); ok {
				out.maps = append(out.maps, id)
			}
		}
		m.Close()
	}
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		if usesAny(id, out.maps) {
			out.programs = append(out.programs, id)
		}
	}
	return out
}

func usesAny(id ebpf.ProgramID, maps []ebpf.MapID) bool {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return false
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return false
	}
	ids, _ := info.MapIDs()
	return slices.ContainsFunc(ids, func(id ebpf.MapID) bool { return slices.Contains(maps, id) })
}

// awaitGone waits until the kernel has freed all of it, or until somebody else
// must be holding something. It asks for the next ID, and opens nothing.
func (h holdings) awaitGone() {
	const patience = 5 * time.Second
	deadline := time.Now().Add(patience)
	for _, id := range h.programs {
		await(deadline, func() bool { next, err := ebpf.ProgramGetNextID(id - 1); return err != nil || next != id })
	}
	for _, id := range h.maps {
		await(deadline, func() bool { next, err := ebpf.MapGetNextID(id - 1); return err != nil || next != id })
	}
}

func await(deadline time.Time, holds func() bool) {
	for !holds() && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
}
