package bench

import "net/netip"

// A worker is this program again, as another process in a pod's or a far
// namespace, cgroup and UID. It reads jobs from its standard input and answers
// each with a reply, both as JSON.
type job struct {
	Kind  jobKind        `json:"kind"`
	Addr  netip.AddrPort `json:"addr"`
	Addrs int            `json:"addrs,omitempty"` // successive addresses from Addr on, used in turn
	Warm  int            `json:"warm,omitempty"`  // repetitions before those that count
	Count int            `json:"count,omitempty"` // connections, echoes or batches of calls
	Size  int            `json:"size,omitempty"`  // bytes of one echo
	Call  call           `json:"call,omitempty"`
}

type jobKind string

const (
	jobListen jobKind = "listen" // on Addr, from now on
	jobServe  jobKind = "serve"  // accept Count connections at Addr, one after the other, and echo until they end
	jobDial   jobKind = "dial"   // Warm+Count times: connect, one echo, close
	jobEcho   jobKind = "echo"   // one connection, Warm+Count echoes on it
	jobCalls  jobKind = "calls"  // Warm+Count batches of one system call
)

// call is a system call that anybody makes, meshed or not.
type call string

const (
	callConnectTCP  call = "connect_tcp" // to where no route leads: the hook, and little else
	callConnectUDP  call = "connect_udp"
	callGetsockopt  call = "getsockopt" // SO_ERROR
	callGetsockname call = "getsockname"
	callGetpeername call = "getpeername"
)

// reply holds nanoseconds, one per repetition (for calls: per call, the mean of
// a batch).
type reply struct {
	Error   string    `json:"error,omitempty"`
	Connect []float64 `json:"connect,omitempty"` // connect() alone
	Total   []float64 `json:"total,omitempty"`
	// What SO_ORIGINAL_DST said to the server: how often it answered, and the
	// last answer or error.
	Answered int            `json:"answered,omitempty"`
	Original netip.AddrPort `json:"original"`
	Refused  string         `json:"refused,omitempty"`
}
