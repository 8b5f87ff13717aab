// Package kit is what the datapath tests stand on: a private cgroup and bpffs,
// pods and far hosts in namespaces of their own, and sockets with nothing
// between the test and the kernel.
//
// Everything it makes is below the root of cgroup2, in a temporary directory or
// in unnamed namespaces, and is removed at the end, also when interrupted.
package kit

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// RequireRootEnv is the variable that, set to 1, makes a test that cannot run
// for want of root fail.
const RequireRootEnv = "SLUICE_REQUIRE_ROOT"

var world struct {
	sync.Mutex
	cgroup, home string // ours, and where this process was
	memory       string // the cgroup that accounts this process's memory, if that is another
	bpffs        string
	shared       *datapath.Datapath
	skip         string
}

// Main runs a package's tests in a private cgroup, with a private bpffs.
func Main(m *testing.M) {
	HoldAndExit()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		world.skip = "needs root"
		return m.Run()
	}
	// Interrupted, the tests end as a whole: clean up first.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	go func() {
		s := <-signals
		if err := tearDown(); err != nil {
			fmt.Fprintln(os.Stderr, "clean up after the tests:", err)
		}
		os.Exit(128 + int(s.(unix.Signal)))
	}()
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "set up the tests' world:", errors.Join(err, tearDown()))
		return 1
	}
	status := m.Run()
	if err := tearDown(); err != nil {
		fmt.Fprintln(os.Stderr, "clean up after the tests:", err)
		return 1
	}
	return status
}

func setUp() error {
	root, err := kernel.CgroupRoot()
	if err != nil {
		return err
	}
	world.Lock()
	defer world.Unlock()
	if world.home, err = ownCgroup(root); err != nil {
		return err
	}
	dir := filepath.Join(root, "sluice-test-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	world.cgroup = dir
	if err := enter(dir); err != nil {
		return err
	}
	mount, err := os.MkdirTemp("", "sluice-test-bpffs-")
	if err != nil {
		return err
	}
	world.bpffs = mount
	if err := kernel.MountBPFFS(mount); err != nil {
		return err
	}
	return nil
}

func tearDown() error {
	world.Lock()
	defer world.Unlock()
	var errs error
	if world.shared != nil {
		errs = errors.Join(errs, world.shared.Close())
		world.shared = nil
	}
	if world.bpffs != "" {
		entries, _ := os.ReadDir(world.bpffs)
		for _, e := range entries {
			if e.IsDir() {
				_, err := datapath.Down(filepath.Join(world.bpffs, e.Name()))
				errs = errors.Join(errs, err)
			}
		}
		errs = errors.Join(errs, unix.Unmount(world.bpffs, unix.MNT_DETACH), os.Remove(world.bpffs))
		world.bpffs = ""
	}
	if world.memory != "" {
		errs = errors.Join(errs, enter(filepath.Dir(world.memory)), os.Remove(world.memory))
		world.memory = ""
	}
	if world.cgroup != "" {
		errs = errors.Join(errs, enter(world.home), os.Remove(world.cgroup))
		world.cgroup = ""
	}
	return errs
}

func enter(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0o644)
}

// ownCgroup is the cgroup2 directory that this process is in.
func ownCgroup(root string) (string, error) {
	path, err := cgroupPath("0::")
	return filepath.Join(root, path), err
}

// cgroupPath is where in a hierarchy this process is; hierarchy is what precedes
// the path in /proc/self/cgroup, or the end of that.
func cgroupPath(hierarchy string) (string, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range lines(string(text)) {
		if before, path, ok := strings.Cut(line, "/"); ok && strings.HasSuffix(before, hierarchy) {
			return "/" + path, nil
		}
	}
	return "", fmt.Errorf("this process is in no cgroup of the hierarchy %s", hierarchy)
}

// Cgroup is the private cgroup that the tests run in.
func Cgroup(t testing.TB) string {
	needWorld(t)
	return world.cgroup
}

// BPFFS is the private bpffs.
func BPFFS(t testing.TB) string {
	needWorld(t)
	return world.bpffs
}

func needWorld(t testing.TB) {
	t.Helper()
	if world.skip == "" {
		return
	}
	if os.Getenv(RequireRootEnv) == "1" {
		t.Fatalf("%s, and %s=1 says that it must run", world.skip, RequireRootEnv)
	}
	t.Skip(world.skip)
}

// Datapath is the one that most tests share.
func Datapath(t testing.TB) *datapath.Datapath {
	t.Helper()
	needWorld(t)
	world.Lock()
	defer world.Unlock()
	if world.shared == nil {
		d, err := datapath.Up(datapath.Options{Dir: filepath.Join(world.bpffs, "shared"), Cgroup: world.cgroup})
		if err != nil {
			t.Fatal("bring the datapath up:", err)
		}
		world.shared = d
	}
	return world.shared
}

// OwnDatapath is one for this test alone. Dir and Cgroup are filled in where
// empty.
func OwnDatapath(t testing.TB, opts datapath.Options) *datapath.Datapath {
	t.Helper()
	needWorld(t)
	if opts.Dir == "" {
		opts.Dir = filepath.Join(world.bpffs, "own-"+strconv.FormatInt(int64(os.Getpid()), 10)+"-"+safe(t.Name()))
	}
	if opts.Cgroup == "" {
		opts.Cgroup = world.cgroup
	}
	d, err := datapath.Up(opts)
	if err != nil {
		t.Fatal("bring a datapath up:", err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := datapath.Down(opts.Dir); err != nil {
			t.Error(err)
		}
	})
	return d
}
