// SPDX-License-Identifier: Apache-2.0

// Command podapp is everything that tests/e2e runs in pods but the proxy. Its name,
// or its first argument, says what it is: pause holds a sandbox, serve is an app,
// validate does what istio-validation does, fetch is a client that ends.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	name, args := filepath.Base(os.Args[0]), os.Args[1:]
	if name != "pause" && len(args) > 0 {
		name, args = args[0], args[1:]
	}
	switch name {
	case "pause":
		pause()
	case "serve":
		finish(serve(args))
	case "validate":
		finish(validate())
	case "fetch":
		finish(fetchMany(args))
	case "relay":
		finish(relay())
	default:
		fmt.Fprintln(os.Stderr, "usage: podapp {pause|serve|validate|fetch DURATION URL...|relay}")
		os.Exit(2)
	}
}

// failed is what istio-validation's exit status is for "nothing was redirected".
const failed = 126

// finish ends the container; the reason is where Kubernetes shows it.
func finish(err error) {
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, err)
	_ = os.WriteFile("/dev/termination-log", []byte(err.Error()), 0o644)
	os.Exit(failed)
}

// pause ends with SIGTERM and reaps what the sandbox's processes leave to it.
func pause() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGCHLD)
	for s := range signals {
		if s != unix.SIGCHLD {
			return
		}
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != nil || pid <= 0 {
				break
			}
		}
	}
}

// clientTimeout is for one request of any kind, on a machine that may be busy.
const clientTimeout = 10 * time.Second
