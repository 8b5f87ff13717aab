package main

import (
	"strings"
	"testing"
)

// A daemon that runs refuses anything less.
func TestHelpNamesTheCommandThatTakesADaemonDown(t *testing.T) {
	var out strings.Builder
	cmd := command()
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"--help"})
	if err := cmd.Execute(); err != nil || !strings.Contains(out.String(), "sluicectl down --now\n") {
		t.Errorf("%v: %s", err, out.String())
	}
}
