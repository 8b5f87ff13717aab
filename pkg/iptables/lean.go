package iptables

import "strings"

// Lean leaves out of a text of iptables-restore the tables without a rule and the
// chains that no rule mentions: Istio's program writes neither, and each table that
// is loaded costs every packet a hook.
func Lean(text string) string {
	var out strings.Builder
	for table := range strings.SplitAfterSeq(text, "COMMIT\n") {
		_, added, found := strings.Cut(table, "-A ")
		if !found {
			continue
		}
		for line := range strings.Lines(table) {
			chain, _, own := strings.Cut(strings.TrimPrefix(line, ":"), " - ")
			if own && strings.HasPrefix(line, ":") && !strings.Contains("-A "+added, " "+chain) {
				continue
			}
			out.WriteString(line)
		}
	}
	return out.String()
}
