package e2e

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/tests/e2e/testbed"
)

// wantNoTrace wants the node's files to be as before Sluice.
func wantNoTrace(t *testing.T) {
	t.Helper()
	if text := mustRead(t, testbed.Conflist); strings.Contains(text, "sluice") {
		t.Error("the conflist is", text)
	}
	for _, path := range []string{pluginPath, "/var/run/sluice/agent.sock"} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error(path, "is left:", err)
		}
	}
}

func TestAfterAnUninstallRunningPodsStayRedirectedAndNewOnesAreNot(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	uninstall(t)
	wantNoTrace(t)
	s.goesThrough("client", server, "out client")
	s.run(plain("plain"), meshed("new", unvalidated))
	s.goesStraight("plain", server)
	s.goesStraight("new", server)
	s.remove("client")

	// Installed again, it takes everything over.
	install(t, byManifest)
	s.goesThrough("new", server, "out new")
	s.run(meshed("newest"))
	s.goesThrough("newest", server, "out newest")
}

func TestANodeIsDisabledAndEnabledAgain(t *testing.T) {
	needNode(t)
	needSluice(t)
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	node := "NODE=" + testbed.Node
	step(t, *checkoutFlag, "disable-node", node)
	if text := mustRead(t, testbed.Conflist); strings.Contains(text, "sluice") {
		t.Error("the conflist is", text)
	}
	s.run(plain("plain"), meshed("unvalidated", unvalidated))
	for _, name := range []string{"client", "plain", "unvalidated"} {
		s.goesStraight(name, server)
	}
	step(t, *checkoutFlag, "enable-node", node)
	for _, name := range []string{"client", "unvalidated"} {
		s.goesThrough(name, server, "out "+name)
	}
	s.goesStraight("plain", server)
}

// TestAManifestDeletedAtOnceIsAnUninstallToo: not as the page says, so the daemon's
// rights go while it ends.
func TestAManifestDeletedAtOnceIsAnUninstallToo(t *testing.T) {
	bed := needNode(t)
	needSluiceBy(t, byManifest)
	if said, err := bed.Shell(t.Context(), *checkoutFlag, "kubectl delete -f deploy/sluice.yaml --timeout=120s"); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	wantNoTrace(t)
}

func TestAnUninstallWithRunningPodsDirectRemovesEverythingAtOnce(t *testing.T) {
	needNode(t)
	needSluiceBy(t, byChart)
	step(t, *checkoutFlag, "uninstall-direct")
	s := newSpace(t)
	s.run(plain("server"), meshed("client"))
	server := s.appURL("server")
	s.goesThrough("client", server, "out client")
	uninstall(t)
	wantNoTrace(t)
	s.goesStraight("client", server)
	if _, err := os.Lstat(sluiceBPFFS); !errors.Is(err, os.ErrNotExist) {
		t.Error("pins are left:", err)
	}
	install(t, byChart)
	s.goesThrough("client", server, "out client")
}
