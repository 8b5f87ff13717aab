package agentapi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

type handlerFunc func(context.Context, Request, *os.File) Answer

func (f handlerFunc) Handle(ctx context.Context, r Request, netns *os.File) Answer {
	return f(ctx, r, netns)
}

// serve runs a server until the test ends and returns its socket.
func serve(t *testing.T, handler handlerFunc) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the socket serves root only")
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	path := filepath.Join(t.TempDir(), "s")
	server, err := Listen(path, handler, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error("the socket is left behind:", err)
		}
	})
	return path
}

func call(t *testing.T, socket string, r Request, netns *os.File) (Answer, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	return Call(ctx, socket, r, netns)
}

func TestARequestAndItsDescriptorArriveAndTheAnswerComesBack(t *testing.T) {
	file := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(file, []byte("it is this one"), 0o600); err != nil {
		t.Fatal(err)
	}
	netns, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	sent := Request{
		Verb:       Add,
		Attachment: Attachment{"k8s-pod-network", "c1", "eth0"},
		Pod:        Pod{Namespace: "shop", Name: "cart", UID: "u", Annotations: map[string]string{"k": strings.Repeat("v", 256<<10)}},
	}
	r := rules.Default()
	var got Request
	var content []byte
	socket := serve(t, func(_ context.Context, request Request, netns *os.File) Answer {
		got = request
		content, _ = io.ReadAll(netns)
		return Answer{Decision: Enroll, Rules: &r, Warnings: []string{"w"}}
	})
	answer, err := call(t, socket, sent, netns)
	if err != nil {
		t.Fatal(err)
	}
	sent.Version = Version
	if diff := cmp.Diff(sent, got, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
	if string(content) != "it is this one" {
		t.Errorf("the descriptor reads %q", content)
	}
	if answer.Decision != Enroll || answer.Rules.OutboundPort != rules.DefaultOutboundPort || answer.Warnings[0] != "w" {
		t.Errorf("the answer is %+v", answer)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Error("the socket's mode is not 0600:", info.Mode(), err)
	}
}

func TestWhatNoPluginOfOursSendsIsRefusedWithASentence(t *testing.T) {
	socket := serve(t, func(context.Context, Request, *os.File) Answer {
		t.Error("the handler was asked")
		return Answer{}
	})
	for name, r := range map[string]Request{
		"came without a network namespace": {Verb: Add},
		"is not a request that":            {Verb: "format-disk"},
	} {
		_, err := call(t, socket, r, nil)
		var no *Error
		if !errors.As(err, &no) || !strings.Contains(err.Error(), name) {
			t.Errorf("the error is %v, want one with %q", err, name)
		}
	}
	r := Request{Version: 9, Verb: Status}
	if err := r.check(false); err == nil || !strings.Contains(err.Error(), "version 9") {
		t.Error("a far version is taken:", err)
	}
	r.Version = Version + 1
	if err := r.check(false); err != nil {
		t.Error("the next version is not taken:", err)
	}
}

func TestAPanicOfTheHandlerIsAnErrorThatMayPass(t *testing.T) {
	socket := serve(t, func(context.Context, Request, *os.File) Answer { panic("one bad pod") })
	for range 2 { // the daemon lives on
		_, err := call(t, socket, Request{Verb: Status}, nil)
		var no *Error
		if !errors.As(err, &no) || !no.Later || !strings.Contains(no.Message, "one bad pod") {
			t.Errorf("the error is %v", err)
		}
	}
}

func TestNoDaemonIsTold(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	hangs, err := net.Listen("unix", filepath.Join(dir, "hangs"))
	if err != nil {
		t.Fatal(err)
	}
	defer hangs.Close()
	for name, socket := range map[string]string{
		"no such file":       filepath.Join(dir, "none"),
		"connection refused": dead,
		"deadline exceeded":  hangs.Addr().String(),
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := Call(ctx, socket, Request{Verb: Status}, nil)
		cancel()
		if !errors.Is(err, ErrNoDaemon) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), socket) {
			t.Errorf("%s: the error is %v", name, err)
		}
	}
}

func TestADaemonThatTalksNonsenseIsNoDaemon(t *testing.T) {
	for name, says := range map[string][]byte{
		"nothing":         nil,
		"half a length":   {0, 0},
		"a huge length":   {255, 255, 255, 255},
		"no JSON":         frame("{"),
		"no decision":     frame(`{"version":1}`),
		"no rules":        frame(`{"version":1,"decision":"enroll"}`),
		"a far version":   frame(`{"version":7,"decision":"skip"}`),
		"other JSON":      frame(`[1]`),
		"cut in the text": frame(`{"version":1,"decision":"skip"}`)[:20],
	} {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = io.ReadFull(conn, make([]byte, header))
			_, _ = conn.Write(says)
		}()
		netns, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := call(t, socket, Request{Verb: Add}, netns); !errors.Is(err, ErrNoDaemon) {
			t.Errorf("%s: the error is %v", name, err)
		}
		netns.Close()
		l.Close()
	}
}

func TestASlowClientBlocksNobody(t *testing.T) {
	socket := serve(t, func(context.Context, Request, *os.File) Answer { return Answer{} })
	for range 50 {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, _ = conn.Write([]byte{0})
	}
	if _, err := call(t, socket, Request{Verb: Status}, nil); err != nil {
		t.Error(err)
	}
}

func frame(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}

func FuzzReceive(f *testing.F) {
	f.Add(frame(`{"version":1,"verb":"add"}`))
	f.Add([]byte{0, 0})
	f.Add(append(frame("{}"), 1, 2, 3))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 64<<10 {
			return // more than a socket's buffer takes without a reader
		}
		dir := t.TempDir()
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		client, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		server, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		if _, err := io.Copy(client, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		client.Close()
		var r Request
		file, err := receive(server, &r)
		if file != nil {
			t.Error("a descriptor came from nowhere")
		}
		if err == nil {
			_ = r.check(false)
		}
	})
}
