package agent

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/sirupsen/logrus"
)

const (
	// listenRetry is how often an address that another daemon of this node still
	// has is tried again.
	listenRetry = time.Second
	httpTime    = 10 * time.Second
)

// serveHTTP serves /metrics, /healthz and /readyz until the context ends. They
// answer from the start: a daemon that waits says so.
func serveHTTP(ctx context.Context, address string, ready *readiness, registry prometheus.Gatherer, log logrus.FieldLogger) {
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("alive\n")) })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		ok, text := ready.text()
		if !ok {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = w.Write([]byte(text))
	})
	server := &http.Server{Handler: mux, ReadTimeout: httpTime, WriteTimeout: httpTime, IdleTimeout: httpTime}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	var listen net.ListenConfig
	for said := false; ctx.Err() == nil; said = true {
		listener, err := listen.Listen(ctx, "tcp", address)
		if err == nil {
			err = server.Serve(listener)
		}
		if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
			return
		}
		if !said {
			log.WithError(err).Warn("metrics and health are not served; trying again")
		}
		select {
		case <-ctx.Done():
		case <-time.After(listenRetry):
		}
	}
}
