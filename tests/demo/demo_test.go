// Package demo runs "sluicectl demo" as a person would, and sees to it that it
// tells the truth: also when something is wrong.
package demo

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluice-mesh/sluice/pkg/demo"
	"github.com/sluice-mesh/sluice/pkg/kernel"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// bin is the command, built from what is tested; empty where it cannot run.
var bin string

func TestMain(m *testing.M) { os.Exit(runAll(m)) }

func runAll(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "sluice-demo-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = filepath.Join(dir, "sluicectl")
	build := exec.Command("go", "build", "-o", bin, "github.com/sluice-mesh/sluice/cmd/sluicectl")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build sluicectl: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

func needRoot(t *testing.T) {
	t.Helper()
	if bin != "" {
		return
	}
	const reason = "the demo makes network namespaces and loads BPF programs: run as root"
	if os.Getenv(kit.RequireRootEnv) != "" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// nothingLeft looks for what the demo of a process has made outside itself.
func nothingLeft(t *testing.T, pid int) {
	t.Helper()
	root, err := kernel.CgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	mine := "sluice-demo-" + strconv.Itoa(pid)
	for _, pattern := range []string{filepath.Join(root, mine), filepath.Join("/tmp", mine+"-*")} {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("the demo has left %v", left)
		}
	}
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range commands {
		if text, err := os.ReadFile(path); err == nil && bytes.Contains(text, []byte(mine+"-")) {
			t.Errorf("the demo has left process %s: %q", path, text)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(mine)) {
		t.Errorf("the demo has left a mount (%v)", err)
	}
}

// run returns the demo's results and its exit status.
func run(t *testing.T, args ...string) ([]demo.Result, int) {
	t.Helper()
	cmd := exec.Command(bin, append([]string{"demo", "-o", "json"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) {
		t.Fatal(err)
	}
	nothingLeft(t, cmd.Process.Pid)
	var results []demo.Result
	if err := json.Unmarshal(out, &results); err != nil {
		t.Fatalf("the demo did not print a list: %v\n%s\n%s", err, out, stderr.String())
	}
	return results, cmd.ProcessState.ExitCode()
}

func TestAllIsAsExpected(t *testing.T) {
	needRoot(t)
	began := time.Now()
	results, status := run(t)
	if took := time.Since(began); took > time.Minute {
		t.Errorf("the demo took %s, more than a minute", took)
	}
	seen := map[string]bool{}
	for _, r := range results {
		if !r.OK || r.Expected != r.Got {
			t.Errorf("%s: expected %s, got %s", r.Name, r.Expected, r.Got)
		}
		if seen[r.Name] {
			t.Errorf("%s is shown twice", r.Name)
		}
		seen[r.Name] = true
	}
	for _, name := range []string{
		"IPv4 outbound", "IPv4 inbound", "IPv4 outbound, seen by the app", "IPv4 outbound, seen by the server",
		"IPv4 from the proxy's own UID", "IPv4 to an excluded port", "IPv4 to an excluded range",
		"IPv4 outbound, no proxy", "IPv4 inbound, no proxy", "the map pods, read by bpftool",
		"after down, found by bpftool", "after the demo",
	} {
		if !seen[name] {
			t.Errorf("%s was not shown", name)
		}
	}
	if status != 0 {
		t.Errorf("exit status %d, want 0", status)
	}
}

// What is broken must be shown as broken, and nothing else.
func TestTellsWhatIsBroken(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		broken    demo.Break
		fail, not []string
	}{
		{demo.BreakEnroll,
			[]string{"IPv4 outbound", "IPv4 inbound", "IPv4 outbound, no proxy", "IPv4 inbound, no proxy", "the map pods, read by bpftool"},
			[]string{"IPv4 outbound, before", "IPv4 to an excluded port", "IPv4 outbound, after"}},
		{demo.BreakProxy,
			[]string{"IPv4 outbound", "IPv4 inbound"},
			[]string{"IPv4 outbound, before", "IPv4 to an excluded port", "IPv4 outbound, no proxy", "IPv4 inbound, proxy is back"}},
		{demo.BreakDown,
			[]string{"after down, found by bpftool", "IPv4 outbound, after"},
			[]string{"IPv4 outbound", "after the demo"}},
	} {
		t.Run(string(c.broken), func(t *testing.T) {
			results, status := run(t, "--break", string(c.broken))
			if status != 1 {
				t.Errorf("exit status %d, want 1", status)
			}
			ok := map[string]bool{}
			for _, r := range results {
				ok[r.Name] = r.OK
			}
			for _, name := range c.fail {
				if got, shown := ok[name]; got || !shown {
					t.Errorf("%s: shown %t, ok %t; want it to fail", name, shown, got)
				}
			}
			for _, name := range c.not {
				if !ok[name] {
					t.Errorf("%s fails, and should not", name)
				}
			}
		})
	}
}

func TestLeavesNothingWhenEndedEarly(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name   string
		after  string // a word of its progress
		signal syscall.Signal
		status int
	}{
		{"Ctrl-C while pods are made", "Making", syscall.SIGINT, 1},
		{"SIGTERM while Sluice is up", "With Sluice", syscall.SIGTERM, 1},
		{"SIGKILL while Sluice is up", "With Sluice", syscall.SIGKILL, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(bin, "demo")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for scan := bufio.NewScanner(out); scan.Scan(); {
				if strings.HasPrefix(scan.Text(), c.after) {
					if err := cmd.Process.Signal(c.signal); err != nil {
						t.Error(err)
					}
				}
			}
			_ = cmd.Wait() // its status is looked at below
			if got := cmd.ProcessState.ExitCode(); got != c.status {
				t.Errorf("exit status %d, want %d", got, c.status)
			}
			if c.signal == syscall.SIGKILL {
				awaitCleanUp(cmd.Process.Pid)
			}
			nothingLeft(t, cmd.Process.Pid)
		})
	}
}

// awaitCleanUp waits for the demo's inside, which goes on by itself when its
// outside is killed.
func awaitCleanUp(pid int) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if left, _ := filepath.Glob("/tmp/sluice-demo-" + strconv.Itoa(pid) + "-*"); len(left) == 0 {
			if root, err := kernel.CgroupRoot(); err == nil {
				if _, err := os.Stat(filepath.Join(root, "sluice-demo-"+strconv.Itoa(pid))); errors.Is(err, os.ErrNotExist) {
					return
				}
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestRefusesBadInput(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		name string
		args []string
		says string
	}{
		{"no plugins", []string{"--cni-path", t.TempDir()}, "--cni-path"},
		{"not HAProxy", []string{"--haproxy", "/bin/true"}, "/bin/true does not run as HAProxy does"},
		{"not a cgroup", []string{"--cgroup", t.TempDir()}, "is not a cgroup2 directory"},
		{"unknown output", []string{"-o", "xml"}, "choose table, json or yaml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(bin, append([]string{"demo"}, c.args...)...)
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), c.says) {
				t.Errorf("ended with %v and says %q, not %q", err, out, c.says)
			}
			nothingLeft(t, cmd.Process.Pid)
		})
	}
}
