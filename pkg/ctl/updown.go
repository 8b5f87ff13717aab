package ctl

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// mountMark is a directory that says that the bpffs it is on was mounted by us.
const mountMark = "sluice_mounted"

func newUp(c *common) *cobra.Command {
	var opts datapath.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Load, pin and attach the node's programs, or replace those that run",
		Long: `up loads the node's programs, pins them below --bpffs and attaches them to
--cgroup. From then on they run without any process of Sluice's. Running it
again replaces the programs in place, each atomically; pods stay enrolled and
connections open.

A namespace is captured only once it is enrolled: see "sluicectl enroll --help".`,
		Example: `  sluicectl up
  sluicectl up --cgroup /sys/fs/cgroup/test --bpffs /tmp/bpf/sluice`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkSizes(cmd.Flags()); err != nil {
				return err
			}
			opts.Dir, opts.Log, opts.Flags = c.dir, c.log(), c.flags()
			return c.up(cmd, opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.Cgroup, "cgroup", "", "cgroup2 directory whose processes are seen (default: the true root of cgroup2)")
	f.StringVar(&opts.SockoptCgroup, "sockopt-cgroup", "", "cgroup2 directory of the getsockopt program, which every getsockopt() below it pays for; all proxies must be below it (default: the --cgroup)")
	f.Uint32Var(&opts.Handshakes, "handshakes", 0, "size of the handshakes table, at the first start (default 65536)")
	f.Uint32Var(&opts.Targets, "targets", 0, "size of the address books together, at the first start (default 262144)")
	f.Uint32Var(&opts.TargetShare, "target-share", 0, "how many destinations one pod's address book may hold from now on (default: a sixteenth)")
	f.Uint32Var(&opts.HandshakeShare, "handshake-share", 0, "how many handshakes one pod may hold from now on (default: a quarter)")
	return cmd
}

// checkSizes bounds tables by what the kernel takes, whatever the memory.
func checkSizes(flags *pflag.FlagSet) error {
	const most = 1 << 24
	for _, name := range []string{"handshakes", "targets", "handshake-share", "target-share"} {
		n, err := flags.GetUint32(name)
		if err != nil {
			return err
		}
		if flags.Changed(name) && (n == 0 || n > most) {
			return fmt.Errorf("--%s: %d is not a size: give a number from 1 to %d", name, n, most)
		}
	}
	return nil
}

// warnSizes says where a table was made with another size than is asked for now.
func (c *common) warnSizes(cmd *cobra.Command, d *datapath.Datapath, opts datapath.Options) {
	for _, t := range []struct {
		table string
		asked uint32
	}{{"handshakes", opts.Handshakes}, {"targets", opts.Targets}} {
		if has := d.Size(t.table); t.asked != 0 && t.asked != has {
			cmd.PrintErrf("sluicectl: warning: the table %s keeps the size that it was made with, %d, and not %d: only %s and \"up\" anew changes that, and un-enrols every pod\n", t.table, has, t.asked, c.hint("down"))
		}
	}
}

func (c *common) up(cmd *cobra.Command, opts datapath.Options) error {
	if err := c.mayChange("it loads the programs itself: restart it to load them anew"); err != nil {
		return err
	}
	opts.Reattach = opts.Cgroup != ""
	var err error
	if opts.Cgroup, err = defaultCgroup(opts.Cgroup); err != nil {
		return err
	}
	if _, err := datapath.Probe(); err != nil {
		return err
	}
	if err := ensureBPFFS(c.dir); err != nil {
		return err
	}
	_, statErr := os.Stat(filepath.Join(c.dir, datapath.Layout))
	d, err := datapath.Up(opts)
	if err == nil {
		defer d.Close()
		err = prove(d, opts.Cgroup)
	}
	if err != nil && errors.Is(statErr, os.ErrNotExist) {
		// It was not up before: leave nothing half-made.
		_, undo := datapath.Down(c.dir)
		return errors.Join(err, undo, dropMount(c.dir))
	}
	if err != nil {
		return err
	}
	pods, err := d.Pods()
	if err != nil {
		return err
	}
	cmd.Printf("Sluice is up: programs on %s, pinned below %s, %s enrolled.\n", opts.Cgroup, c.dir, count(len(pods), "pod"))
	c.warnSizes(cmd, d, opts)
	warnOthers(cmd, d, opts.Cgroup)
	return nil
}

// warnOthers names who else is attached to the same cgroup, which works as long as
// no pod is enrolled with two of them.
func warnOthers(cmd *cobra.Command, d *datapath.Datapath, cgroup string) {
	others, err := d.Others()
	if err != nil {
		cmd.PrintErrf("sluicectl: warning: whether another Sluice is on %s could not be seen: %v\n", cgroup, err)
	}
	if len(others) == 0 {
		return
	}
	cmd.PrintErrf("sluicectl: warning: on %s is another Sluice too, pinned below %s. Each captures and shows only the pods that were enrolled with its own --bpffs; enroll no pod with both\n", cgroup, strings.Join(others, " and "))
}

// prove shows that the programs see this process, unless it is outside their
// cgroup.
func prove(d *datapath.Datapath, cgroup string) error {
	if !kernel.IsInside(cgroup) {
		return nil
	}
	err := d.Prove()
	if errors.Is(err, datapath.ErrUnproven) {
		return fmt.Errorf("%w; pods would escape the mesh. See whether other programs on %s replace ours (bpftool cgroup show %s)", err, cgroup, cgroup)
	}
	return err
}

// ensureBPFFS mounts a bpffs at its usual place where there is none. Anywhere
// else that is the caller's to do.
func ensureBPFFS(dir string) error {
	parent := filepath.Dir(dir)
	err := kernel.IsBPFFS(parent)
	if err == nil || parent != defaultBPFFS {
		return nil // datapath.Up judges, with a sentence
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: this kernel has no BPF file system", err)
	}
	if err := kernel.MountBPFFS(defaultBPFFS); err != nil {
		return err
	}
	return os.Mkdir(filepath.Join(defaultBPFFS, mountMark), 0o700)
}

// dropMount undoes ensureBPFFS once nothing else is on that bpffs.
func dropMount(dir string) error {
	parent := filepath.Dir(dir)
	mark := filepath.Join(parent, mountMark)
	if parent != defaultBPFFS || kernel.IsBPFFS(parent) != nil {
		return nil
	}
	entries, err := os.ReadDir(parent)
	if err != nil {
		return nil
	}
	ours := false
	for _, e := range entries {
		switch e.Name() {
		case mountMark:
			ours = true
		case "maps.debug", "progs.debug": // the kernel's own (CONFIG_BPF_PRELOAD)
		default:
			return nil // somebody uses it
		}
	}
	if !ours {
		return nil
	}
	if err := os.Remove(mark); err != nil {
		return fmt.Errorf("remove %s: %w", mark, err)
	}
	if err := unix.Unmount(parent, 0); err != nil {
		return fmt.Errorf("unmount the bpffs that sluicectl up mounted on %s: %w", parent, err)
	}
	return nil
}
