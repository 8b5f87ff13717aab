package datapath

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// The kernel lets go of links and programs from workers of its own, a moment
// after their last pin is removed. Who looks for leftovers right then finds
// some, and opening a program array by its ID at that moment leaks it (seen on
// 6.18: prog_array_map_clear takes a reference for work that is queued already).

// programsOf are all programs that use a map of the datapath: the node's, the
// shared ones, and every pod's stubs, wherever they are attached.
func programsOf(d *Datapath) []ebpf.ProgramID {
	ours := map[ebpf.MapID]bool{}
	pins, _ := filepath.Glob(filepath.Join(d.mapsDir(), "*"))
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			continue
		}
		if info, err := m.Info(); err == nil {
			if id, ok := info.ID(); ok {
				ours[id] = true
			}
		}
		m.Close()
	}
	var out []ebpf.ProgramID
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		if usesAny(id, ours) {
			out = append(out, id)
		}
	}
	return out
}

func usesAny(id ebpf.ProgramID, maps map[ebpf.MapID]bool) bool {
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
	return slices.ContainsFunc(ids, func(id ebpf.MapID) bool { return maps[id] })
}

// awaitGone waits until the kernel has freed these programs, or until somebody
// else must be holding one.
func awaitGone(ids []ebpf.ProgramID) {
	const patience = 2 * time.Second
	deadline := time.Now().Add(patience)
	for _, id := range ids {
		for time.Now().Before(deadline) {
			prog, err := ebpf.NewProgramFromID(id)
			if errors.Is(err, os.ErrNotExist) {
				break
			}
			if err == nil {
				prog.Close()
			}
			time.Sleep(time.Millisecond)
		}
	}
}
