package deploy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/tests/page"
)

func TestThePagesCommandsNameWhatIsThere(t *testing.T) {
	steps, err := page.Steps(filepath.Join(root, "docs/install.md"))
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, s := range steps {
		for word := range strings.FieldsSeq(s.Script) {
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
