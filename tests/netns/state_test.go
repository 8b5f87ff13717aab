package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// ownDatapath is one for a test alone, with the options to bring it up again.
func ownDatapath(t *testing.T) (*datapath.Datapath, datapath.Options) {
	t.Helper()
	opts := datapath.Options{Dir: filepath.Join(kit.BPFFS(t), "lifecycle"), Cgroup: kit.Cgroup(t)}
	return kit.OwnDatapath(t, opts), opts
}

// state is what a datapath has in the kernel.
type state struct {
	Links, Programs, Maps map[string]uint32 // IDs, by pin
	Entries               map[string]int    // by map
}

// stateOf reads the pins below a directory.
func stateOf(t *testing.T, dir string) state {
	t.Helper()
	s := state{map[string]uint32{}, map[string]uint32{}, map[string]uint32{}, map[string]int{}}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Type() == fs.ModeSymlink { // one names a cgroup
			return err
		}
		name, _ := filepath.Rel(filepath.Join(dir, datapath.Layout), path)
		if filepath.Base(filepath.Dir(path)) == "maps" {
			return s.addMap(name, path)
		}
		return s.addLink(name, path)
	})
	if err != nil {
		t.Fatal("read the pins:", err)
	}
	return s
}

func (s state) addMap(name, path string) error {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	s.Maps[name] = uint32(id)
	if m.Type() == ebpf.SkStorage || m.Type() == ebpf.PerCPUArray {
		return nil // not lists of anything
	}
	key := make([]byte, m.KeySize())
	for err = m.NextKey(nil, &key); err == nil; err = m.NextKey(key, &key) {
		if key[3] != fillMark && (m.Type() != ebpf.LPMTrie || key[11] != fillMark) {
			s.Entries[name]++
		}
	}
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("list %s: %w", name, err)
	}
	return nil
}

func (s state) addLink(name, path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return err
	}
	s.Links[name], s.Programs[name] = uint32(info.ID), uint32(info.Program)
	return nil
}

// connects dials through a pod without end, and counts.
type connects struct {
	failed, done, escaped atomic.Int64
	dialers, accepters    sync.WaitGroup
	noMore, end           chan struct{}
}

func startConnects(t *testing.T, p *kit.Pod, listeners ...*kit.Sock) *connects {
	c := &connects{noMore: make(chan struct{}), end: make(chan struct{})}
	server := p.Far.Listen(kit.Root, "0.0.0.0:80")
	for _, l := range append(listeners, server) {
		c.accepters.Go(func() {
			for !closed(c.end) {
				s, err := l.AcceptWithin(kit.Quiet)
				if err != nil {
					continue
				}
				if l == server {
					c.escaped.Add(1)
				} else if got, err := s.OrigDst(unix.SOL_IP); err != nil || got != ap(kit.Far4, 80) {
					t.Errorf("SO_ORIGINAL_DST is %v, %v", got, err)
				}
				_ = s.WriteAll([]byte{1}) // asked: now the client may go
				s.Close()
			}
		})
	}
	c.dialers.Go(func() {
		for !closed(c.noMore) {
			s, err := p.Dial(kit.App, unix.AF_INET, ap(kit.Far4, 80))
			c.done.Add(1)
			if err == nil {
				err = s.ReadFull(make([]byte, 1))
				s.Reset() // leaves no TIME_WAIT
			}
			if err != nil {
				c.failed.Add(1)
				t.Log("connect:", err)
			}
		}
	})
	return c
}

// stop lets those end that are under way.
func (c *connects) stop() {
	close(c.noMore)
	c.dialers.Wait()
	close(c.end)
	c.accepters.Wait()
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
