package datapath

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/cilium/ebpf"
)

// How the kernel lays tables out: include/linux/bpf.h and kernel/bpf/hashtab.c,
// lpm_trie.c, net/core/sock_map.c of 6.18, where all of it is charged to a cgroup.
const (
	bucketSize  = 16  // struct bucket, struct bpf_shtab_bucket
	elementSize = 56  // struct htab_elem without its key, and the allocator's llist_node
	trieSize    = 40  // struct lpm_trie_node without its data, at most
	sockElement = 40  // struct bpf_shtab_elem without its key
	tableSize   = 768 // struct bpf_htab and the like, at most
)

func roundUp(n, to uint64) uint64 { return (n + to - 1) / to * to }

func powerOfTwo(n uint64) uint64 {
	p := uint64(1)
	for p < n {
		p *= 2
	}
	return p
}

// tableMemory is what a table takes with nothing in it, in bytes, and what each
// entry adds.
func tableMemory(m *ebpf.MapSpec, cpus uint64) (empty, entry uint64) {
	key, value, entries := roundUp(uint64(m.KeySize), 8), roundUp(uint64(m.ValueSize), 8), uint64(m.MaxEntries)
	switch m.Type {
	case ebpf.Hash:
		return powerOfTwo(entries) * bucketSize, elementSize + key + value
	case ebpf.PerCPUHash:
		return powerOfTwo(entries) * bucketSize, elementSize + key + 16 + value*cpus
	case ebpf.LRUHash: // all entries are there from the start
		return powerOfTwo(entries)*bucketSize + entries*(elementSize-8+key+value), 0
	case ebpf.SockHash:
		return powerOfTwo(entries) * bucketSize, sockElement + key
	case ebpf.LPMTrie: // an entry may need a node between others
		return 0, 2 * (trieSize + key + value)
	case ebpf.PerCPUArray:
		return entries * (8 + value*cpus), 0
	case ebpf.Array, ebpf.ProgramArray:
		return entries * max(value, 8), 0
	}
	return 0, 0 // a socket's storage is the socket's
}

func tables(t *testing.T, maxPods uint32) map[string]*ebpf.MapSpec {
	t.Helper()
	spec, err := loadConnect()
	if err != nil {
		t.Fatal(err)
	}
	opts := Options{MaxPods: maxPods}
	opts.complete()
	for name, size := range opts.sizes(spec.Maps) {
		if spec.Maps[name] == nil {
			t.Fatalf("there is no table %s", name)
		}
		spec.Maps[name].MaxEntries = size
	}
	for name := range spec.Maps {
		if name[0] == '.' {
			delete(spec.Maps, name)
		}
	}
	return spec.Maps
}

func TestMemoryOfTheTablesIsBounded(t *testing.T) {
	const mib = 1 << 20
	for _, tt := range []struct {
		pods                 uint32
		cpus                 uint64
		emptyLimit, podLimit uint64 // of a pod with everything that its share allows
	}{
		{DefaultMaxPods, 8, 16 * mib, 128 << 10},
		{DefaultMaxPods, 192, 16 * mib, 176 << 10},
		{110, 8, 4 * mib, 224 << 10},
	} {
		var empty, full uint64
		for _, m := range tables(t, tt.pods) {
			base, entry := tableMemory(m, tt.cpus)
			empty += base
			if m.Type != ebpf.SkStorage {
				full += base + entry*uint64(m.MaxEntries)
			}
		}
		t.Logf("%d pods, %d CPUs: %d KiB with no pod, %d KiB with every table full, which is %d KiB a pod", tt.pods, tt.cpus, empty>>10, full>>10, full>>10/uint64(tt.pods))
		if empty > tt.emptyLimit {
			t.Errorf("%d pods, %d CPUs: empty tables take %d bytes", tt.pods, tt.cpus, empty)
		}
		if each := full / uint64(tt.pods); each > tt.podLimit {
			t.Errorf("%d pods, %d CPUs: full tables take %d bytes a pod", tt.pods, tt.cpus, each)
		}
	}
}

// What is computed is what the kernel says: of every table, empty, and of some
// with entries.
func TestMemoryOfTheTablesIsAsTheKernelSays(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("SLUICE_REQUIRE_ROOT") == "1" {
			t.Fatal("making maps needs root")
		}
		t.Skip("making maps needs root")
	}
	cpus := uint64(ebpf.MustPossibleCPU())
	for name, spec := range tables(t, DefaultMaxPods) {
		if spec.Type == ebpf.SkStorage {
			continue
		}
		m, err := ebpf.NewMap(spec)
		if err != nil {
			t.Fatal(name, err)
		}
		empty, entry := tableMemory(spec, cpus)
		compare(t, name+", empty", m, empty)
		if spec.Type == ebpf.Hash || spec.Type == ebpf.PerCPUHash {
			const count = 500
			for i := range count {
				key := make([]byte, spec.KeySize)
				binary.NativeEndian.PutUint32(key, uint32(i+1))
				var value any = make([]byte, spec.ValueSize)
				if spec.Type == ebpf.PerCPUHash {
					value = make([]uint64, cpus)
				}
				if err := m.Put(key, value); err != nil {
					t.Fatal(name, err)
				}
			}
			compare(t, name+", with entries", m, empty+count*entry)
		}
		m.Close()
	}
}

func compare(t *testing.T, what string, m *ebpf.Map, computed uint64) {
	t.Helper()
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	said, ok := info.Memlock()
	if !ok && m.Type() != ebpf.LPMTrie { // an empty trie takes nothing
		t.Skip("this kernel does not say what a map takes (Linux 6.4 does)")
	}
	if more := computed + tableSize + computed/20; said > more || said+tableSize+said/20 < computed {
		t.Errorf("%s: the kernel says %d bytes, and computed are %d", what, said, computed)
	}
}
