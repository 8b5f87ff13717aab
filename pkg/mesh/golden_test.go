package mesh

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the golden files")

func TestRealisticPodsMatchTheirGoldenFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/pods/*.yaml")
	if err != nil || len(files) < 9 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var pod Pod
			if err := yaml.Unmarshal(text, &pod); err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".json"
			got := describe(t, pod)
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// describe is what Judge says of a pod: an error, a reason, or rules.
func describe(t *testing.T, pod Pod) string {
	t.Helper()
	d, err := Judge(pod, DefaultConfig())
	var what any = d
	switch {
	case err != nil:
		what = map[string]string{"error": err.Error()}
	case d.Skip != "":
		what = map[string]string{"skip": d.Skip}
	}
	text, err := json.MarshalIndent(what, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text) + "\n"
}
