package ctl

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/report"
)

func TestCheckSaysWhatFollowsOnlyFromWhatIsMissing(t *testing.T) {
	for _, tt := range []struct {
		format     report.Format
		says, omit string
	}{
		{report.JSON, `"means": "no way"`, "no home"},
		{report.YAML, "means: no way", "no home"},
		{report.Table, "OTHERWISE", "means"},
	} {
		findings := []datapath.Finding{
			{Name: "a house", Required: true, OK: true, Means: "no home"},
			{Name: "a road", Means: "no way"},
		}
		var out bytes.Buffer
		cmd := &cobra.Command{}
		cmd.SetOut(&out)
		if err := showFindings(cmd, tt.format, findings); err != nil {
			t.Error(err)
		}
		if !strings.Contains(out.String(), tt.says) || strings.Contains(out.String(), tt.omit) {
			t.Errorf("as %s it says\n%s", tt.format, out.String())
		}
	}
}

func TestCheckFailsWhereSomethingRequiredIsMissing(t *testing.T) {
	var out, stderr bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	cmd.SetErr(&stderr)
	err := showFindings(cmd, report.Table, []datapath.Finding{{Name: "a house", Required: true, Means: "no home"}})
	if !errors.Is(err, errNotOK) || !strings.Contains(stderr.String(), "something required is missing") {
		t.Errorf("%v, %q", err, stderr.String())
	}
}
