package agentapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// A daemon answers a plugin of the next version, which says more than it knows,
// and refuses one further away with a sentence.
func TestADaemonUnderstandsAPluginOfTheNextVersion(t *testing.T) {
	var asked atomic.Int32
	socket := serve(t, func(_ context.Context, r Request, _ *os.File) Answer {
		asked.Add(1)
		if r.Verb != Status {
			t.Errorf("the daemon was asked to %s", r.Verb)
		}
		return Answer{}
	})
	for _, tt := range []struct {
		version  int
		answered bool
	}{{Version, true}, {Version + 1, true}, {Version + 2, false}, {0, false}} {
		before := asked.Load()
		answer := sayTo(t, socket, fmt.Sprintf(`{"version":%d,"verb":"status","ofTheNextVersion":{"a":[1]},"pod":{"alsoNew":true}}`, tt.version))
		if got := answer.Error == nil && asked.Load() == before+1; got != tt.answered {
			t.Errorf("version %d: answered %v (%+v), want %v", tt.version, got, answer, tt.answered)
		}
		if !tt.answered && !strings.Contains(answer.Error.Message, fmt.Sprint("version ", tt.version)) {
			t.Errorf("version %d is refused with %q", tt.version, answer.Error.Message)
		}
	}
}

// A plugin takes the answer of a daemon of the next version, and none of one
// further away: that is as if no daemon were there.
func TestAPluginUnderstandsADaemonOfTheNextVersion(t *testing.T) {
	asRules, err := json.Marshal(rules.Default())
	if err != nil {
		t.Fatal(err)
	}
	asRules = append([]byte(`{"ofTheNextVersion":["x"],`), asRules[1:]...)
	for _, tt := range []struct {
		version int
		taken   bool
	}{{Version, true}, {Version + 1, true}, {Version + 2, false}, {0, false}} {
		socket := answering(t, fmt.Sprintf(`{"version":%d,"decision":"enroll","alsoNew":{"b":2},"rules":%s}`, tt.version, asRules))
		netns, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := call(t, socket, Request{Verb: Add}, netns)
		netns.Close()
		if !tt.taken {
			if !errors.Is(err, ErrNoDaemon) || !strings.Contains(err.Error(), fmt.Sprint("version ", tt.version)) {
				t.Errorf("version %d: %+v, %v", tt.version, answer, err)
			}
			continue
		}
		if err != nil || answer.Decision != Enroll || answer.Rules == nil || answer.Rules.OutboundPort != rules.DefaultOutboundPort {
			t.Errorf("version %d: %+v, %v", tt.version, answer, err)
		}
	}
}

// sayTo sends a request as it is and returns the answer.
func sayTo(t *testing.T, socket, request string) (answer Answer) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(frame(request)); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(conn)
	if err != nil || len(text) < header {
		t.Fatalf("the answer is %q, %v", text, err)
	}
	if err := json.Unmarshal(text[header:], &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

// answering is the socket of a daemon that gives one answer to whatever it is
// asked first.
func answering(t *testing.T, answer string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.ReadFull(conn, make([]byte, header))
		_, _ = conn.Write(frame(answer))
	}()
	return path
}
