package agentapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
)

// Handler answers requests. netns is nil for verbs that come without one, and is
// closed after the call.
type Handler interface {
	Handle(ctx context.Context, request Request, netns *os.File) Answer
}

const (
	// readTime is how long a client may take to say what it wants.
	readTime = 2 * time.Second
	// handleTime is how long an answer may take, and to send it.
	handleTime = 8 * time.Second
	// maxClients are served at once. Others wait in the backlog.
	maxClients = 256
)

// Server serves a socket.
type Server struct {
	listener *net.UnixListener
	handler  Handler
	log      logrus.FieldLogger
}

// Listen makes the socket, for root alone. One that a dead daemon left is
// replaced; whether another one lives is for the caller to know (it holds a lock).
func Listen(path string, handler Handler, log logrus.FieldLogger) (*Server, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove an old socket: %w", err)
	}
	failpoint.Step("daemon: old socket removed")
	// Between bind and chmod nobody else may connect.
	old := unix.Umask(0o177)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	failpoint.Step("daemon: socket made")
	return &Server{listener: listener, handler: handler, log: log}, nil
}

// Serve answers until the context ends, then waits for the answers under way and
// removes the socket.
func (s *Server) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.listener.Close() })
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	slots := make(chan struct{}, maxClients)
	for {
		conn, err := s.listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) {
				time.Sleep(10 * time.Millisecond) // until a descriptor is free
				continue
			}
			return fmt.Errorf("accept on %s: %w", s.listener.Addr(), err)
		}
		slots <- struct{}{}
		clients.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			if err := s.serve(context.WithoutCancel(ctx), conn); err != nil {
				s.log.WithError(err).Debug("a client of the socket was not served")
			}
		})
	}
}

func (s *Server) serve(ctx context.Context, conn *net.UnixConn) error {
	if err := mustBeRoot(conn); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(readTime)); err != nil {
		return fmt.Errorf("set a deadline: %w", err)
	}
	var request Request
	netns, err := receive(conn, &request)
	if err != nil {
		return err
	}
	defer closeAll([]*os.File{netns})
	ctx, cancel := context.WithTimeout(ctx, handleTime)
	defer cancel()
	answer := s.answer(ctx, request, netns)
	answer.Version = Version
	if err := conn.SetDeadline(time.Now().Add(handleTime)); err != nil {
		return fmt.Errorf("set a deadline: %w", err)
	}
	return send(conn, answer, nil)
}

// answer turns a panic of the handler into an error: one bad pod must not end
// the daemon of a node.
func (s *Server) answer(ctx context.Context, request Request, netns *os.File) (answer Answer) {
	defer func() {
		if p := recover(); p != nil {
			s.log.WithField("panic", p).Error("a request made the daemon panic")
			answer = Answer{Error: &Error{Message: fmt.Sprintf("the node daemon panicked (%v): report it, with its log", p), Later: true}}
		}
	}()
	if err := request.check(netns != nil); err != nil {
		return Answer{Error: &Error{Message: err.Error()}}
	}
	return s.handler.Handle(ctx, request, netns)
}

// mustBeRoot checks who is at the other end: the socket's mode says the same, but
// a directory may be mounted where it should not.
func mustBeRoot(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("look at a client: %w", err)
	}
	var who *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		who, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return fmt.Errorf("look at a client: %w", err)
	}
	if credErr != nil {
		return fmt.Errorf("ask who a client is: %w", credErr)
	}
	if who.Uid != 0 {
		return fmt.Errorf("a process of user %d tried to use the socket, which is for root", who.Uid)
	}
	return nil
}
