// Package install keeps Sluice on a node: the plugin's binary in the CNI binary
// directory, and its entry in the network configuration that the container
// runtime uses. It puts back what others overwrite, says when it cannot, and
// takes away what is its own and nothing else.
//
// Every change of the disk is one rename or one removal, so that a process that
// is killed at any point leaves whole files; what it leaves beside them, the
// next start removes.
package install

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

// Names of the log's fields.
const (
	fieldFile    = "file"
	fieldReason  = "reason"
	fieldNetwork = "network"
	fieldCount   = "count"
	fieldRetry   = "retryIn"
)

// Options say what to install and where.
type Options struct {
	// ConfDir and BinDir are the host's CNI directories (usually
	// /etc/cni/net.d and /opt/cni/bin), wherever they are mounted here.
	ConfDir string
	BinDir  string
	// Plugin is the binary to copy into BinDir, where it is named conflist.Type.
	Plugin string
	// Entry is what the chain gets; its Origin is set here.
	Entry conflist.Entry
	// OnChange, if any, is called with every new status, by the goroutine that
	// runs Run or Withdraw. Of the Installer's methods it may call Status only.
	OnChange func(Status)
	// Log may be nil.
	Log logrus.FieldLogger
}

// Status says whether pods that start now pass Sluice's plugin.
type Status struct {
	Ready bool
	// Reason is a sentence on what is wrong and what to do; empty if Ready.
	Reason string
	// File is the network configuration that holds the entry, if any.
	File string
	// Overwritten counts how often the entry or the binary was found gone.
	Overwritten int
	// Withdrawn says that Sluice has taken it away itself.
	Withdrawn bool
}

// timing holds every period; tests shorten them.
type timing struct {
	resync time.Duration // a look without any event
	poll   time.Duration // the same where the kernel has no watches left
	burst  time.Duration // events that are this close make one look
	settle time.Duration // how long a broken file may be in the making
	patience
}

func defaultTiming() timing {
	return timing{
		resync: 30 * time.Second,
		poll:   2 * time.Second,
		burst:  20 * time.Millisecond,
		settle: time.Second,
		patience: patience{
			tolerated: 2, delay: time.Second, maxDelay: 5 * time.Minute,
			probation: 30 * time.Second, memory: 10 * time.Minute,
		},
	}
}

// Installer keeps binary and entry in place while Run runs.
type Installer struct {
	opts Options
	time timing
	disk disk
	log  logrus.FieldLogger

	newWatcher func() (*fsnotify.Watcher, error)

	work      sync.Mutex // held by whoever changes the disk
	conf, bin contest
	verified  verified
	withdrawn bool

	mu     sync.Mutex // guards status
	status Status
}

// New checks the options. It changes nothing.
func New(o Options) (*Installer, error) {
	for name, path := range map[string]*string{
		"configuration directory": &o.ConfDir, "binary directory": &o.BinDir, "plugin": &o.Plugin,
	} {
		if !filepath.IsAbs(*path) {
			return nil, fmt.Errorf("the CNI %s %q is no absolute path", name, *path)
		}
		*path = filepath.Clean(*path)
	}
	if err := o.Entry.Validate(); err != nil {
		return nil, fmt.Errorf("the entry of the CNI plugin has no JSON form: %w", err)
	}
	i := &Installer{opts: o, log: o.Log, newWatcher: fsnotify.NewWatcher}
	if i.log == nil {
		quiet := logrus.New()
		quiet.SetLevel(logrus.PanicLevel)
		i.log = quiet
	}
	i.status.Reason = "not yet installed"
	i.setTiming(defaultTiming())
	return i, nil
}

func (i *Installer) setTiming(t timing) {
	i.time = t
	i.conf, i.bin = contest{patience: t.patience}, contest{patience: t.patience}
}

// Status may be called at any time, from any goroutine.
func (i *Installer) Status() Status {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.status
}

