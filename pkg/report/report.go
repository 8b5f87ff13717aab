// Package report prints what commands found: a table for people, JSON or YAML
// for programs.
package report

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"sigs.k8s.io/yaml"
)

// Format is a form of output.
type Format string

// The forms.
const (
	Table Format = "table"
	JSON  Format = "json"
	YAML  Format = "yaml"
)

// ParseFormat reads a form by its name.
func ParseFormat(text string) (Format, error) {
	switch f := Format(text); f {
	case Table, JSON, YAML:
		return f, nil
	}
	return "", fmt.Errorf("%q is not an output format: choose table, json or yaml", text)
}

// Rows is the table form of a list.
type Rows struct {
	Head  []string
	Lines [][]string
	Empty string // printed in place of a table without lines

	RareLast bool // the last column is left out where no line has anything in it
}

// Write prints value as JSON or YAML, or rows as a table.
func Write(w io.Writer, f Format, value any, rows Rows) error {
	switch f {
	case JSON:
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(value)
	case YAML:
		text, err := yaml.Marshal(value)
		if err != nil {
			return fmt.Errorf("write YAML: %w", err)
		}
		_, err = w.Write(text)
		return err
	default:
		return writeTable(w, rows)
	}
}

func writeTable(w io.Writer, rows Rows) error {
	if len(rows.Lines) == 0 {
		_, err := fmt.Fprintln(w, rows.Empty)
		return err
	}
	columns := len(rows.Head)
	if rows.RareLast && !slices.ContainsFunc(rows.Lines, func(line []string) bool { return line[columns-1] != "" }) {
		columns--
	}
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, strings.Join(rows.Head[:columns], "\t"))
	for _, line := range rows.Lines {
		fmt.Fprintln(tw, strings.Join(line[:columns], "\t"))
	}
	return tw.Flush()
}
