package bench

import (
	"net/netip"
	"time"
)

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

	Clients int           `json:"clients,omitempty"` // threads, each with a connection of its own
	Time    time.Duration `json:"time,omitempty"`    // how long to send, or to go on
	Down    bool          `json:"down,omitempty"`    // stream: the other end sends
	Same    bool          `json:"same,omitempty"`    // hold: all to Addr
	Delay   time.Duration `json:"delay,omitempty"`   // serve: busy for so long at each accept and echo
}

type jobKind string

const (
	jobListen jobKind = "listen" // on Addr, from now on
	jobServe  jobKind = "serve"  // accept Count connections at Addr, one after the other, and echo until they end
	jobDial   jobKind = "dial"   // Warm+Count times: connect, one echo, close
	jobEcho   jobKind = "echo"   // one connection, Warm+Count echoes on it
	jobCalls  jobKind = "calls"  // Warm+Count batches of one system call

	jobStream      jobKind = "stream"       // Clients connections; this end sends for Time, or reads (Down)
	jobServeStream jobKind = "serve-stream" // Count connections; this end reads, or sends for Time (not Down)
	jobRate        jobKind = "rate"         // for Time, Clients threads: connect, one echo, close
	jobServeRate   jobKind = "serve-rate"   // until each acceptor has been told to stop
	jobHold        jobKind = "hold"         // open up to Count connections and keep them
	jobNumber      jobKind = "number"       // Done: the descriptor that listens on Addr
	jobGet         jobKind = "get"          // one HTTP request; Done: it passed the proxy
	jobServeHold   jobKind = "serve-hold"   // accept up to Count connections and keep them
	jobQuery       jobKind = "query"        // Warm+Count datagrams, each answered
	jobListenUDP   jobKind = "listen-udp"   // as listen
	jobServeQuery  jobKind = "serve-query"  // answer Count datagrams
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
	CPU     float64   `json:"cpu,omitempty"` // CPU time of this end, of the whole job
	// Of streams, rates and what is held.
	Bytes    float64 `json:"bytes,omitempty"`    // read
	Done     int     `json:"done,omitempty"`     // connections that did what they should
	Failed   int     `json:"failed,omitempty"`   // those that did not
	Failure  string  `json:"failure,omitempty"`  // the last one's
	Accepted int     `json:"accepted,omitempty"` // by the server
	// What SO_ORIGINAL_DST said to the server: how often it answered, and the
	// last answer or error.
	Answered int            `json:"answered,omitempty"`
	Original netip.AddrPort `json:"original"`
	Refused  string         `json:"refused,omitempty"`
}
