// Package ctl is the command line of sluicectl. Noun commands (pods, rules,
// stats, check) change nothing; verb commands (up, down, enroll, unenroll, refresh, watch) do.
package ctl

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
	"github.com/sluice-mesh/sluice/pkg/report"
	"github.com/sluice-mesh/sluice/pkg/version"
)

// defaultBPFFS is where sluicectl mounts a bpffs if there is none.
const defaultBPFFS = "/sys/fs/bpf"

// Env is what the command line touches of the world.
type Env struct {
	In       io.Reader // nil: the process's own
	Out, Err io.Writer
}

// errNotOK ends a command that has already said what is wrong.
var errNotOK = errors.New("not ok")

// Run executes one command line and returns its exit status.
func Run(env Env, args []string) int {
	root := newRoot(env)
	root.SetArgs(args)
	root.SetIn(env.In)
	root.SetOut(env.Out)
	root.SetErr(env.Err)
	err := root.Execute()
	if err == nil {
		return 0
	}
	if !errors.Is(err, errNotOK) {
		root.PrintErrln("sluicectl: " + err.Error())
	}
	return 1
}

// flags that most commands share
type common struct {
	env    Env
	dir    string
	runDir string
	output string
}

func (c *common) format() (report.Format, error) { return report.ParseFormat(c.output) }

func (c *common) open() (*datapath.Datapath, error) {
	if err := needRoot(); err != nil {
		return nil, err
	}
	return datapath.Open(datapath.Options{Dir: c.dir, Log: c.log(), Flags: c.flags()})
}

// flags are those that a command needs to be about the same datapath, for hints.
func (c *common) flags() (out string) {
	if c.dir != datapath.DefaultDir {
		out = " --bpffs " + shellWord(c.dir)
	}
	if c.runDir != agentapi.DefaultRunDir {
		out += " --run-dir " + shellWord(c.runDir)
	}
	return out
}

// hint is a command line about the same datapath, in quotes.
func (c *common) hint(command string) string {
	return "\"sluicectl " + command + c.flags() + "\""
}

// shellWord is a word as a shell takes it.
func shellWord(text string) string {
	if regexp.MustCompile(`^[\w./:=@%+,-]+$`).MatchString(text) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

func (c *common) log() logrus.FieldLogger {
	log := logrus.New()
	log.SetOutput(c.env.Err)
	return log
}

func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("this needs root: run it with sudo, or as root")
	}
	return nil
}

// defaultCgroup is the true root of cgroup2.
func defaultCgroup(dir string) (string, error) {
	if dir != "" {
		return dir, kernel.IsCgroup2(dir)
	}
	return kernel.CgroupRoot()
}

func newRoot(env Env) *cobra.Command {
	c := &common{env: env}
	root := &cobra.Command{
		Use:     "sluicectl",
		Version: version.String(),
		Short:   "Redirect a pod's TCP connections to its mesh proxy with eBPF, without iptables",
		Long: `sluicectl runs Sluice on one machine, without Kubernetes.

  sluicectl check                   what this kernel offers
  sluicectl up                      load and attach the node's programs
  sluicectl enroll --netns NAME     capture a network namespace's connections
  sluicectl pods                    what is enrolled
  sluicectl stats                   what happened to connections, and why
  sluicectl watch                   keep enrolled namespaces current as their addresses change
  sluicectl unenroll --netns NAME   leave the namespace alone again
  sluicectl down                    remove every trace

  sluicectl demo                    see all of it work, with a real proxy`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArgs, // in place of cobra's lines
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVar(&c.dir, "bpffs", datapath.DefaultDir, "directory on a bpffs below which everything is pinned")
	root.PersistentFlags().StringVar(&c.runDir, "run-dir", agentapi.DefaultRunDir, "directory of the node daemon, where there is one")
	root.SetFlagErrorFunc(flagError)
	root.AddCommand(newUp(c), newDown(c), newEnroll(c), newUnenroll(c), newRefresh(c), newWatch(c), newPods(c), newRules(c), newStats(c), newCheck(c), newBench(c), newDemo(c), newDemoRole())
	return root
}

// count is such as "1 pod" or "2 pods".
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func addOutput(cmd *cobra.Command, c *common) {
	cmd.Flags().StringVarP(&c.output, "output", "o", "table", "output format: table, json or yaml")
}
