// Package demo shows Sluice at work with parts that nobody here wrote: two pods
// wired by the reference CNI plugins, and HAProxy as the mesh's proxy. It owns
// everything that it makes, makes all of it in namespaces of its own, and leaves
// the machine as it was.
//
// Three kinds of process take part, all of them this program:
//
//   - Run, in the machine's own namespaces, makes a cgroup and an empty
//     directory, starts the node, prints what it tells, and removes the two.
//   - RunNode is PID 1 of new PID, mount and network namespaces: "the node".
//     Pods, bpffs and temporary files exist only below it, so that they end
//     with it, however it ends.
//   - RunServer and RunClient are what runs in pods, as ordinary users.
package demo

// Result is one thing that was shown.
type Result struct {
	Name     string `json:"name"`
	Expected string `json:"expected"`
	Got      string `json:"got"`
	OK       bool   `json:"ok"` // Got is what was expected
}

// Break is what a demo leaves out or does wrong on purpose, to see it fail.
type Break string

// What can be broken.
const (
	BreakNothing Break = ""
	BreakEnroll  Break = "enroll" // web is never enrolled
	BreakProxy   Break = "proxy"  // HAProxy is killed before the first captured connection
	BreakDown    Break = "down"   // Sluice is not taken down
)

// Tools are the programs of others that the demo runs.
type Tools struct {
	HAProxy string // path
	BPFTool string // path
	CNI     string // directory of the CNI plugins
}

// nodeConfig is what Run tells RunNode.
type nodeConfig struct {
	Dir    string // an empty directory, on which the node mounts a tmpfs
	Cgroup string // the demo's own cgroup2 directory
	Tools  Tools
	Break  Break
}

// message is one line of what RunNode tells Run: one of its fields.
type message struct {
	Step   string  `json:"step,omitempty"`   // what is done next
	Note   string  `json:"note,omitempty"`   // something to look at
	Result *Result `json:"result,omitempty"` // what was shown
	Error  string  `json:"error,omitempty"`  // why it could not go on
}
