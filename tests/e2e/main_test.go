// Package e2e runs Sluice on a real Kubernetes cluster: tests/e2e/testbed, which
// `make e2e` brings up, or with KUBECONFIG set any other that Sluice is installed on.
// What a request met on its way is written into it by each proxy (see haproxy.cfg), so
// each assertion is about traffic that arrived.
package e2e

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

var (
	programFlag  = flag.String("e2e.kubernetes", "", "tests/e2e/kubernetes, built: bring up a cluster with it")
	podappFlag   = flag.String("e2e.podapp", "", "tests/e2e/podapp, built for pods")
	haproxyFlag  = flag.String("e2e.haproxy", "/usr/sbin/haproxy", "HAProxy, built with netfilter support as Debian's is")
	helmFlag     = flag.String("e2e.helm", "", "helm, built from hack/helm")
	checkoutFlag = flag.String("e2e.checkout", "../..", "checkout of Sluice, with its image built")
	nextFlag     = flag.String("e2e.next", "", "the same of another version")
	appImage     = flag.String("e2e.app-image", "sluice.e2e/app:1", "image of podapp on the cluster")
	proxyImage   = flag.String("e2e.proxy-image", "sluice.e2e/proxy:1", "image of HAProxy on the cluster")
	logsFlag     = flag.String("e2e.logs", "", "directory for the logs of the cluster's programs")
	holdFlag     = flag.Bool("e2e.hold", false, "after the tests, keep the cluster until interrupted")
)

//go:embed haproxy.cfg
var haproxyConfig string

// cluster is what the tests run on; bed is nil if it is not ours.
var cluster struct {
	client kubernetes.Interface
	bed    *testbed.Cluster
}

func TestMain(m *testing.M) {
	flag.Parse()
	status, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		status = max(status, 1)
	}
	os.Exit(status)
}

func run(m *testing.M) (status int, err error) {
	kubeconfig := os.Getenv("KUBECONFIG")
	switch {
	case kubeconfig != "":
		config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return 1, err
		}
		if cluster.client, err = kubernetes.NewForConfig(config); err != nil {
			return 1, err
		}
		status = m.Run()
		if len(skipped) > 0 {
			fmt.Printf("e2e: %d tests were skipped: they stop the node's programs, change its files or read its maps, and KUBECONFIG does not lead there:\n  %s\n",
				len(skipped), strings.Join(skipped, "\n  "))
		}
		return status, nil
	case *programFlag == "":
		return m.Run(), nil // each test says what it needs
	case !testbed.Inside():
		return testbed.Run(context.Background())
	}
	dir, err := os.MkdirTemp("", "images-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	archives, err := images(dir)
	if err != nil {
		return 1, err
	}
	began := time.Now()
	say := func(format string, args ...any) { fmt.Printf("testbed: "+format+"\n", args...) }
	if cluster.bed, err = testbed.Up(context.Background(), *programFlag, *logsFlag, archives, say); err != nil {
		if cluster.bed != nil {
			cluster.bed.Tail(os.Stderr, 2000)
		}
		return 1, err
	}
	say("the cluster is up after %.1f s", time.Since(began).Seconds())
	cluster.client = cluster.bed.Client
	if err := cluster.bed.AddCommand("helm", *helmFlag); err != nil {
		return 1, err
	}
	status = m.Run()
	if status == 0 {
		err = checkPage()
	}
	if *holdFlag {
		say("holding the cluster; interrupt to end")
		select {}
	}
	return status, err
}

// images writes the images of the tests' pods, and returns their archives.
func images(dir string) (archives []string, err error) {
	if *podappFlag == "" || *helmFlag == "" || *nextFlag == "" {
		return nil, errors.New("give -e2e.podapp, -e2e.helm and -e2e.next too: make e2e does")
	}
	podapp := func(name, as string) *testbed.Image {
		return &testbed.Image{Name: name, Entrypoint: []string{as}, Files: map[string]string{as: *podappFlag}}
	}
	proxy := &testbed.Image{
		Name: *proxyImage, Entrypoint: []string{*haproxyFlag, "-f", "/etc/haproxy.cfg"},
		Files: map[string]string{}, Texts: map[string]string{"/etc/haproxy.cfg": haproxyConfig},
	}
	if err := proxy.AddProgram(*haproxyFlag); err != nil {
		return nil, err
	}
	for i, image := range []*testbed.Image{podapp(testbed.PauseImage, "/pause"), podapp(*appImage, "/podapp"), proxy} {
		archive := filepath.Join(dir, fmt.Sprint(i, ".tar"))
		if err := image.Write(archive); err != nil {
			return nil, err
		}
		archives = append(archives, archive)
	}
	return archives, nil
}

// needCluster skips where there is none.
func needCluster(t *testing.T) {
	t.Helper()
	if cluster.client == nil {
		t.Skip("needs a cluster: make e2e brings one up, KUBECONFIG=... make e2e takes yours")
	}
}

// skipped are the tests that needNode has skipped on a cluster of somebody else.
var skipped []string

// needNode skips where the node cannot be reached.
func needNode(t *testing.T) *testbed.Cluster {
	t.Helper()
	needCluster(t)
	if cluster.bed == nil {
		skipped = append(skipped, t.Name())
		t.Skip("needs the node itself, which KUBECONFIG does not give")
	}
	return cluster.bed
}
