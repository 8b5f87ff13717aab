// Package agent is the node daemon. It owns the node's datapath: loads it, proves
// it, keeps it; it tells the plugin what a pod is, follows what the API server
// says of the pods of its node, and repairs what does not agree. It never un-enrols
// a living pod because of what the API server says, or does not say.
package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/cni"
	"github.com/sluice-mesh/sluice/pkg/conflist"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
)

// Repair is what is done with a pod that has a sidecar and is not enrolled.
type Repair string

// The ways. In place disturbs nothing but the pod's next connections.
const (
	RepairInPlace Repair = "repair"
	RepairLabel   Repair = "label"  // the pod, for others to act on
	RepairDelete  Repair = "delete" // the pod, for its owner to make a new one
	RepairOff     Repair = "off"
)

// RunningPods is what becomes of the pods that run when Sluice is uninstalled.
type RunningPods string

// The ways.
const (
	RunningPodsKeep   RunningPods = "keep"   // redirected until they end
	RunningPodsDirect RunningPods = "direct" // redirected no more, at once
)

// Install says where the node's container runtime looks for plugins. Without
// directories nothing is installed.
type Install struct {
	ConfDir string // of network configurations, usually /etc/cni/net.d
	BinDir  string // of plugins, usually /opt/cni/bin
	Plugin  string // the binary to copy there
	LogFile string // of the plugin, on the host
}

// Self is the daemon's own pod in Kubernetes. What is empty is not known.
type Self struct {
	Namespace string
	DaemonSet string // only its end is an uninstall
	Pod, UID  string // for Events
}

// Config says how the daemon works.
type Config struct {
	Node   string // its name in Kubernetes
	RunDir string // lock, socket and state file
	BPFFS  string // directory on a bpffs below which everything is pinned
	Cgroup string // empty: the true root of cgroup2
	Listen string // address of metrics and health; empty: none

	Mesh   mesh.Config
	Repair Repair
	Resync time.Duration // how often everything is compared
	// MaxPods is how many pods the tables hold, when they are made.
	MaxPods uint32
	// ResetConnections closes the connections that an app has open when its pod is
	// repaired in place, for it to open them again through its proxy.
	ResetConnections bool

	Install     Install
	Self        Self
	RunningPods RunningPods // at an uninstall
}

// maxMaxPods is more than any node has.
const maxMaxPods = 65536

// DefaultConfig is what the flags of sluiced say by default.
func DefaultConfig() Config {
	return Config{
		RunDir: agentapi.DefaultRunDir,
		BPFFS:  datapath.DefaultDir,
		Listen: "127.0.0.1:15095",
		Mesh:   mesh.DefaultConfig(),
		Repair: RepairInPlace,
		Resync: 2 * time.Minute,

		Install:     Install{Plugin: besideUs(conflist.Type), LogFile: cni.DefaultLogFile},
		RunningPods: RunningPodsKeep,
		MaxPods:     datapath.DefaultMaxPods,
	}
}

// besideUs is a file in the directory of this program, where an image has all of
// Sluice's.
func besideUs(name string) string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	return filepath.Join(filepath.Dir(self), name)
}

// check refuses what cannot work, with what to do.
func (c Config) check() error {
	switch c.Repair {
	case RepairInPlace, RepairLabel, RepairDelete, RepairOff:
	default:
		return fmt.Errorf("%q is no way to repair pods: choose repair, label, delete or off", c.Repair)
	}
	if c.Node == "" {
		return errors.New("the node's name is not known: set NODE_NAME (from spec.nodeName, by the downward API) or give --node")
	}
	if c.MaxPods < 1 || c.MaxPods > maxMaxPods {
		return fmt.Errorf("tables for %d pods cannot be made: give 1 to %d", c.MaxPods, maxMaxPods)
	}
	if c.Resync < time.Second {
		return fmt.Errorf("resync every %v is too often: give at least 1s", c.Resync)
	}
	switch c.RunningPods {
	case RunningPodsKeep, RunningPodsDirect:
	default:
		return fmt.Errorf("%q is nothing that an uninstall can do with running pods: choose keep or direct", c.RunningPods)
	}
	if (c.Install.ConfDir == "") != (c.Install.BinDir == "") {
		return errors.New("--cni-conf-dir and --cni-bin-dir go together: give both, or neither to install nothing")
	}
	if c.Self.DaemonSet != "" && c.Self.Namespace == "" {
		return errors.New("the daemon's own namespace is not known: set POD_NAMESPACE (from metadata.namespace, by the downward API) or give --namespace beside --daemonset")
	}
	return nil
}

func (c Config) socketPath() string { return agentapi.SocketPath(c.RunDir) }
func (c Config) statePath() string  { return agentapi.StatePath(c.RunDir) }

// The fields of the log.
const (
	fieldPod       = "pod"
	fieldUID       = "uid"
	fieldCookie    = "cookie"
	fieldReason    = "reason"
	fieldCount     = "count"
	fieldChanges   = "changes"
	fieldHolder    = "holder"
	fieldDaemonSet = "daemonset"
	fieldPart      = "part"
	fieldDuration  = "duration"
	fieldPlugin    = "plugin"
	fieldVersion   = "version"
)
