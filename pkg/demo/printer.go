package demo

import (
	"fmt"
	"io"
	"strings"
)

// Printer shows a demo to people, line by line as it happens.
type Printer struct {
	Out io.Writer
	// Quiet leaves the results out, for callers that print them otherwise.
	Quiet bool
}

// Widths that hold every name and nearly every expectation.
const (
	nameWidth     = 33
	expectedWidth = 51
)

// Step prints what is done next.
func (p Printer) Step(text string) { fmt.Fprintf(p.Out, "\n%s\n", text) }

// Note prints something to look at.
func (p Printer) Note(text string) {
	for line := range strings.Lines(strings.TrimSpace(text)) {
		fmt.Fprintf(p.Out, "      %s\n", strings.TrimRight(line, "\n"))
	}
}

// Result prints a line of the list.
func (p Printer) Result(r Result) {
	if p.Quiet {
		return
	}
	mark := "ok"
	if !r.OK {
		mark = "FAIL"
	}
	fmt.Fprintf(p.Out, "%-4s  %-*s  expected %-*s  got %s\n", mark, nameWidth, r.Name, expectedWidth, r.Expected, r.Got)
}
