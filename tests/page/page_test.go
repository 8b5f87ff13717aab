package page

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func write(t *testing.T, text string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStepsAreTheBlocksInTheirOrder(t *testing.T) {
	got, err := Steps(write(t, "Say:\n\n<!-- run: one -->\n```sh\na\nb\n```\n\n```sh\nc\n```\n\n```yaml\nd: e\n```\n"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Step{{"one", "a\nb\n"}, {"", "c\n"}}, got); diff != "" {
		t.Error(diff)
	}
}

func TestAMarkThatNamesNoBlockIsAnError(t *testing.T) {
	const block = "<!-- run: one -->\n```sh\na\n```\n"
	for text, want := range map[string]string{
		block + block: `two blocks named "one"`,
		block + "<!-- run: two -->\n\n```sh\nb\n```\n": "no block of shell follows",
		block + "<!-- run: Two_2 -->\n```sh\nb\n```\n": "no block of shell follows",
		block + "<!-- run: two -->\nwords\n":           "no block of shell follows",
		block + "<!-- run: one -->\nwords\n":           "no block of shell follows",
		"<!-- run: -->\n```sh\nb\n```\n":               "no block of shell follows",
		"<!-- run: a step -->\n```sh\nb\n```\n":        "no block of shell follows",
	} {
		if got, err := Steps(write(t, text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v; want %q", text, got, err, want)
		}
	}
}
