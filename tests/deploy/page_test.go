package deploy

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// step is a fenced block of docs/install.md; its name is what the comment before
// it says: <!-- run: NAME -->.
type step struct{ name, script string }

var fence = regexp.MustCompile("(?s)(?:<!-- run: ([a-z-]+) -->\n)?```sh\n(.*?)```")

func steps(t *testing.T) (out []step) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "docs/install.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range fence.FindAllStringSubmatch(string(text), -1) {
		out = append(out, step{m[1], m[2]})
	}
	return out
}

func TestThePageHasTheStepsThatAreRunOnACluster(t *testing.T) {
	var names []string
	for _, s := range steps(t) {
		if s.name != "" {
			names = append(names, s.name)
		}
	}
	if want := []string{"import", "install", "verify", "rollback", "uninstall"}; !slices.Equal(names, want) {
		t.Errorf("the steps are %v, want %v", names, want)
	}
}

func TestThePagesCommandsNameWhatIsThere(t *testing.T) {
	seen := 0
	for _, s := range steps(t) {
		for word := range strings.FieldsSeq(s.script) {
			switch {
			case strings.HasPrefix(word, "deploy/"):
				seen++
				if _, err := os.Stat(filepath.Join(root, word)); err != nil {
					t.Error(err)
				}
			case strings.HasPrefix(word, "daemonset/") && word != "daemonset/sluiced":
				t.Errorf("%s is not the DaemonSet's name", word)
			}
		}
	}
	if seen < 3 {
		t.Errorf("the page names %d files of deploy/", seen)
	}
}

func TestThePagesHelmCommandRenders(t *testing.T) {
	found := false
	for _, s := range steps(t) {
		for line := range strings.Lines(s.script) {
			_, args, ok := strings.Cut(line, "helm upgrade --install sluice deploy/chart ")
			if !ok {
				continue
			}
			found = true
			mustRender(t, strings.Fields(args)...)
		}
	}
	if !found {
		t.Error("no step installs the chart")
	}
}
