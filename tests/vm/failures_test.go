// SPDX-License-Identifier: Apache-2.0

package vm

import "testing"

func TestFailuresRepeatsWhatFailedTestsSaid(t *testing.T) {
	const output = `=== RUN   TestA
    a_test.go:1: fine
--- PASS: TestA (0.00s)
=== RUN   TestB
=== RUN   TestB/one
    b_test.go:7: got 1, want 2
=== RUN   TestB/two
--- FAIL: TestB (0.01s)
    --- FAIL: TestB/one (0.01s)
    --- PASS: TestB/two (0.00s)
FAIL
`
	const want = `--- FAIL: TestB (0.01s)
    --- FAIL: TestB/one (0.01s)
    b_test.go:7: got 1, want 2
`
	if got := failures(output); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := failedTests(output), "^(TestB)$"; got != want {
		t.Errorf("the failed tests are %q, want %q", got, want)
	}
	if got := failedTests("panic: x"); got != "" {
		t.Errorf("a crash is taken for %q", got)
	}
	if got := failures("panic"); got == "" {
		t.Error("nothing is said of a crash")
	}
}
