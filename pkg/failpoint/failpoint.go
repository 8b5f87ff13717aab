// Package failpoint marks the steps between which a program may be killed, so
// that a crash test can kill it at each of them. It owns nothing else: a step
// never changes what the program does.
//
// Step is empty unless a program is built with the tag sluice_failpoints. Then
// environment variables tell it what to do:
//
//	SLUICE_KILL_AT=N       kill -9 this process at its Nth step, counted from 1
//	SLUICE_KILL_FROM=NAME  count from the first step of that name, which is 1: for
//	                       a daemon, which does many things before and beside
//	SLUICE_STEPS_FILE=F    append the name of each step to F, one on a line
//
// A test runs a program with N = 1, 2, ... until it ends by itself; the file
// names the step that it died at.
package failpoint

// The variables that a program built with sluice_failpoints reads.
const (
	KillAtEnv    = "SLUICE_KILL_AT"
	KillFromEnv  = "SLUICE_KILL_FROM"
	StepsFileEnv = "SLUICE_STEPS_FILE"
)
