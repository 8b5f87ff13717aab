package e2e

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestOnAClusterKnownByItsKubeconfigAlone runs some tests as a user does who has a
// cluster: with KUBECONFIG, and nothing of the node. Those that need it are named.
func TestOnAClusterKnownByItsKubeconfigAlone(t *testing.T) {
	bed := needNode(t)
	needSluice(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const run, skip = "TestTheProxySeesAServicesAddress", "TestTheHostsOwnRulesStillStopProxiedTraffic"
	cmd := exec.CommandContext(t.Context(), self, "-test.v", "-test.run", "^("+run+"|"+skip+")$")
	cmd.Env = []string{"KUBECONFIG=" + bed.Kubeconfig()}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	_, list, _ := strings.Cut(string(out), "e2e: 1 tests were skipped")
	if !strings.Contains(string(out), "--- PASS: "+run) || !strings.Contains(list, skip) {
		t.Errorf("%s did not pass, or %s is not named at the end:\n%s", run, skip, out)
	}
}
