package testbed

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"

	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// state is what of the machine a cluster could change.
type state struct {
	sysctls  map[string]string
	links    map[string]bool // network interfaces
	programs map[ebpf.ProgramID]bool
	files    map[string]bool
}

// rootHooks are the attach points on the root of cgroup2 whose programs are counted.
var rootHooks = []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSockOps}

// traces are directories that a cluster without namespaces would leave.
var traces = []string{"/etc/cni", "/opt/cni", "/var/lib/cni", "/var/lib/kubelet", "/var/lib/containerd", "/var/log/pods", "/var/log/containers", "/run/netns", "/run/containerd", "/run/sluice"}

func look() (state, error) {
	s := state{sysctls: map[string]string{}, links: map[string]bool{}, programs: map[ebpf.ProgramID]bool{}, files: map[string]bool{}}
	for _, name := range append(slices.Clone(ownSysctls), "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding") {
		if text, err := os.ReadFile("/proc/sys/" + name); err == nil {
			s.sysctls[name] = strings.TrimSpace(string(text))
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return s, err
	}
	for _, l := range links {
		s.links[l.Attrs().Name] = true
	}
	for _, dir := range traces {
		if _, err := os.Lstat(dir); err == nil {
			s.files[dir] = true
		}
	}
	s.programs, err = rootPrograms()
	return s, err
}

func rootPrograms() (map[ebpf.ProgramID]bool, error) {
	out := map[ebpf.ProgramID]bool{}
	root, err := kernel.CgroupRoot()
	if errors.Is(err, kernel.ErrNoCgroup2) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for _, hook := range rootHooks {
		result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook})
		if err != nil {
			return nil, fmt.Errorf("ask which programs are on %s: %w", root, err)
		}
		for _, p := range result.Programs {
			out[p.ID] = true
		}
	}
	return out, nil
}

// compare says what is not as it was. The programs' links are freed by the kernel a
// little after the file system that pinned them.
func (s state) compare(after state, dir string) error {
	var errs error
	for name, was := range s.sysctls {
		if is := after.sysctls[name]; is != was {
			errs = errors.Join(errs, fmt.Errorf("left behind: sysctl %s is %s, it was %s", name, is, was))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(after.links)) {
		if name == "cni0" || name == "eth0" && !s.links[name] {
			errs = errors.Join(errs, fmt.Errorf("left behind: the network interface %s", name))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(after.files)) {
		if !s.files[name] {
			errs = errors.Join(errs, fmt.Errorf("left behind: %s", name))
		}
	}
	if mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir)); err != nil || len(mounts) > 0 {
		errs = errors.Join(errs, err, fmt.Errorf("left behind: %d mounts below %s", len(mounts), dir))
	}
	if err := processesNaming(dir); err != nil {
		errs = errors.Join(errs, err)
	}
	programs := after.programs
	for until := time.Now().Add(20 * time.Second); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		if maps.DeleteFunc(programs, func(id ebpf.ProgramID, _ bool) bool { return s.programs[id] }); len(programs) == 0 {
			return errs
		}
		var err error
		if programs, err = rootPrograms(); err != nil {
			return errors.Join(errs, err)
		}
	}
	return errors.Join(errs, fmt.Errorf("left behind: BPF programs on the root of cgroup2 that were not there before (IDs %v)", slices.Sorted(maps.Keys(programs))))
}

// processesNaming finds processes that have the directory on their command line:
// each of the cluster's does, or is the child of one.
func processesNaming(dir string) error {
	all, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return err
	}
	var errs error
	for _, path := range all {
		text, _ := os.ReadFile(path) // it may have ended
		if strings.Contains(string(text), dirEnv+"="+dir) {
			errs = errors.Join(errs, fmt.Errorf("left behind: process %s of the cluster", filepath.Base(filepath.Dir(path))))
		}
	}
	return errs
}

// removeAll removes the data, unless something is still mounted below it.
func removeAll(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("%s is not removed, for %s is mounted below it", dir, mounts[0].Mountpoint)
	}
	return os.RemoveAll(dir)
}
