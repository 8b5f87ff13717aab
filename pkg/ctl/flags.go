package ctl

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// flagError says what is wrong with a flag, and where there is more.
func flagError(cmd *cobra.Command, err error) error {
	if bad, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		err = fmt.Errorf("--%s: %q is not %s", bad.GetFlag().Name, bad.GetValue(), valueWords(bad.GetFlag().Value.Type()))
	}
	return fmt.Errorf("%w; see \"%s --help\"", err, cmd.CommandPath())
}

// valueWords says what a flag takes.
func valueWords(kind string) string {
	switch kind {
	case "bool":
		return "true or false"
	case "uint16":
		return "a number from 0 to 65535"
	case "uint32":
		return "a number from 0 to 4294967295"
	case "uint64":
		return "a number from 0 to 18446744073709551615"
	case "int":
		return "a whole number"
	case "duration":
		return "a time such as 300ms or 2s"
	default:
		return "a list separated by commas"
	}
}

// noArgs refuses what is no flag, in words that are true also of a command that
// has commands of its own.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	path := cmd.CommandPath()
	if !cmd.HasAvailableSubCommands() {
		return fmt.Errorf("%q is no flag, and \"%s\" takes flags only; see \"%s --help\"", args[0], path, path)
	}
	cmd.SuggestionsMinimumDistance = 2 // cobra's own, which it sets only where it speaks itself
	nearest := cmd.SuggestionsFor(args[0])
	for i, name := range nearest {
		nearest[i] = fmt.Sprintf("\"%s %s\"", path, name)
	}
	hint := "; see"
	if len(nearest) > 0 {
		hint = ": did you mean " + strings.Join(nearest, " or ") + "? See"
	}
	return fmt.Errorf("unknown command %q for \"%s\"%s \"%s --help\"", args[0], path, hint, path)
}

// twoFiles wants the files of a comparison.
func twoFiles(cmd *cobra.Command, args []string) error {
	if len(args) == 2 {
		return nil
	}
	return fmt.Errorf("name the bench.json of two runs: \"%s before/bench.json after/bench.json\"", cmd.CommandPath())
}
