// SPDX-License-Identifier: Apache-2.0

// Command sluice-cni is a CNI plugin, to be chained after the one that makes the
// pod's interface. The runtime runs it; see pkg/cni.
package main

import (
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/sluice-mesh/sluice/pkg/cni"
	sluice "github.com/sluice-mesh/sluice/pkg/version"
)

func main() {
	skel.PluginMainFuncs(cni.Funcs(), version.All, "sluice-cni "+sluice.String()+": enrolls pods of a service mesh, without iptables")
}
