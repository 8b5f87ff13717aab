package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
)

const (
	// longest is how long a demo may take before it is ended.
	longest = 45 * time.Second
	// windDown is how long it may then take to clean up before it is killed.
	windDown = 10 * time.Second
)

// Options say how to run the demo.
type Options struct {
	// Cgroup is a cgroup2 directory, in which the demo makes one of its own.
	Cgroup string
	Tools  Tools // what is empty is searched for
	Break  Break
	// Show is told of every step, note and result as it happens.
	Show Shower
}

// Shower is told what happens. Printer is one.
type Shower interface {
	Step(text string)
	Note(text string)
	Result(r Result)
}

// Run runs the demo and returns what was shown. It returns an error where the
// demo could not be carried through; results that are not OK are no error.
// Whatever happens, nothing of the demo is left, or the error says what is.
func Run(ctx context.Context, opts Options) ([]Result, error) {
	if _, err := datapath.Probe(); err != nil {
		return nil, err
	}
	tools, err := findTools(ctx, opts.Tools)
	if err != nil {
		return nil, err
	}
	pid := os.Getpid()
	// Not TMPDIR: the pods' ordinary users must be able to go there.
	dir, err := os.MkdirTemp("/tmp", fmt.Sprintf("sluice-demo-%d-", pid))
	if err != nil {
		return nil, fmt.Errorf("make the demo's directory: %w", err)
	}
	cgroup := filepath.Join(opts.Cgroup, fmt.Sprintf("sluice-demo-%d", pid))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return nil, errors.Join(fmt.Errorf("make the demo's cgroup: %w", err), os.Remove(dir))
	}
	d := &demo{show: opts.Show}
	config := nodeConfig{Dir: dir, Cgroup: cgroup, Tools: tools, Break: opts.Break}
	err = d.runNode(ctx, config)
	left := errors.Join(gone(ctx, cgroup), gone(ctx, dir), notMounted(dir))
	if left != nil {
		return d.results, errors.Join(err, left)
	}
	if err == nil {
		d.result(Result{Name: "after the demo", Expected: untouched, Got: untouched, OK: true})
	}
	return d.results, err
}

// untouched is what gone and notMounted, and the end of the node's PID
// namespace, have shown.
const untouched = "no process, cgroup, mount or file left"

// demo is the outside, while it runs.
type demo struct {
	show    Shower
	results []Result
}

func (d *demo) result(r Result) {
	d.results = append(d.results, r)
	d.show.Result(r)
}

// runNode starts this program as PID 1 of new namespaces and listens to it. When
// it returns, no process of the demo exists any more: the kernel ends all of a
// PID namespace with its first process.
func (d *demo) runNode(ctx context.Context, config nodeConfig) error {
	ctx, cancel := context.WithTimeoutCause(ctx, longest, fmt.Errorf("the demo was not done within %s", longest))
	defer cancel()
	text, err := json.Marshal(config)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "demo-role", "node", string(text))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Setsid:     true, // Ctrl-C is for Run alone
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	// The node ends in good order when this end is closed, also because this
	// process is no more.
	cmd.Cancel = stdin.Close
	cmd.WaitDelay = windDown
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start a process in network, mount and PID namespaces of its own: %w", err)
	}
	told := d.listen(stdout)
	ended := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case told != nil:
		return told
	case ended != nil:
		return fmt.Errorf("the demo ended early (%w): %s", ended, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// listen passes on what the node tells until it has nothing more to tell. It
// returns the node's own error.
func (d *demo) listen(from io.Reader) error {
	dec := json.NewDecoder(from)
	var told error
	for {
		var m message
		if dec.Decode(&m) != nil {
			return told
		}
		switch {
		case m.Error != "":
			told = errors.New(m.Error)
		case m.Result != nil:
			d.result(*m.Result)
		case m.Step != "":
			d.show.Step(m.Step)
		case m.Note != "":
			d.show.Note(m.Note)
		}
	}
}

// gone removes an empty directory, or a cgroup once the kernel has let go of it.
func gone(ctx context.Context, dir string) error {
	var err error
	if poll(context.WithoutCancel(ctx), patience, func() bool {
		err = os.Remove(dir)
		return err == nil || errors.Is(err, os.ErrNotExist)
	}) {
		return nil
	}
	return fmt.Errorf("the demo has left something: %w", err)
}

func notMounted(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	if len(mounts) > 0 {
		return fmt.Errorf("the demo has left a mount: %s", mounts[0].Mountpoint)
	}
	return nil
}