// Run installs, and keeps what it installed in place, until ctx ends. It then
// returns nil and leaves everything where it is: pods keep starting. What goes
// wrong is not an error but a status, because the next event may mend it.
func (i *Installer) Run(ctx context.Context) error {
	i.work.Lock()
	i.withdrawn = false
	i.work.Unlock()

	w := &watch{log: i.log, time: i.time, open: i.newWatcher}
	defer w.close()
	for ctx.Err() == nil {
		// Watch, look, and only then wait: no change falls between.
		w.follow(i.opts.ConfDir, i.opts.BinDir)
		w.wait(ctx, i.look(time.Now()))
	}
	return nil
}

// look brings the disk to what it should be, and returns after how long to look
// again if nothing happens.
func (i *Installer) look(now time.Time) time.Duration {
	i.work.Lock()
	defer i.work.Unlock()
	status, again := i.install(now)
	i.setStatus(status)
	return again
}

func (i *Installer) setStatus(status Status) {
	i.mu.Lock()
	old := i.status
	i.status = status
	i.mu.Unlock()
	if status == old {
		return
	}
	log := i.log.WithField(fieldFile, status.File)
	switch {
	case status.Ready && !old.Ready:
		log.Info("CNI plugin is in place")
	case !status.Ready:
		log.WithField(fieldReason, status.Reason).Warn("CNI plugin is not in place")
	}
	if i.opts.OnChange != nil {
		i.opts.OnChange(status)
	}
}

// install does one round: binary, entry, and other files that have an entry.
func (i *Installer) install(now time.Time) (Status, time.Duration) {
	status := func(file string, err error) (Status, time.Duration) {
		s := Status{Ready: err == nil, File: file, Overwritten: i.conf.total + i.bin.total, Withdrawn: i.withdrawn}
		again := i.time.resync
		if err != nil {
			s.Reason = err.Error()
		}
		var wait *waitError
		if errors.As(err, &wait) {
			again = min(again, max(wait.after, i.time.burst))
		}
		return s, again
	}
	if i.withdrawn {
		return status("", errWithdrawn)
	}
	for _, dir := range []string{i.opts.BinDir, i.opts.ConfDir} {
		if err := checkDir(dir); err != nil {
			return status("", err)
		}
		i.disk.removeLeftovers(dir)
	}
	// The binary comes first: CRI-O takes no file that names a missing one, and
	// containerd would fail every pod.
	if err := i.ensureBinary(now); err != nil {
		return status("", err)
	}
	chosen, err := pick(i.opts.ConfDir, now, i.time.settle)
	if err != nil {
		return status("", err)
	}
	file, err := i.ensureEntry(chosen, now)
	if err != nil {
		return status("", err)
	}
	if err := i.cleanOthers(file); err != nil {
		return status(file, err)
	}
	return status(file, i.settled(file, chosen.list, now))
}

var errWithdrawn = errors.New("withdrawn: Sluice's entry was taken out of the CNI configuration")

// settled is not nil while what is in place may not last.
func (i *Installer) settled(file string, list conflist.List, now time.Time) error {
	if wait := i.conf.present(now); wait > 0 {
		return &waitError{contestedConf(file, list, i.conf.losses), wait}
	}
	if wait := i.bin.present(now); wait > 0 {
		return &waitError{contestedBinary(i.binary(), i.bin.losses), wait}
	}
	return nil
}

// Withdraw takes the entry out of every configuration, and has Run not put it
// back. What was a .conf or a symbolic link before is so again. To call it again
// does no harm.
func (i *Installer) Withdraw() error {
	i.work.Lock()
	defer i.work.Unlock()
	i.withdrawn = true
	i.setStatus(Status{Reason: errWithdrawn.Error(), Overwritten: i.conf.total + i.bin.total, Withdrawn: true})
	i.disk.removeLeftovers(i.opts.ConfDir)
	return i.removeEntries()
}

// RemovePlugin removes the binary if it is Sluice's. It must come after
// Withdraw, and when no ADD runs any more: a chain with a missing plugin starts
// no pod.
func (i *Installer) RemovePlugin() error {
	i.work.Lock()
	defer i.work.Unlock()
	i.withdrawn = true
	i.disk.removeLeftovers(i.opts.BinDir)
	return i.removeBinary()
}

// Uninstall is Withdraw and then RemovePlugin. The binary stays if an entry
// does.
func (i *Installer) Uninstall() error {
	if err := i.Withdraw(); err != nil {
		return err
	}
	return i.RemovePlugin()
}
