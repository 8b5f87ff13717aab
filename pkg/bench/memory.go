package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// kernelUse is what the kernel has in use for itself, in bytes. The whole is the
// machine's: where others work too, differences are noise. What is charged is
// ours alone, but some allocations (links, machine code) are charged to nobody.
type kernelUse struct {
	whole, charged float64
}

// since is the difference to an earlier reading, for each of count.
func (u kernelUse) since(before kernelUse, count int) sample {
	out := sample{memory: {(u.whole - before.whole) / float64(count)}}
	if u.charged != 0 {
		out[charged] = []float64{(u.charged - before.charged) / float64(count)}
	}
	return out
}

// meter reads kernelUse. While it is open this process, and what it starts, is in
// a memory cgroup of its own, if the machine has such cgroups.
type meter struct {
	dir   string // the cgroup; empty: nothing is charged
	back  string // where this process was
	usage string // file
	field string // of usage; empty: the number is all there is
}

// newMeter opens a meter for a section.
func (s *stage) newMeter() (*meter, error) {
	m, err := findMemcg(s.node.cgroups)
	if err != nil {
		s.leaveOut(string(charged), err)
		return &meter{}, nil
	}
	if err := os.Mkdir(m.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a memory cgroup: %w", err)
	}
	s.closing(func() error { return errors.Join(moveTo(m.back), removeCgroup(m.dir)) })
	return m, moveTo(m.dir)
}

// findMemcg tells where a memory cgroup can be made: by cgroup2 below ours, which
// then has the sum; or, where memory is still version 1's, below this process's.
func findMemcg(ours string) (*meter, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("read this process's cgroups: %w", err)
	}
	paths := map[string]string{} // controllers -> path
	for line := range strings.Lines(string(text)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			paths[f[1]] = f[2]
		}
	}
	m := &meter{dir: filepath.Join(ours, "meter"), usage: filepath.Join(ours, "memory.stat"), field: "kernel"}
	if text, err := os.ReadFile(m.usage); err == nil {
		if !strings.Contains("\n"+string(text), "\n"+m.field+" ") {
			return nil, errors.New("memory cgroups here do not tell the kernel's part: Linux 5.18 and later do")
		}
		root, err := kernel.CgroupRoot()
		if err != nil {
			return nil, err
		}
		m.back = filepath.Join(root, paths[""])
		return m, m.isThere()
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup"))
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	for _, mount := range mounts {
		if slices.Contains(strings.Split(mount.VFSOptions, ","), "memory") {
			m.back = filepath.Join(mount.Mountpoint, paths["memory"])
			m.dir = filepath.Join(m.back, filepath.Base(ours))
			m.usage, m.field = filepath.Join(m.dir, "memory.kmem.usage_in_bytes"), ""
			return m, m.isThere()
		}
	}
	return nil, errors.New("there are no memory cgroups here")
}

// isThere says whether this process is where it will be moved back to: in a cgroup
// namespace, or a container, paths mean something else.
func (m *meter) isThere() error {
	text, err := os.ReadFile(filepath.Join(m.back, "cgroup.procs"))
	if err != nil {
		return fmt.Errorf("find this process's memory cgroup: %w", err)
	}
	if !slices.Contains(strings.Fields(string(text)), strconv.Itoa(os.Getpid())) {
		return fmt.Errorf("this process is not in %s, where it should be: run on the machine itself, not in a container", m.back)
	}
	return nil
}

// moveTo moves this process.
func moveTo(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		return fmt.Errorf("move this process to the cgroup %s: %w", dir, err)
	}
	return nil
}

// read waits a moment first: much of what the kernel frees it frees by RCU.
func (m *meter) read() (kernelUse, error) {
	time.Sleep(200 * time.Millisecond)
	whole, err := sumFields("/proc/meminfo", "Slab:", "VmallocUsed:", "Percpu:", "PageTables:")
	if err != nil || m.dir == "" {
		return kernelUse{whole: whole * 1024}, err
	}
	if m.field != "" {
		charged, err := sumFields(m.usage, m.field)
		return kernelUse{whole * 1024, charged}, err
	}
	text, err := os.ReadFile(m.usage)
	if err != nil {
		return kernelUse{}, fmt.Errorf("read a memory cgroup: %w", err)
	}
	charged, err := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
	if err != nil {
		return kernelUse{}, fmt.Errorf("read %s: %w", m.usage, err)
	}
	return kernelUse{whole * 1024, charged}, nil
}

// sumFields adds what stands behind some names in a file of names and numbers.
func sumFields(path string, names ...string) (sum float64, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read the kernel's memory: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 || !slices.Contains(names, f[0]) {
			continue
		}
		n, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", path, err)
		}
		sum += n
	}
	return sum, nil
}
