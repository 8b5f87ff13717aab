// Package agent is the node daemon. It owns the node's datapath: loads it, proves
// it, keeps it; it tells the plugin what a pod is, follows what the API server
// says of the pods of its node, and repairs what does not agree. It never un-enrols
// a living pod because of what the API server says, or does not say.
package agent

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

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
}

// DefaultConfig is what the flags of sluiced say by default.
func DefaultConfig() Config {
	return Config{
		RunDir: "/var/run/sluice",
		BPFFS:  "/sys/fs/bpf/sluice",
		Listen: "127.0.0.1:15095",
		Mesh:   mesh.DefaultConfig(),
		Repair: RepairInPlace,
		Resync: 2 * time.Minute,
	}
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
	if c.Resync < time.Second {
		return fmt.Errorf("resync every %v is too often: give at least 1s", c.Resync)
	}
	return nil
}

func (c Config) lockPath() string   { return filepath.Join(c.RunDir, "lock") }
func (c Config) socketPath() string { return filepath.Join(c.RunDir, "agent.sock") }
func (c Config) statePath() string  { return filepath.Join(c.RunDir, "state.json") }

// The fields of the log.
const (
	fieldPod      = "pod"
	fieldUID      = "uid"
	fieldCookie   = "cookie"
	fieldReason   = "reason"
	fieldCount    = "count"
	fieldChanges  = "changes"
	fieldHolder   = "holder"
	fieldPart     = "part"
	fieldDuration = "duration"
	fieldPlugin   = "plugin"
)
