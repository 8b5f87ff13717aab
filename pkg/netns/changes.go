package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long changes are gathered before they are reported: interfaces
// and addresses come with several messages each.
const settle = 25 * time.Millisecond

// Changes tells that interfaces, addresses or routes of a namespace change, not
// what changes: who asks looks again, and so no message can be lost. It keeps
// the namespace alive. Close it.
type Changes struct {
	socket *os.File
	name   string
}

// Subscribe is told of changes from now on: look at the namespace after it.
func (n *NetNS) Subscribe() (*Changes, error) {
	const groups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE
	out := &Changes{name: n.path}
	err := n.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
			unix.Close(fd)
			return err
		}
		out.socket = os.NewFile(uintptr(fd), "netlink")
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to the changes of %s: %w", n.path, err)
	}
	return out, nil
}

// Wait returns once something has changed since the last Wait, or since
// Subscribe, or with ctx's error once ctx is done.
func (c *Changes) Wait(ctx context.Context) error {
	past := time.Unix(1, 0)
	for {
		if err := c.socket.SetReadDeadline(time.Time{}); err != nil {
			return fmt.Errorf("wait for changes of %s: %w", c.name, err)
		}
		stop := context.AfterFunc(ctx, func() { _ = c.socket.SetReadDeadline(past) })
		err := c.read()
		stop()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			return c.drain()
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) { // an earlier ctx's, which came late
			return fmt.Errorf("wait for changes of %s: %w", c.name, err)
		}
	}
}

// read reads one message. That some are lost is a message too.
func (c *Changes) read() error {
	var first [1]byte // the kernel cuts the rest off
	_, err := c.socket.Read(first[:])
	if errors.Is(err, unix.ENOBUFS) {
		return nil
	}
	return err
}

// drain reads what comes while the change settles.
func (c *Changes) drain() error {
	err := c.socket.SetReadDeadline(time.Now().Add(settle))
	for err == nil {
		err = c.read()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return fmt.Errorf("wait for changes of %s: %w", c.name, err)
}

// Close is idempotent.
func (c *Changes) Close() error {
	if err := c.socket.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
