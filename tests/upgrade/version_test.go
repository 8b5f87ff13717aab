//go:build sluice_failpoints

package upgrade

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// version is a build of Sluice, with failpoints.
type version struct {
	t   *testing.T
	dir string // with its programs
}

// built are the builds of this run: each is made once.
var built struct {
	dir        string // set by TestMain
	this, next string
}

// thisVersion builds what is here.
func thisVersion(t *testing.T) version {
	t.Helper()
	if built.this == "" {
		built.this = buildVersion(t, "../..", "this")
	}
	return version{t, built.this}
}

// moved are the changes that make another layout: every field of these values is
// elsewhere, and one is new.
var moved = map[string][2]string{
	"pod":        {"struct pod {\n", "struct pod {\n\t__u64 of_the_next_version;\n"},
	"its size":   {"sizeof(struct pod) == 56", "sizeof(struct pod) == 64"},
	"attachment": {"struct attachment {\n", "struct attachment {\n\t__u64 of_the_next_version;\n"},
	"that size":  {"sizeof(struct attachment) == 168", "sizeof(struct attachment) == 176"},
	"rule set":   {"__u8 sha256[32];", "__u64 of_the_next_version;\n\t__u8 sha256[32];"},
}

// nextVersion builds what is here with another layout of maps, from a copy of the
// sources: it compiles the programs in C anew.
func nextVersion(t *testing.T) version {
	t.Helper()
	if built.next != "" {
		return version{t, built.next}
	}
	if _, err := exec.LookPath("clang-19"); err != nil {
		t.Fatal("no clang-19 to compile a version with another layout: run hack/deps.sh bpf")
	}
	dir := t.TempDir()
	for _, part := range []string{"bpf", "pkg", "cmd"} {
		if err := os.CopyFS(filepath.Join(dir, part), os.DirFS(filepath.Join("../..", part))); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join("../..", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	header := filepath.Join(dir, "bpf/sluice.h")
	text, err := os.ReadFile(header)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range moved {
		if strings.Count(string(text), change[0]) != 1 {
			t.Fatalf("bpf/sluice.h does not have %q once: %s must be changed in another way", change[0], what)
		}
		text = []byte(strings.Replace(string(text), change[0], change[1], 1))
	}
	if err := os.WriteFile(header, text, 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, dir, "go", "generate", "./pkg/datapath/")
	built.next = buildVersion(t, dir, "next")
	return version{t, built.next}
}

func buildVersion(t *testing.T, source, name string) string {
	t.Helper()
	dir := filepath.Join(built.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, source, "go", "build", "-tags", "sluice_failpoints", "-o", dir+"/", "./cmd/sluicectl", "./cmd/sluiced")
	return dir
}

func run(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "BPF2GO_CC=clang-19", "BPF2GO_STRIP=llvm-strip-19", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// ctl runs its sluicectl.
func (v version) ctl(args ...string) (string, error) {
	out, err := exec.Command(filepath.Join(v.dir, "sluicectl"), args...).CombinedOutput()
	return string(out), err
}

func (v version) mustCtl(args ...string) string {
	v.t.Helper()
	out, err := v.ctl(args...)
	if err != nil {
		v.t.Fatalf("sluicectl %v: %v\n%s", args, err, out)
	}
	return out
}

// steps runs its sluicectl and lists the steps that it takes.
func (v version) steps(args ...string) []string {
	v.t.Helper()
	steps, died := v.killedAt(0, args...)
	if died {
		v.t.Fatalf("sluicectl %v was killed", args)
	}
	return steps
}

// killedAt runs its sluicectl and has it killed at a step, counted from 1. It
// returns the steps that it took; died is false if it came to its end before.
func (v version) killedAt(step int, args ...string) (steps []string, died bool) {
	v.t.Helper()
	file := filepath.Join(v.t.TempDir(), "steps")
	cmd := exec.Command(filepath.Join(v.dir, "sluicectl"), args...)
	cmd.Env = append(os.Environ(), failpoint.KillAtEnv+"="+strconv.Itoa(step), failpoint.StepsFileEnv+"="+file)
	out, err := cmd.CombinedOutput()
	text, readErr := os.ReadFile(file)
	if readErr != nil {
		v.t.Fatalf("sluicectl %v took no steps: %v: %s", args, readErr, out)
	}
	steps = strings.Split(strings.TrimSpace(string(text)), "\n")
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status := exit.Sys().(syscall.WaitStatus)
		if status.Signaled() && status.Signal() == syscall.SIGKILL {
			kit.KilledAt(steps[len(steps)-1])
			return steps, true
		}
	}
	if err != nil {
		v.t.Fatalf("sluicectl %v, to be killed at step %d: %v\n%s", args, step, err, out)
	}
	return steps, false
}

// atEachStep has a command of a version killed at each step whose name begins in a
// way, and calls check after each; before makes what the command begins with.
func (v version) atEachStep(begins string, least int, before func(), command []string, check func(step int, name string)) {
	v.t.Helper()
	before()
	names := v.steps(command...)
	if len(names) < least {
		v.t.Fatalf("%v takes only %d steps, where %d change something: %v", command, len(names), least, names)
	}
	eachOf(names, func(step int, name string) {
		if !strings.HasPrefix(name, begins) {
			return
		}
		before()
		if _, died := v.killedAt(step, command...); !died {
			v.t.Fatalf("%v was not killed at step %d (%s)", command, step, name)
		}
		v.t.Logf("%s killed at step %d of %d: %s", command[0], step, len(names), name)
		check(step, name)
		if v.t.Failed() {
			v.t.Fatalf("after %s was killed at step %d (%s)", command[0], step, name)
		}
	})
}

// eachOf calls do for the steps, counted from 1, but for most of those in a row
// that do the same: pin one map after the other, or delete from one map.
func eachOf(names []string, do func(step int, name string)) {
	const some = 7
	for i, name := range names {
		alike := i > 0 && kindOf(names[i-1]) == kindOf(name)
		if !alike || i%some == 0 {
			do(i+1, name)
		}
	}
}

// kindOf is a step's name without the map's, where all maps are pinned in turn.
func kindOf(name string) string {
	const each = "up: map "
	if strings.HasPrefix(name, each) {
		return each
	}
	return name
}
