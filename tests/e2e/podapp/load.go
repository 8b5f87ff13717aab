package main

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

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

// keep makes requests over one connection after the other. It speaks HTTP by itself:
// Go's client closes a connection by itself where it has to wait for the processor,
// and makes another without a word where one was closed.
func (l *loads) keep(ctx context.Context, url string) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		l.note(ctx, nil, err, &l.now.Kept)
		return
	}
	dialer := &net.Dialer{Timeout: clientTimeout}
	for ; ctx.Err() == nil; pauseFor(ctx, 20*time.Millisecond) {
		conn, err := dialer.DialContext(ctx, "tcp", request.URL.Host)
		if err != nil {
			l.note(ctx, nil, err, &l.now.Kept)
			continue
		}
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		err = l.use(ctx, conn, request)
		if stop() {
			conn.Close()
			l.lose(err)
		}
	}
}

// use makes requests over a connection until it is lost.
func (l *loads) use(ctx context.Context, conn net.Conn, request *http.Request) error {
	for reader := bufio.NewReader(conn); ; pauseFor(ctx, 20*time.Millisecond) {
		if err := conn.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
			return err
		}
		if err := request.Write(conn); err != nil {
			return err
		}
		response, err := http.ReadResponse(reader, request)
		if err != nil {
			return err
		}
		got, err := read(response)
		l.note(ctx, got, err, &l.now.Kept)
		if response.Close {
			return errors.New("the proxy says that it closes it")
		}
	}
}

func (l *loads) lose(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now.Lost++
	l.now.Error = "a connection was lost: " + err.Error()
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
