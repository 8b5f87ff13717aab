// SPDX-License-Identifier: Apache-2.0

// Command sluiced is the node daemon: one on every node of a cluster. See
// pkg/agent.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/agent"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/pkg/version"
)

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "sluiced: "+err.Error())
		os.Exit(1)
	}
}

func command() *cobra.Command {
	config := agent.DefaultConfig()
	config.Node = os.Getenv("NODE_NAME")
	config.Self = agent.Self{
		Namespace: os.Getenv("POD_NAMESPACE"), Pod: os.Getenv("POD_NAME"), UID: os.Getenv("POD_UID"), DaemonSet: os.Getenv("DAEMONSET_NAME"),
	}
	var kubeconfig string
	var debug bool
	cmd := &cobra.Command{
		Use:   "sluiced",
		Short: "Keep the pods of this node redirected to their mesh proxies",
		Long: `sluiced runs on every node. It loads the programs and proves that they work,
tells the CNI plugin which pods to enroll and how, follows changes of their
annotations while they run, and enrolls pods that started before it.

What it has loaded stays in force when it ends, however it ends: pods stay
redirected, and the next sluiced takes over. While it is away the plugin decides
by itself, from the state file below --run-dir. It never takes a living pod out
of the mesh because the API server does not know the pod, or does not answer.

To remove redirection from a node at once: sluicectl down --now`,
		Example: `  NODE_NAME=worker-1 sluiced
  sluiced --node worker-1 --kubeconfig ~/.kube/config --repair off`,
		Version:       version.String(),
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error {
			return agent.Main(config, kubeconfig, debug, os.Stderr)
		},
	}
	f := cmd.Flags()
	f.StringVar(&config.Node, "node", config.Node, "this node's name in Kubernetes (env NODE_NAME)")
	f.StringVar(&kubeconfig, "kubeconfig", "", "how to reach the API server (default: as a pod does)")
	f.StringVar(&config.RunDir, "run-dir", config.RunDir, "directory of the lock, the plugin's socket and the state file")
	f.StringVar(&config.BPFFS, "bpffs", config.BPFFS, "directory on a bpffs below which everything is pinned")
	f.StringVar(&config.Cgroup, "cgroup", "", "cgroup2 directory whose processes are seen (default: the true root of cgroup2)")
	f.StringVar(&config.Listen, "listen", config.Listen, "address of /metrics, /healthz and /readyz; empty: none")
	f.StringVar((*string)(&config.Repair), "repair", string(config.Repair), "what to do with a pod that has a sidecar and runs outside the mesh: repair (enroll it as it runs), label, delete or off")
	f.BoolVar(&config.ResetConnections, "repair-reset-connections", false, "close the connections that an app has open when its pod is enrolled as it runs, for it to open them again through its proxy")
	f.Uint32Var(&config.MaxPods, "max-pods", config.MaxPods, "how many enrolled pods the tables hold")
	f.DurationVar(&config.Resync, "resync", config.Resync, "how often everything is compared with what should be")
	f.StringSliceVar(&config.Mesh.ExcludedNamespaces, "exclude-namespaces", config.Mesh.ExcludedNamespaces, "namespaces whose pods are never enrolled")
	f.StringVar((*string)(&config.Mesh.Mode), "interception-mode", string(rules.Redirect), "of pods that do not say: REDIRECT or TPROXY")
	f.StringVar((*string)(&config.Mesh.From), "capture", string(rules.Always), "of pods that do not say: always, or proxy-ready to let init containers out before the proxy listens")
	f.BoolVar(&config.Mesh.DNS, "dns", false, "capture DNS of pods that do not say")
	f.StringVar(&config.Install.ConfDir, "cni-conf-dir", "", "the runtime's directory of CNI configurations, usually /etc/cni/net.d; empty: install nothing")
	f.StringVar(&config.Install.BinDir, "cni-bin-dir", "", "the runtime's directory of CNI plugins, usually /opt/cni/bin; goes with --cni-conf-dir")
	f.StringVar(&config.Install.Plugin, "cni-plugin", config.Install.Plugin, "the plugin to install there")
	f.StringVar(&config.Install.LogFile, "cni-log-file", config.Install.LogFile, "the plugin's log, on the host")
	f.StringVar(&config.Self.Namespace, "namespace", config.Self.Namespace, "namespace of the daemon's own pod (env POD_NAMESPACE)")
	f.StringVar(&config.Self.Pod, "pod", config.Self.Pod, "name of the daemon's own pod, for Events (env POD_NAME; its UID: env POD_UID)")
	f.StringVar(&config.Self.DaemonSet, "daemonset", config.Self.DaemonSet, "the daemon's own DaemonSet: only its end is an uninstall (env DAEMONSET_NAME); empty: none ever is")
	f.StringVar((*string)(&config.RunningPods), "uninstall-running-pods", string(config.RunningPods), "at an uninstall, enrolled pods are redirected until they end (keep), or no more at once (direct)")
	f.BoolVar(&debug, "debug", false, "log each decision")
	return cmd
}
