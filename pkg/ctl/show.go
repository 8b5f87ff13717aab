package ctl

import (
	"cmp"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/kernel"
	"github.com/sluice-mesh/sluice/pkg/report"
)

func newPods(c *common) *cobra.Command {
	cmd := newList(c, "pods", "List the enrolled network namespaces", (*datapath.Datapath).Pods,
		report.Rows{Head: []string{"POD", "COOKIE", "IPV4", "IPV6", "RULES", "INBOUND", "MODE", "CAPTURE", "LISTENERS", "PROGRAMS", "INTERFACES"}, Empty: "No pod is enrolled.", RareLast: true},
		func(p datapath.PodInfo) []string {
			return []string{podName(p), strconv.FormatUint(p.Cookie, 10), addrText(p.Addr4), addrText(p.Addr6),
				p.RulesID.String(), string(p.Inbound), string(p.Mode), string(p.Capture), strconv.Itoa(p.Listeners), strings.Join(p.Programs, ","), interfaceText(p)}
		})
	cmd.Long = `pods lists what is enrolled. RULES is the name of its rule set in "sluicectl
rules"; CAPTURE since when outbound is captured (waiting and ready: proxy-ready,
before and after the proxy has listened); LISTENERS how many listeners on the
proxy's two ports are known; INTERFACES, where a pod has any, those that its rules
exclude or reroute. -o json and -o yaml say more, such as the addresses that count
as the pod's own.`
	return cmd
}

func newRules(c *common) *cobra.Command {
	cmd := newList(c, "rules", "List the rule sets, as the kernel looks them up", (*datapath.Datapath).Rules,
		report.Rows{Head: []string{"RULES", "PODS", "KIND", "MATCH", "VERDICT"}, Empty: "No pod is enrolled, so there are no rules."},
		func(r datapath.RuleInfo) []string {
			return []string{r.RulesID.String(), strconv.Itoa(r.Pods), r.Kind, r.Match, r.Verdict}
		})
	cmd.Long = `rules lists ports, ranges and identities as the programs compare them; pods with
equal rules share a set. Interfaces are shown by "sluicectl pods".
IDs are the machine's, also where a pod has a user namespace of its own.`
	return cmd
}

func newStats(c *common) *cobra.Command {
	cmd := newList(c, "stats", "Count connections by what became of them, and why", (*datapath.Datapath).Stats,
		report.Rows{Head: []string{"POD", "COOKIE", "REASON", "COUNT", "UNIT"}, Empty: "No connection of an enrolled pod has been seen yet."},
		func(s datapath.StatInfo) []string {
			return []string{cmp.Or(s.Pod, "-"), strconv.FormatUint(s.Cookie, 10), s.Reason, strconv.FormatUint(s.Count, 10), s.Unit}
		})
	cmd.Long = `stats counts since a pod was enrolled. docs/rules.md has the rule behind each
reason. captured-*: given to the proxy; direct-*: let go; refused-*, guard-*:
stopped. UNIT is what is counted: mostly connections, but the guard sees packets,
and a SYN that it drops is sent again. An outbound connection that finds no proxy
is counted as captured.`
	return cmd
}

func newList[T any](c *common, name, short string, list func(*datapath.Datapath) ([]T, error), rows report.Rows, line func(T) []string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   name,
		Short: short,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := c.format()
			if err != nil {
				return err
			}
			d, err := c.open()
			if err != nil {
				return err
			}
			defer d.Close()
			items, err := list(d)
			if err != nil {
				return err
			}
			rows := rows
			for _, item := range items {
				rows.Lines = append(rows.Lines, line(item))
			}
			return report.Write(cmd.OutOrStdout(), format, items, rows)
		},
	}
	addOutput(cmd, c)
	return cmd
}

func podName(p datapath.PodInfo) string {
	if p.Name == "" {
		return "-"
	}
	return p.Namespace + "/" + p.Name
}

// interfaceText is such as "net1:excluded,tap0:rerouted".
func interfaceText(p datapath.PodInfo) string {
	var texts []string
	for _, name := range p.Excluded {
		texts = append(texts, name+":excluded")
	}
	for _, name := range p.Rerouted {
		texts = append(texts, name+":rerouted")
	}
	return strings.Join(texts, ",")
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return "-"
	}
	return a.String()
}

// newCheck says what this kernel offers, and fails where Sluice cannot work.
func newCheck(c *common) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what this kernel offers, what is missing, and what follows from it",
		Long: `check loads small programs to find out what the kernel can do; it changes
nothing. Its exit status is 0 where Sluice works, 1 where it cannot.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			format, err := c.format()
			if err != nil {
				return err
			}
			if err := needRoot(); err != nil {
				return err
			}
			return showFindings(cmd, format, append(datapath.Findings(), directories()...))
		},
	}
	addOutput(cmd, c)
	return cmd
}

func showFindings(cmd *cobra.Command, format report.Format, findings []datapath.Finding) error {
	ok := true
	rows := report.Rows{Head: []string{"", "WHAT", "NEEDED", "OTHERWISE"}}
	for i, f := range findings {
		mark, needed := "ok", "optional"
		if f.Required {
			needed = "required"
		}
		if !f.OK {
			mark = "missing"
			ok = ok && !f.Required
		} else {
			findings[i].Means = "" // without the table's heading it would be said to be so
		}
		otherwise := f.Means
		if f.Error != "" {
			otherwise += " (" + f.Error + ")"
		}
		rows.Lines = append(rows.Lines, []string{mark, f.Name, needed, otherwise})
	}
	if err := report.Write(cmd.OutOrStdout(), format, findings, rows); err != nil {
		return err
	}
	if !ok {
		cmd.PrintErrln("sluicectl: Sluice cannot work here: something required is missing.")
		return errNotOK
	}
	if format == report.Table {
		cmd.Println("Sluice works on this machine.")
	}
	return nil
}

// directories are findings about what must be mounted.
func directories() []datapath.Finding {
	root := datapath.Finding{Name: "the true root of cgroup2", Required: true, Means: "programs attached elsewhere would see nobody"}
	dir, err := kernel.CgroupRoot()
	if root.OK = err == nil; !root.OK {
		root.Error = err.Error()
	} else {
		root.Name += " (" + dir + ")"
	}
	fs := datapath.Finding{Name: "a bpffs at " + defaultBPFFS, Means: "\"sluicectl up\" mounts one"}
	if err := kernel.IsBPFFS(defaultBPFFS); err != nil {
		fs.Error = "not mounted"
	}
	fs.OK = fs.Error == ""
	return []datapath.Finding{root, fs}
}
