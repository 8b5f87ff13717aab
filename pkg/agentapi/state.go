package agentapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/sluice-mesh/sluice/pkg/mesh"
)

// StateVersion is the version of the state file.
const StateVersion = 1

// State is what the daemon leaves beside its socket for plugins that cannot reach
// it: enough to tell most pods, not all. It holds no secret and nothing of any one
// pod.
type State struct {
	Version int    `json:"version"`
	BPFFS   string `json:"bpffs"` // the datapath's directory

	Mesh mesh.Config `json:"mesh"`
	// Namespaces that the daemon knows: true where pods are in the mesh unless
	// they say otherwise.
	Namespaces map[string]bool `json:"namespaces"`

	// CNI is where the daemon has installed the plugin, for who removes it when no
	// daemon runs; nil: it is of a version that does not say.
	CNI *CNI `json:"cni,omitempty"`
}

// CNI are the directories of a container runtime; empty: nothing is installed.
type CNI struct {
	ConfDir string `json:"confDir"`
	BinDir  string `json:"binDir"`
}

// ErrNoState is returned where the daemon has left no state that this plugin can
// read: it has not run since the node started, or is of another time.
var ErrNoState = errors.New("the node daemon has left no state file")

// ReadState reads the state file.
func ReadState(path string) (State, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return State{}, fmt.Errorf("%w at %s", ErrNoState, path)
	}
	if err != nil {
		return State{}, fmt.Errorf("%w that can be read: %w", ErrNoState, err)
	}
	return ParseState(text)
}

// Encode returns the state as the file holds it.
func (s State) Encode() ([]byte, error) {
	s.Version = StateVersion
	text, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode the state: %w", err)
	}
	return append(text, '\n'), nil
}

// ParseState reads a state file's text.
func ParseState(text []byte) (State, error) {
	var s State
	if err := json.Unmarshal(text, &s); err != nil {
		return State{}, fmt.Errorf("%w that can be read: %w", ErrNoState, err)
	}
	if s.Version < 1 || s.Version > StateVersion+1 {
		return State{}, fmt.Errorf("%w of version %d: its version is %d", ErrNoState, StateVersion, s.Version)
	}
	return s, nil
}
