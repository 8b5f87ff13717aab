// Package cni is the plugin's side of the Container Network Interface: the verbs
// of the specification, for a plugin that comes after others in a chain. It asks
// the node daemon what a pod is and enrols it; where no daemon answers, it decides
// from what the daemon left and the runtime says, or has the runtime try again.
package cni

import (
	"encoding/json"
	"fmt"
	"maps"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/sluice-mesh/sluice/pkg/datapath"
)

// Defaults of the entry in the conflist.
const (
	DefaultSocket    = "/var/run/sluice/agent.sock"
	DefaultStateFile = "/var/run/sluice/state.json"
	DefaultBPFFS     = datapath.DefaultDir
	DefaultLogFile   = "/var/log/sluice-cni.log"
)

const (
	// daemonTime is how long the daemon may take to answer.
	daemonTime = 2 * time.Second
	// addTime and delTime are how long the verbs may take, all waits included.
	addTime    = 9 * time.Second
	delTime    = 4 * time.Second
	statusTime = daemonTime + time.Second
)

// config is our entry of the conflist, as the runtime hands it over.
type config struct {
	types.PluginConf
	Socket        string   `json:"socket"`
	StateFile     string   `json:"stateFile"`
	BPFFS         string   `json:"bpffs"`
	LogFile       string   `json:"logFile"`
	OwnPod        ownPod   `json:"ownPod"`
	RuntimeConfig *runtime `json:"runtimeConfig"`

	before map[string]any // the previous plugin's result as it came
}

// ownPod names the daemon's own pods, which must never wait for the daemon.
type ownPod struct {
	Namespace string `json:"namespace"`
	Prefix    string `json:"prefix"` // of their names: the DaemonSet's, with a dash
}

type runtime struct {
	Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations"`
}

// parseConfig reads what comes on stdin.
func parseConfig(stdin []byte) (config, error) {
	c := config{Socket: DefaultSocket, StateFile: DefaultStateFile, BPFFS: DefaultBPFFS, LogFile: DefaultLogFile}
	if err := json.Unmarshal(stdin, &c); err != nil {
		return config{}, types.NewError(types.ErrDecodingFailure, "the network configuration cannot be read", err.Error())
	}
	return c, nil
}

// parsePrevResult reads what the plugin before this one said, if there was one.
func (c *config) parsePrevResult() error {
	if c.RawPrevResult == nil {
		return nil
	}
	c.before = maps.Clone(c.RawPrevResult) // the library changes and forgets it
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return types.NewError(types.ErrDecodingFailure, "the previous plugin's result cannot be read", err.Error())
	}
	return nil
}

// annotations that the runtime gave; given is false where it gave none at all, as
// one does that does not know the capability.
func (c config) annotations() (all map[string]string, given bool) {
	if c.RuntimeConfig == nil || c.RuntimeConfig.Annotations == nil {
		return nil, false
	}
	return c.RuntimeConfig.Annotations, true
}

// podArgs are what Kubernetes says in CNI_ARGS.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE types.UnmarshallableString
	K8S_POD_NAME      types.UnmarshallableString
	K8S_POD_UID       types.UnmarshallableString
}

func parseArgs(text string) (podArgs, error) {
	args := podArgs{}
	args.IgnoreUnknown = true
	if err := types.LoadArgs(text, &args); err != nil {
		return podArgs{}, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS %q cannot be read", text), err.Error())
	}
	return args, nil
}
