// Package datapath owns the BPF programs and maps: it probes, loads, pins,
// attaches, enrols, replaces and removes. It is the only user of cilium/ebpf,
// and it never decides what a pod's rules are.
package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/kernel"
)

// Layout is the version of the scheme of pins: of the names of links, of what a
// pod's stubs do, and of the maps that programs write. It is not that of the other
// maps, which describe themselves (layout.go).
const Layout = "v1"

// Options say where a datapath lives. The zero value of a size means its
// default.
type Options struct {
	// Dir is a directory on a bpffs; everything is pinned below Dir/Layout.
	Dir string
	// Cgroup carries the connect, name, bind and sockops programs.
	Cgroup string
	// SockoptCgroup carries the getsockopt program, which costs every
	// getsockopt of every process below it. Empty: Cgroup.
	SockoptCgroup string
	// Reattach says that Cgroup is somebody's word, and no default: programs whose
	// cgroup is gone may be attached to it.
	Reattach bool
	// MaxPods is how many pods the tables hold. Tables that are pinned already
	// keep the size that they have, until Down.
	MaxPods uint32
	// Handshakes is the size of the map of that name; HandshakeShare is how
	// many of them one pod may hold.
	Handshakes, HandshakeShare uint32
	// Targets is the size of the address books together; TargetShare is how
	// many destinations one pod's may hold.
	Targets, TargetShare uint32
	// Limit, if there is one, takes away some of what the kernel has been found to
	// have: tests run what older kernels run.
	Limit func(*Features)
	Log   logrus.FieldLogger
	// Flags are what a command of sluicectl needs to mean this datapath, for hints,
	// such as " --bpffs /tmp/bpf/sluice".
	Flags string
}

// DefaultDir is where sluicectl, daemon and plugin have their datapath by default.
const DefaultDir = "/sys/fs/bpf/sluice"

// hint is a command of sluicectl's about this datapath, in quotes.
func (o Options) hint(command string) string { return "\"sluicectl " + command + o.Flags + "\"" }

// probe is Probe, limited.
func (o *Options) probe() (Features, error) {
	f, err := Probe()
	if err == nil && o.Limit != nil {
		o.Limit(&f)
	}
	return f, err
}

// One pod may hold a quarter of handshakes, which a pod with a full backlog
// fills, and a sixteenth of targets, which any pod fills that calls many
// destinations.
const (
	defaultHandshakes  = 65536
	handshakeDivisor   = 4
	targetsPerPod      = 256
	targetShareDivisor = 16
)

func (o *Options) complete() {
	if o.SockoptCgroup == "" {
		o.SockoptCgroup = o.Cgroup
	}
	if o.MaxPods == 0 {
		o.MaxPods = DefaultMaxPods
	}
	if o.Handshakes == 0 {
		o.Handshakes = defaultHandshakes
	}
	if o.Targets == 0 {
		o.Targets = targetsPerPod * o.MaxPods
	}
	if o.Flags == "" && o.Dir != DefaultDir {
		o.Flags = " --bpffs " + o.Dir
	}
	if o.Log == nil {
		log := logrus.New()
		log.SetLevel(logrus.PanicLevel)
		o.Log = log
	}
}

// ErrNotUp is returned where no datapath is pinned.
var ErrNotUp = errors.New("sluice is not up")

// ErrElsewhere is returned where the datapath is attached to another cgroup.
var ErrElsewhere = errors.New("sluice is up on another cgroup")

// ErrLayout is returned for pinned maps that this version cannot use.
var ErrLayout = errors.New("the pinned maps are of another version of Sluice")

// Datapath is an open datapath.
// Close releases this process's hold; what is pinned stays in force.
type Datapath struct {
	opts   Options
	probed func() Features // once, when first asked for
	maps   map[string]*ebpf.Map
}

// nodeSpecs are the programs that the node carries.
type nodeSpecs struct{ connect, names, sockops, sockopt, udp *ebpf.CollectionSpec }

func loadNodeSpecs() (s nodeSpecs, err error) {
	var errs [5]error
	s.connect, errs[0] = loadConnect()
	s.names, errs[1] = loadNames()
	s.sockops, errs[2] = loadSockops()
	s.sockopt, errs[3] = loadSockopt()
	s.udp, errs[4] = loadUdp()
	return s, errors.Join(errs[:]...)
}

