package e2e

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
)

// platforms are the chart's profiles, and none: as its schema has them.
func platforms(t *testing.T) []string {
	t.Helper()
	var schema struct {
		Properties struct {
			Platform struct {
				Enum []string `json:"enum"`
			} `json:"platform"`
		} `json:"properties"`
	}
	if err := json.Unmarshal([]byte(mustRead(t, filepath.Join(*checkoutFlag, "deploy/chart/values.schema.json"))), &schema); err != nil {
		t.Fatal(err)
	}
	if len(schema.Properties.Platform.Enum) < 8 {
		t.Fatalf("the chart's schema has the platforms %q", schema.Properties.Platform.Enum)
	}
	return schema.Properties.Platform.Enum
}

// TestTheAPIServerAcceptsEachPlatformsProfile: admission and validation of a real API
// server, which keeps nothing of it; a field that it does not know is an error.
func TestTheAPIServerAcceptsEachPlatformsProfile(t *testing.T) {
	bed := needNode(t)
	s := newSpace(t)
	const dryRun = `helm template sluice deploy/chart -n "$NAMESPACE" --kube-version 1.32.0 $OPTIONS | sed "$CHANGE" |
		kubectl apply -n "$NAMESPACE" --dry-run=server --validate=strict -f -`
	try := func(change string, options ...string) (string, error) {
		return bed.Shell(t.Context(), *checkoutFlag, dryRun, "NAMESPACE="+s.name, "CHANGE="+change, "OPTIONS="+strings.Join(options, " "))
	}
	for _, platform := range platforms(t) {
		t.Run("platform="+platform, func(t *testing.T) {
			said, err := try("", "--set", "platform="+platform)
			if err != nil {
				t.Fatalf("%v\n%s", err, said)
			}
			if !strings.Contains(said, "daemonset.apps/sluiced created (server dry run)") {
				t.Error("it says", said)
			}
		})
	}
	t.Run("kustomize", func(t *testing.T) {
		const base = `kubectl kustomize deploy/kustomize | sed "s/sluice-system/$NAMESPACE/" | kubectl apply --dry-run=server --validate=strict -f -`
		if said, err := bed.Shell(t.Context(), *checkoutFlag, base, "NAMESPACE="+s.name); err != nil || !strings.Contains(said, "daemonset.apps/sluiced created (server dry run)") {
			t.Errorf("%v: %s", err, said)
		}
	})
	t.Run("and refuses what it does not know", func(t *testing.T) {
		if said, err := try("s/terminationGracePeriodSeconds/terminationGraceSeconds/"); err == nil || !strings.Contains(said, "unknown field") {
			t.Errorf("%v: %s", err, said)
		}
		if said, err := try("s/hostNetwork: true/hostNetwork: perhaps/"); err == nil {
			t.Error("hostNetwork: perhaps is accepted:", said)
		}
	})
}
