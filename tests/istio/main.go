// SPDX-License-Identifier: Apache-2.0

// Command istio-iptables is Istio's own: its rule generator and its validator
// (istio-validation), as istio-init runs them. It is a module of its own, so
// that the project does not depend on Istio; the oracle's tests run it.
package main

import (
	"os"

	"istio.io/istio/pkg/log"
	"istio.io/istio/tools/istio-iptables/pkg/cmd"
)

func main() {
	if cmd.GetCommand(log.DefaultOptions()).Execute() != nil {
		os.Exit(1)
	}
}
