package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// node is Sluice as a machine has it, but on a cgroup and a bpffs of its own.
// Beside its cgroup is one without programs, at the same depth, for everybody
// that Sluice must not see.
type node struct {
	tmp, cgroups string
	mesh, plain  string // cgroup directories: with and without Sluice
	bpffs        string
	mounted      bool
	ipv6         bool // backends redirect IPv6 too
	datapath     *datapath.Datapath
	translated   sync.Map // texts of iptables-restore -> those of nft
}

// nodes tells the cgroups of one process apart.
var nodes atomic.Int64

func newNode() (*node, error) {
	root, err := kernel.CgroupRoot()
	if err != nil {
		return nil, err
	}
	n := &node{cgroups: filepath.Join(root, fmt.Sprintf("sluice-bench-%d-%d", os.Getpid(), nodes.Add(1)))}
	n.mesh, n.plain = filepath.Join(n.cgroups, "mesh"), filepath.Join(n.cgroups, "plain")
	if err := n.up(); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *node) up() error {
	var err error
	for _, dir := range []string{n.cgroups, n.mesh, n.plain} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("make a cgroup: %w", err)
		}
	}
	if n.tmp, err = os.MkdirTemp("", "sluice-bench-"); err != nil {
		return fmt.Errorf("make a directory: %w", err)
	}
	if err := kernel.MountBPFFS(n.tmp); err != nil {
		return err
	}
	n.mounted = true
	n.bpffs = filepath.Join(n.tmp, "sluice")
	n.datapath, err = datapath.Up(datapath.Options{Dir: n.bpffs, Cgroup: n.mesh})
	return err
}

// Close removes every trace. The workers must have ended.
func (n *node) Close() error {
	var errs error
	if n.datapath != nil {
		errs = errors.Join(errs, n.datapath.Close())
		n.datapath = nil
	}
	if n.mounted {
		_, err := datapath.Down(n.bpffs)
		errs = errors.Join(errs, err, unix.Unmount(n.tmp, 0))
		n.mounted = false
	}
	if n.tmp != "" {
		errs = errors.Join(errs, os.Remove(n.tmp))
		n.tmp = ""
	}
	for _, dir := range []string{n.mesh, n.plain, n.cgroups} {
		errs = errors.Join(errs, removeCgroup(dir))
	}
	return errs
}

// removeCgroup waits for processes that have just been killed.
func removeCgroup(dir string) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		time.Sleep(time.Millisecond)
	}
}