// knobs sets the const volatile variables that a spec has.
func knobs(spec *ebpf.CollectionSpec, values map[string]any) error {
	for name, value := range values {
		v := spec.Variables[name]
		if v == nil {
			continue
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

func (d *Datapath) mapsDir() string         { return filepath.Join(d.opts.Dir, Layout, "maps") }
func (d *Datapath) linksDir() string        { return filepath.Join(d.opts.Dir, Layout, "links") }
func (d *Datapath) nodePin(n string) string { return filepath.Join(d.linksDir(), "node", n) }
func (d *Datapath) podDir(c uint64) string  { return filepath.Join(d.linksDir(), "pods", fmt.Sprint(c)) }

// Open opens what is pinned below opts.Dir. ErrNotUp if nothing is. It leaves the
// kernel unprobed, for Up has found it fit, until something optional is asked for:
// a plugin that enrolls a pod has no millisecond to spare.
func Open(opts Options) (*Datapath, error) {
	opts.complete()
	d := &Datapath{opts: opts, maps: map[string]*ebpf.Map{}, probed: sync.OnceValue(func() Features {
		f, _ := examine()
		if opts.Limit != nil {
			opts.Limit(&f)
		}
		return f
	})}
	if _, err := os.Stat(d.mapsDir()); errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("%w: nothing is pinned below %s; run %s first", ErrNotUp, opts.Dir, opts.hint("up")), opts.foreignScheme())
	}
	if d.isHalfway() != nil { // it may be under way: wait for its end
		unlock, err := lock(opts.Dir)
		if err != nil {
			return nil, err
		}
		unlock()
		if err := d.isHalfway(); err != nil {
			return nil, err
		}
	}
	if err := d.openMaps(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// mapSpecs are the definitions of the pinned maps, as large as asked for. Every
// object has them (bpf/maps.h); this one is the smallest, and read in a third of
// the time of connect's.
func (d *Datapath) mapSpecs() (map[string]*ebpf.MapSpec, error) {
	spec, err := loadSockopt()
	if err != nil {
		return nil, fmt.Errorf("read the map definitions: %w", err)
	}
	sized := d.opts.sizes(spec.Maps)
	out := map[string]*ebpf.MapSpec{}
	for name, m := range spec.Maps {
		if !isPinned(m) {
			continue
		}
		if size, ok := sized[name]; ok {
			m.MaxEntries = size
		}
		out[name] = m
	}
	return out, nil
}

// openMaps opens every pinned map, if they are of this version's layout.
func (d *Datapath) openMaps() error {
	specs, err := d.mapSpecs()
	if err != nil {
		return err
	}
	digest, err := digestOf(specs)
	if err != nil {
		return err
	}
	if err := d.checkLayout(digest); err != nil {
		return err
	}
	for name := range specs {
		pin := filepath.Join(d.mapsDir(), name)
		opened, err := ebpf.LoadPinnedMap(pin, nil)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w completely: %s is missing; %s repairs it", ErrNotUp, pin, d.opts.hint("up"))
		}
		if err != nil {
			return fmt.Errorf("open %s: %w", pin, err)
		}
		d.maps[name] = opened
	}
	return d.checkLayout(digest) // still: or some are those of a version that took over meanwhile
}

func createMap(spec *ebpf.MapSpec, pin string) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("create map %s: %w", spec.Name, err)
	}
	if err := m.Pin(pin); err != nil {
		return nil, errors.Join(fmt.Errorf("pin map %s: %w", pin, err), m.Close())
	}
	return m, nil
}

// load loads one spec's programs with this datapath's maps.
func (d *Datapath) load(spec *ebpf.CollectionSpec, values map[string]any) (*ebpf.Collection, error) {
	if err := knobs(spec, values); err != nil {
		return nil, err
	}
	replace := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if m, ok := d.maps[name]; ok {
			replace[name] = m
			spec.Maps[name].MaxEntries = m.MaxEntries()
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	var refused *ebpf.VerifierError
	if errors.As(err, &refused) {
		return nil, fmt.Errorf("the kernel's verifier refuses a program: %w\n%s", err, strings.Join(refused.Log, "\n"))
	}
	return c, err
}

// Close is idempotent.
func (d *Datapath) Close() error {
	var errs error
	for name, m := range d.maps {
		errs = errors.Join(errs, m.Close())
		delete(d.maps, name)
	}
	return errs
}

// prepare checks privileges and directories before anything is made.
func (d *Datapath) prepare() error {
	if os.Geteuid() != 0 {
		return errors.New("loading BPF programs needs root (CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN): run it as root")
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return fmt.Errorf("raise the limit of locked memory: %w", err)
	}
	for _, dir := range []string{d.opts.Cgroup, d.opts.SockoptCgroup} {
		if err := kernel.IsCgroup2(dir); err != nil {
			return err
		}
	}
	parent := d.opts.Dir
	for {
		if _, err := os.Stat(parent); err == nil {
			break
		}
		parent = filepath.Dir(parent)
	}
	if kernel.IsBPFFS(parent) != nil {
		return fmt.Errorf("%s %w: mount one on an empty directory (mount -t bpf bpf DIR; in a pod, mount the host's /sys/fs/bpf as a hostPath) and give a directory on it with --bpffs", d.opts.Dir, kernel.ErrNoBPFFS)
	}
	if err := d.opts.foreignScheme(); err != nil {
		return err
	}
	for _, dir := range []string{filepath.Join(d.linksDir(), "node"), filepath.Join(d.linksDir(), "pods")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	return nil
}

// lock serialises changes of one datapath among processes, for as long as the
// returned function is not called.
func lock(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return func() { f.Close() }, nil
}
