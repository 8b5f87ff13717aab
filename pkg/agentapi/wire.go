// Package agentapi is what the plugin and the daemon say to each other: one
// request and one answer on a unix socket, as JSON, with the pod's network
// namespace as a descriptor beside it. It knows neither pods nor the kernel, and
// trusts nobody: sizes and times are bounded, and only root is served.
package agentapi

import (
	"errors"
	"fmt"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// Version of the wire. A daemon answers requests of its own version and of the
// one before; a plugin takes answers of its own and of the next.
const Version = 1

// maxMessage is the size of a request or an answer in bytes. Kubernetes allows
// 256 KiB of annotations, of which requests carry the few that rules read, and
// JSON escapes little in them.
const maxMessage = 1 << 20

// Verb is what is asked.
type Verb string

// The verbs. Add and Check come with a namespace.
const (
	Add    Verb = "add"    // what is this pod?
	Undo   Verb = "undo"   // the plugin could not enroll it: it does not start
	Del    Verb = "del"    // the plugin has removed an attachment
	Check  Verb = "check"  // is this pod as it should be?
	Status Verb = "status" // would Add work?
	Log    Verb = "log"    // lines of the plugin's log
	// TakeDown is an operator's: remove everything from this node, now.
	TakeDown Verb = "take-down"
)

// Attachment is one interface of one sandbox in one network: what ADD makes and
// DEL removes.
type Attachment struct {
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	Interface   string `json:"interface"`
}

// Pod is who the runtime says it is.
type Pod struct {
	Namespace   string            `json:"namespace"`
	Name        string            `json:"name"`
	UID         string            `json:"uid,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"` // only those that rules read; nil: the runtime gave none
}

// Request is one question.
type Request struct {
	Version    int        `json:"version"`
	Verb       Verb       `json:"verb"`
	Attachment Attachment `json:"attachment"`
	Pod        Pod        `json:"pod"`
	Lines      []string   `json:"lines,omitempty"` // of Log
}

// Decision about a pod.
type Decision string

// The decisions.
const (
	Skip   Decision = "skip"
	Enroll Decision = "enroll"
)

// Answer is one answer. An Error says that there is no decision.
type Answer struct {
	Version  int          `json:"version"`
	Decision Decision     `json:"decision,omitempty"`
	Reason   string       `json:"reason,omitempty"` // of a skip
	Rules    *rules.Rules `json:"rules,omitempty"`  // of an enrolment
	// Provisional says that the API server did not know the pod: the enrolment is
	// to be recorded as such, and judged again.
	Provisional bool     `json:"provisional,omitempty"`
	Warnings    []string `json:"warnings,omitempty"`
	Error       *Error   `json:"error,omitempty"`
}

// Error is why a request failed, and whether it may succeed later.
type Error struct {
	Message string `json:"message"` // what is wrong and what to do
	Later   bool   `json:"later,omitempty"`
}

// Error is the message.
func (e *Error) Error() string { return e.Message }

// ErrNoDaemon is returned where nobody answers on the socket.
var ErrNoDaemon = errors.New("the node daemon does not answer")

// check refuses what no plugin of ours sends.
func (r Request) check(netns bool) error {
	if r.Version < 1 || r.Version > Version+1 {
		return fmt.Errorf("the plugin speaks version %d of the wire and this daemon version %d: install the same release of both", r.Version, Version)
	}
	switch r.Verb {
	case Add, Check:
		if !netns {
			return fmt.Errorf("%q came without a network namespace", r.Verb)
		}
	case Undo, Del, Status, Log, TakeDown:
	default:
		return fmt.Errorf("%q is not a request that this daemon knows", r.Verb)
	}
	return nil
}
