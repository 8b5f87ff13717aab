// Package script tests sluicectl as its users meet it: by its words, its exit
// status and what it leaves behind.
package script

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/ctl"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// inWorld runs the tests in the kit's private cgroup, with its bpffs.
type inWorld struct{ *testing.M }

func (w inWorld) Run() int { return kit.Run(w.M) }

// The test binary is sluicectl too: under that name, in a directory of the PATH.
func TestMain(m *testing.M) {
	kit.HoldAndExit()
	testscript.Main(inWorld{m}, map[string]func(){
		"sluicectl": func() { os.Exit(run(os.Args[1:])) },
	})
}

// run is sluicectl in the script's own cgroup, if it has one, for scripts run
// beside each other.
func run(args []string) int {
	if cgroup := os.Getenv("CGROUP"); cgroup != "" {
		if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "enter the script's cgroup:", err)
			return 2
		}
	}
	return ctl.Run(ctl.Env{Out: os.Stdout, Err: os.Stderr}, args)
}

func TestScripts(t *testing.T) {
	kit.Cgroup(t) // skips without root
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: os.Getenv("UPDATE") == "1",
		Setup:         setUp,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"refuses":  refuses,
			"nothing":  nothing,
			"asnobody": asNobody,
			"mask":     mask,
		},
	})
}

// setUp gives a script a pod and directories: $NETNS, $COOKIE, $CGROUP (the
// script's own, which sluicectl runs in), $BPFFS (a bpffs) and $DIR (below it, not there yet).
func setUp(env *testscript.Env) error {
	t := env.T().(testing.TB)
	pod := kit.NewPod(t)
	dir := filepath.Join(kit.BPFFS(t), "script-"+regexp.MustCompile(`[^a-z]`).ReplaceAllString(filepath.Base(env.WorkDir), ""))
	env.Setenv("NETNS", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), pod.Fd()))
	env.Setenv("COOKIE", fmt.Sprint(pod.Cookie()))
	cgroup := filepath.Join(kit.Cgroup(t), filepath.Base(dir))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return err
	}
	env.Setenv("CGROUP", cgroup)
	env.Setenv("BPFFS", kit.BPFFS(t))
	env.Setenv("DIR", dir)
	env.Defer(func() {
		if _, err := datapath.Down(dir); err != nil {
			t.Error("clean up:", err)
		}
		kit.Eventually(t, "nobody is in "+cgroup, func() bool { return rmdir(cgroup) })
	})
	return nil
}

// rmdir removes a cgroup, which a script may have done itself.
func rmdir(cgroup string) bool {
	err := os.Remove(cgroup)
	return err == nil || errors.Is(err, os.ErrNotExist)
}

// refuses REGEXP ARG... runs sluicectl and wants exit status 1 and one sentence
// on stderr that matches, and nothing else.
func refuses(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: refuses REGEXP ARG...")
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("sluicectl", args[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = ts.MkAbs("."), &stdout, &stderr
	judge(ts, cmd.Run(), args[0], stdout.String(), stderr.String())
}

func judge(ts *testscript.TestScript, err error, want, stdout, stderr string) {
	ts.Logf("[stderr]\n%s", stderr)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		ts.Fatalf("it ends with %v, want exit status 1", err)
	}
	if stdout != "" {
		ts.Fatalf("it prints %q on stdout", stdout)
	}
	if !strings.HasPrefix(stderr, "sluicectl: ") || strings.Count(stderr, "\n") != 1 || strings.Contains(stderr, "goroutine") {
		ts.Fatalf("it does not say one sentence: %q", stderr)
	}
	if !regexp.MustCompile(want).MatchString(stderr) {
		ts.Fatalf("it says %q, which does not match %q", stderr, want)
	}
}

// asnobody REGEXP ARG... is refuses for a user without any right.
func asNobody(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: asnobody REGEXP ARG...")
	}
	path, err := exec.LookPath("sluicectl")
	ts.Check(err)
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		ts.Check(os.Chmod(dir, 0o755))
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(path, args[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	judge(ts, cmd.Run(), args[0], stdout.String(), stderr.String())
}

// nothing PATH... wants paths not to be there.
func nothing(ts *testscript.TestScript, neg bool, args []string) {
	for _, path := range args {
		if _, err := os.Lstat(path); neg == errors.Is(err, unix.ENOENT) {
			ts.Fatalf("%s: %v", path, err)
		}
	}
}

// mask FILE NAME... writes what stdout holds to a file, with the values of these
// environment variables, and rule set numbers, replaced by their names.
func mask(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile("stdout")
	for _, name := range args[1:] {
		text = strings.ReplaceAll(text, ts.Getenv(name), "$"+name)
	}
	text = regexp.MustCompile(`(?m) +`).ReplaceAllString(text, " ")
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o644))
}

// kitAddr is a port of the far host.
func kitAddr(port int) netip.AddrPort { return netip.AddrPortFrom(kit.Far4, uint16(port)) }
