package datapath

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// The kernel lets go of links and programs from workers of its own, a moment
// after their last pin is removed. Who looks for leftovers right then finds
// some, and opening a program array by its ID at that moment leaks it (seen on
// 6.18: prog_array_map_clear takes a reference for work that is queued already).

// programIDs are the programs that a datapath holds by links and tables.
func programIDs(d *Datapath) []ebpf.ProgramID {
	var out []ebpf.ProgramID
	for _, pattern := range []string{"node/*", "pods/*/*"} {
		pins, _ := filepath.Glob(filepath.Join(d.linksDir(), pattern))
		for _, pin := range pins {
			l, err := link.LoadPinnedLink(pin, nil)
			if err != nil {
				continue
			}
			if info, err := l.Info(); err == nil {
				out = append(out, info.Program)
			}
			l.Close()
		}
	}
	for _, s := range stubs {
		table, err := ebpf.LoadPinnedMap(filepath.Join(d.mapsDir(), s.table), nil)
		if err != nil {
			continue
		}
		var id uint32
		if table.Lookup(s.index, &id) == nil {
			out = append(out, ebpf.ProgramID(id))
		}
		table.Close()
	}
	return out
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
