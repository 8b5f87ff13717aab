package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"time"
)

// The app's ports. The control port is how a test speaks to a pod, and is to be
// excluded from capture, so that what is measured is not what measures.
const (
	appPort     = ":8080"
	controlPort = ":9000"
)

// answer is what the app says to each request: who it is and how it was called.
type answer struct {
	Host   string   `json:"host"`
	Remote string   `json:"remote"` // the caller, as the app sees it
	Path   []string `json:"path"`   // what each proxy on the way has added
}

// fetched is what became of a request that the app made.
type fetched struct {
	Answer *answer `json:"answer,omitempty"`
	Local  string  `json:"local"` // both ends, as the caller sees them
	Peer   string  `json:"peer"`
	Error  string  `json:"error,omitempty"`
}

// serve is the app. With a URL it puts a load on that from its first moment.
func serve(urls []string) error {
	app := http.NewServeMux()
	app.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		host, _ := os.Hostname()
		write(w, answer{Host: host, Remote: r.RemoteAddr, Path: r.Header.Values("X-Path")})
	})
	control := http.NewServeMux()
	loads := &loads{}
	if len(urls) > 0 {
		loads.start(urls[0])
	}
	control.HandleFunc("/fetch", func(w http.ResponseWriter, r *http.Request) { write(w, fetch(r.URL.Query().Get("url"))) })
	control.HandleFunc("/capabilities", func(w http.ResponseWriter, _ *http.Request) { write(w, capabilities()) })
	control.HandleFunc("/load/start", func(w http.ResponseWriter, r *http.Request) {
		loads.start(r.URL.Query().Get("url"))
		write(w, "started")
	})
	control.HandleFunc("/load", func(w http.ResponseWriter, _ *http.Request) { write(w, loads.read()) })
	control.HandleFunc("/load/stop", func(w http.ResponseWriter, _ *http.Request) { write(w, loads.stop()) })
	ended := make(chan error, 2)
	go func() { ended <- http.ListenAndServe(appPort, app) }()
	go func() { ended <- http.ListenAndServe(controlPort, control) }()
	return <-ended
}

func write(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

// fetch makes one request over a connection of its own.
func fetch(url string) (out fetched) {
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		out.Local, out.Peer = info.Conn.LocalAddr().String(), info.Conn.RemoteAddr().String()
	}})
	got, err := ask(ctx, &http.Client{Transport: transport, Timeout: clientTimeout}, url)
	if err != nil {
		out.Error = err.Error()
	}
	out.Answer = got
	return out
}

func ask(ctx context.Context, client *http.Client, url string) (*answer, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, errors.New(response.Status + ": " + string(body))
	}
	var got answer
	return &got, json.Unmarshal(body, &got)
}

// fetchMany is a client that ends: the first URL that answers within a time is
// enough, and the answer is where Kubernetes shows it.
func fetchMany(args []string) error {
	if len(args) < 2 {
		return errors.New("give fetch a duration and at least one URL")
	}
	limit, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	urls := args[1:]
	var last string
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(300 * time.Millisecond) {
		for _, url := range urls {
			got := fetch(url)
			if got.Error == "" {
				text, err := json.Marshal(got)
				if err != nil {
					return err
				}
				return os.WriteFile("/dev/termination-log", text, 0o644)
			}
			last = got.Error
		}
	}
	return errors.New(last)
}

// capabilities are this process's, as its kernel says.
func capabilities() map[string]string {
	out := map[string]string{}
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		out["error"] = err.Error()
	}
	for line := range strings.Lines(string(text)) {
		if name, value, _ := strings.Cut(line, ":"); strings.HasPrefix(name, "Cap") {
			out[name] = strings.TrimSpace(value)
		}
	}
	return out
}

// counts are what a load has come to.
type counts struct {
	Kept    int64  `json:"kept"`    // requests over connections that stay open
	Lost    int64  `json:"lost"`    // such connections that were lost
	New     int64  `json:"new"`     // requests over connections of their own
	Failed  int64  `json:"failed"`  // requests that failed, of both kinds
	Escaped int64  `json:"escaped"` // requests that no outbound proxy saw
	Error   string `json:"error,omitempty"`
}

// loads is a load on one URL: connections that stay open and are used all the time,
// and new ones one after the other.
type loads struct {
	mu     sync.Mutex
	now    counts
	cancel context.CancelFunc
	wait   sync.WaitGroup
}

const kept = 5

func (l *loads) start(url string) {
	l.stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now = counts{}
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(context.Background())
	for range kept {
		l.wait.Go(func() { l.keep(ctx, url) })
	}
	l.wait.Go(func() { l.renew(ctx, url) })
}

func (l *loads) stop() counts {
	l.mu.Lock()
	cancel := l.cancel
	l.mu.Unlock()
	if cancel != nil {
		cancel()
		l.wait.Wait()
	}
	return l.read()
}

func (l *loads) read() counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

func (l *loads) note(ctx context.Context, got *answer, err error, count *int64) {
	if ctx.Err() != nil {
		return // the last one was cut off
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	*count++
	switch {
	case err != nil:
		l.now.Failed++
		l.now.Error = err.Error()
	case !seenOutbound(got):
		l.now.Escaped++
	}
}

func seenOutbound(got *answer) bool {
	for _, p := range got.Path {
		if strings.HasPrefix(p, "out ") {
			return true
		}
	}
	return false
}

func (l *loads) keep(ctx context.Context, url string) {
	dials := 0
	dialer := &net.Dialer{Timeout: clientTimeout}
	client := &http.Client{Timeout: clientTimeout, Transport: &http.Transport{
		MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if dials++; dials > 1 {
				l.mu.Lock()
				l.now.Lost++
				l.mu.Unlock()
			}
			return dialer.DialContext(ctx, network, address)
		},
	}}
	defer client.CloseIdleConnections()
	for ctx.Err() == nil {
		got, err := ask(ctx, client, url)
		l.note(ctx, got, err, &l.now.Kept)
		pauseFor(ctx, 20*time.Millisecond)
	}
}

func (l *loads) renew(ctx context.Context, url string) {
	client := &http.Client{Timeout: clientTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	for ctx.Err() == nil {
		got, err := ask(ctx, client, url)
		l.note(ctx, got, err, &l.now.New)
		pauseFor(ctx, 5*time.Millisecond)
	}
}

func pauseFor(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
