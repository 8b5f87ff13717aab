package kit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
)

// Pins are the pins below a directory: of a map the number of its entries, of
// anything else 0. It is empty where there is no such directory.
func Pins(t testing.TB, dir string) map[string]int {
	t.Helper()
	out := map[string]int{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		out[name] = 0
		if filepath.Base(filepath.Dir(path)) == "maps" {
			out[name], err = entriesOf(path)
		}
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal("read the pins:", err)
	}
	return out
}

func entriesOf(pin string) (n int, err error) {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		return 0, err
	}
	defer m.Close()
	if m.Type() == ebpf.SkStorage || m.Type() == ebpf.PerCPUArray {
		return 0, nil // not lists of anything
	}
	key := make([]byte, m.KeySize())
	for err = m.NextKey(nil, &key); err == nil; err = m.NextKey(key, &key) {
		n++
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, fmt.Errorf("list %s: %w", pin, err)
	}
	return n, nil
}
