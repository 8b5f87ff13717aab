// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

// What "make vm" puts into the machine besides these tests.
const (
	sluicectl     = "/bin/sluicectl"
	datapathTests = "/bin/netns.test"
)

// chosen are the datapath tests that run here: loading, attaching, outbound,
// inbound by both ways, the guard, and what kernels differ in. The others say
// little about a kernel and take long under emulation.
const chosen = "ItsOriginalDestination|Guard|NeverLeavesThePod|AtEnrolment|SomebodyElses|Validation|" +
	"RulesOfLocal|RulesOfInbound|Getsockopt|UDP|EnrolAnd|ItsCookie|DownRemoves|EveryMap|" +
	"OutboundHoweverTheAppConnects|OutboundOfAnMPTCP|OutboundToAnMPTCP|FastOpen|SYNCookies|ReconnectsFromItsPort|" +
	"MachineBehind|MachineHasCalled|TheIncludesAlone|ThePodsLoopback|ARerouterAsks|ComesAfterEnrolment"

// belowTheFloor are the kernels that Sluice refuses.
var belowTheFloor = map[string]bool{"5.10": true}

func TestDatapath(t *testing.T) {
	if kernel := wantKernel(t); belowTheFloor[kernel] {
		t.Skipf("Sluice refuses %s", kernel)
	}
	cmd := exec.Command(datapathTests, "-test.v", "-test.run", chosen)
	cmd.Env = append(cmd.Environ(), "SLUICE_REQUIRE_ROOT=1")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Run(); err != nil {
		t.Errorf("%s: %v", datapathTests, err)
	}
}

func TestSluicectlWorksOrRefusesWithASentence(t *testing.T) {
	kernel := wantKernel(t)
	for _, command := range []string{"check", "up"} {
		var stdout, stderr bytes.Buffer
		cmd := exec.Command(sluicectl, command)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		t.Logf("sluicectl %s: %v\n%s%s", command, err, &stdout, &stderr)
		if !belowTheFloor[kernel] {
			if err != nil {
				t.Errorf("sluicectl %s: %v", command, err)
			}
			continue
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("sluicectl %s ends with %v, want exit status 1", command, err)
		}
		said := stdout.String() + stderr.String()
		for _, want := range []string{"network namespace cookie in sockops programs", "5.15"} {
			if !strings.Contains(said, want) {
				t.Errorf("sluicectl %s does not say %q", command, want)
			}
		}
	}
	if belowTheFloor[kernel] {
		return
	}
	if out, err := exec.Command(sluicectl, "down").CombinedOutput(); err != nil {
		t.Errorf("sluicectl down: %v: %s", err, out)
	}
}
