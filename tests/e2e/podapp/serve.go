package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
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
	return read(response)
}

// read is what a response says.
func read(response *http.Response) (*answer, error) {
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
