//go:build !sluice_failpoints

package failpoint

// Enabled says whether steps do anything in this build.
const Enabled = false

// Step marks a moment between two changes of state. name says what has just been
// done, such as "enroll: pod written", or what comes next.
func Step(string) {}
