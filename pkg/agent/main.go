package agent

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	apps "k8s.io/client-go/kubernetes/typed/apps/v1"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/sluice-mesh/sluice/pkg/version"
)

// Client speaks to the API server.
type Client struct {
	Core typed.CoreV1Interface
	Apps apps.AppsV1Interface
}

// Main runs the daemon as a process: with a client of its own, its log on out,
// until it is told to end. kubeconfig is empty inside a pod.
func Main(config Config, kubeconfig string, debug bool, out *os.File) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("the daemon loads BPF programs and enters pods' namespaces: run it as root")
	}
	log := newLog(out, debug)
	if err := takeClientLog(log); err != nil {
		return err
	}
	client, err := newClient(kubeconfig)
	if err != nil {
		return err
	}
	a, err := New(config, client, log)
	if err != nil {
		return err
	}
	log.WithField(fieldVersion, version.String()).Info("started")
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	err = a.Run(ctx)
	if err == nil {
		log.Info("ended")
	}
	return err
}

// newLog is JSON for machines, text on a terminal.
func newLog(out *os.File, debug bool) *logrus.Logger {
	log := logrus.New()
	log.SetOutput(out)
	if _, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS); err != nil {
		log.SetFormatter(&logrus.JSONFormatter{})
	}
	if debug {
		log.SetLevel(logrus.DebugLevel)
	}
	return log
}

// takeClientLog has client-go log nowhere but here.
func takeClientLog(log logrus.FieldLogger) error {
	flags := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(flags)
	if err := errors.Join(flags.Set("logtostderr", "false"), flags.Set("stderrthreshold", "FATAL")); err != nil {
		return fmt.Errorf("set up client-go's log: %w", err)
	}
	klog.SetOutput(logWriter{log})
	return nil
}

// logWriter takes the lines of client-go's own log. What matters of them the
// daemon says itself.
type logWriter struct{ log logrus.FieldLogger }

func (w logWriter) Write(line []byte) (int, error) {
	w.log.Debug("client-go: " + string(bytes.TrimSpace(line)))
	return len(line), nil
}

var _ io.Writer = logWriter{}

func newClient(kubeconfig string) (Client, error) {
	var config *rest.Config
	var err error
	if kubeconfig == "" {
		config, err = rest.InClusterConfig()
	} else {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return Client{}, fmt.Errorf("find the API server (give --kubeconfig outside a pod): %w", err)
	}
	config.UserAgent = "sluiced"
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	core, coreErr := typed.NewForConfig(config)
	sets, appsErr := apps.NewForConfig(config)
	if err := errors.Join(coreErr, appsErr); err != nil {
		return Client{}, fmt.Errorf("make a client of the API server: %w", err)
	}
	return Client{thrifty{core}, sets}, nil
}
