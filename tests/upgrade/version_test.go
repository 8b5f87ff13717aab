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
)

// version is a build of Sluice, with failpoints.
type version struct {
	t   *testing.T
	dir string // with its programs
}

// thisVersion builds what is here.
func thisVersion(t *testing.T) version {
	t.Helper()
	return buildVersion(t, "../..")
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
	return buildVersion(t, dir)
}

func buildVersion(t *testing.T, source string) version {
	t.Helper()
	v := version{t, t.TempDir()}
	run(t, source, "go", "build", "-tags", "sluice_failpoints", "-o", v.dir, "./cmd/...")
	return v
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

// killedAt runs its sluicectl and has it killed at a step. It returns the last
// step that it took; died is false if it came to its end before.
func (v version) killedAt(step int, args ...string) (last string, died bool) {
	v.t.Helper()
	steps := filepath.Join(v.t.TempDir(), "steps")
	cmd := exec.Command(filepath.Join(v.dir, "sluicectl"), args...)
	cmd.Env = append(os.Environ(), failpoint.KillAtEnv+"="+strconv.Itoa(step), failpoint.StepsFileEnv+"="+steps)
	out, err := cmd.CombinedOutput()
	text, readErr := os.ReadFile(steps)
	if readErr != nil {
		v.t.Fatalf("sluicectl %v took no steps: %v: %s", args, readErr, out)
	}
	taken := strings.Split(strings.TrimSpace(string(text)), "\n")
	last = taken[len(taken)-1]
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status := exit.Sys().(syscall.WaitStatus)
		if status.Signaled() && status.Signal() == syscall.SIGKILL {
			return last, true
		}
	}
	if err != nil {
		v.t.Fatalf("sluicectl %v, to be killed at step %d: %v\n%s", args, step, err, out)
	}
	return last, false
}
