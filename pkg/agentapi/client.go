package agentapi

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// Call asks the daemon at a socket and waits for its answer until the context
// ends. ErrNoDaemon is in the error where nobody answers at all; an *Error where
// the daemon says no.
func Call(ctx context.Context, socket string, request Request, netns *os.File) (Answer, error) {
	request.Version = Version
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return Answer{}, fmt.Errorf("%w at %s: %w", ErrNoDaemon, socket, cause(err))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	answer, err := exchange(conn.(*net.UnixConn), request, netns)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return Answer{}, fmt.Errorf("%w at %s: %w", ErrNoDaemon, socket, err)
	}
	if answer.Error != nil {
		return Answer{}, answer.Error
	}
	return answer, nil
}

func exchange(conn *net.UnixConn, request Request, netns *os.File) (Answer, error) {
	if err := send(conn, request, netns); err != nil {
		return Answer{}, err
	}
	var answer Answer
	file, err := receive(conn, &answer)
	closeAll([]*os.File{file})
	if err != nil {
		return Answer{}, err
	}
	return answer, answer.check(request.Verb)
}

// check refuses what no daemon of ours says.
func (a Answer) check(verb Verb) error {
	if a.Version < 1 || a.Version > Version+1 {
		return fmt.Errorf("it speaks version %d of the wire and this plugin version %d: install the same release of both", a.Version, Version)
	}
	if a.Error != nil || verb != Add {
		return nil
	}
	switch {
	case a.Decision == Skip:
	case a.Decision == Enroll && a.Rules != nil:
	default:
		return fmt.Errorf("its answer is no decision (%q)", a.Decision)
	}
	return nil
}

// cause is the system's error without the words around it, which name the socket
// a second time.
func cause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
