package install

import (
	"path/filepath"
	"slices"
	"testing"
)

func TestEntriesAreTheFilesWithAnEntryOfSluices(t *testing.T) {
	n := newNode(t)
	if got := Entries(n.conf); len(got) != 0 {
		t.Errorf("in an empty directory: %q", got)
	}
	n.write("05-other.conflist", `{"cniVersion":"1.0.0","name":"o","plugins":[{"type":"bridge"}]}`)
	n.write("10-bridge.conflist", `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"sluice-cni"}]}`)
	n.write("20-broken.conflist", `{`)
	if got, want := Entries(n.conf), []string{filepath.Join(n.conf, "10-bridge.conflist")}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := Entries(filepath.Join(n.conf, "absent")); len(got) != 0 {
		t.Errorf("in a directory that is not there: %q", got)
	}
}
