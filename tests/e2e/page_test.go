package e2e

import (
	"flag"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/sluice-mesh/sluice/tests/page"
)

// way is a way to install Sluice. Tests install, change and remove it by the steps of
// docs/install.md and by nothing else; those of the chart have its name behind theirs.
type way string

const (
	byManifest way = ""
	byChart    way = "-chart"
)

// eachWay runs a test with each; it is the manifest that is left installed.
func eachWay(t *testing.T, test func(*testing.T, way)) {
	t.Run("by the chart", func(t *testing.T) { test(t, byChart) })
	t.Run("by the manifest", func(t *testing.T) { test(t, byManifest) })
}

// localImage says for the chart's steps that the image is loaded on each node.
const localImage = "REGISTRY=localhost"

// pagesRun are the steps that tests have run.
var pagesRun = map[string]bool{}

// step runs a step of the page, in a checkout of Sluice. What the page calls the
// reader's own are variables, NAME=VALUE. It returns what was printed.
func step(t *testing.T, checkout, name string, variables ...string) string {
	t.Helper()
	bed := needNode(t)
	steps, err := page.Steps(filepath.Join(*checkoutFlag, "docs/install.md"))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(steps, func(s page.Step) bool { return s.Name == name })
	if name == "" || at < 0 {
		t.Fatalf("docs/install.md has no step %q: it marks one by <!-- run: %s -->", name, name)
	}
	pagesRun[name] = true
	began := time.Now()
	out, err := bed.Shell(t.Context(), checkout, steps[at].Script, variables...)
	t.Logf("step %q took %v", name, time.Since(began).Round(100*time.Millisecond))
	if err != nil {
		t.Fatalf("step %q of docs/install.md: %v\n%s\n%s", name, err, out, sluiceLog(20))
	}
	return out
}

// checkPage is for the end of a run of all tests: each step of the page was run.
func checkPage() error {
	for _, filter := range []string{"test.run", "test.skip"} {
		if flag.Lookup(filter).Value.String() != "" {
			return nil
		}
	}
	steps, err := page.Steps(filepath.Join(*checkoutFlag, "docs/install.md"))
	if err != nil {
		return err
	}
	if left := neverRun(steps, pagesRun); len(left) > 0 {
		return fmt.Errorf("docs/install.md marks the steps %q, and no test has run them", left)
	}
	return nil
}

func neverRun(steps []page.Step, run map[string]bool) (names []string) {
	for _, s := range steps {
		if s.Name != "" && !run[s.Name] {
			names = append(names, s.Name)
		}
	}
	return names
}

func TestAMarkedStepThatNoTestRunsIsFound(t *testing.T) {
	got := neverRun([]page.Step{{Name: "install"}, {Script: "not marked"}, {Name: "remove"}}, map[string]bool{"install": true})
	if !slices.Equal(got, []string{"remove"}) {
		t.Errorf("it finds %q", got)
	}
}

// versionOf is the version that a checkout installs.
func versionOf(t *testing.T, checkout string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^appVersion: *(\S+)$`).FindStringSubmatch(mustRead(t, filepath.Join(checkout, "deploy/chart/Chart.yaml")))
	if m == nil {
		t.Fatalf("the chart in %s has no appVersion", checkout)
	}
	return m[1]
}
