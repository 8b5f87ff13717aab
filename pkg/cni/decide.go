package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// verdict is what becomes of a pod.
type verdict struct {
	skip        string // why it is left alone; empty: enrol it
	rules       rules.Rules
	provisional bool // decided without the API server, or without the daemon
	warnings    []string
}

// decide asks the daemon, and where none answers decides alone.
func decide(ctx context.Context, c config, pod agentapi.Pod, attachment agentapi.Attachment, netns *os.File) (verdict, error) {
	if c.OwnPod.Namespace != "" && pod.Namespace == c.OwnPod.Namespace && strings.HasPrefix(pod.Name, c.OwnPod.Prefix) {
		return verdict{skip: "it is Sluice's own"}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, daemonTime)
	defer cancel()
	answer, err := agentapi.Call(ctx, c.Socket, agentapi.Request{Verb: agentapi.Add, Attachment: attachment, Pod: pod}, netns)
	switch {
	case errors.Is(err, agentapi.ErrNoDaemon):
		v, alone := decideAlone(c, pod)
		if alone != nil {
			return verdict{}, fmt.Errorf("%w: %w", alone, err)
		}
		v.warnings = append(v.warnings, "decided without the node daemon: "+err.Error())
		return v, nil
	case err != nil:
		return verdict{}, err
	case answer.Decision == agentapi.Skip:
		return verdict{skip: answer.Reason, warnings: answer.Warnings}, nil
	}
	return verdict{rules: *answer.Rules, provisional: answer.Provisional, warnings: answer.Warnings}, nil
}

// decideAlone decides from the state file and the annotations: the daemon judges
// again when it is back.
func decideAlone(c config, pod agentapi.Pod) (verdict, error) {
	var left *agentapi.State
	state, stateErr := agentapi.ReadState(c.StateFile)
	if stateErr == nil {
		left = &state
	}
	decision, err := agentapi.Presume(left, pod)
	if errors.Is(err, agentapi.ErrUndecidable) {
		return verdict{}, errors.Join(err, stateErr)
	}
	if err != nil {
		return verdict{}, err
	}
	return verdict{skip: decision.Skip, rules: decision.Rules, provisional: decision.Skip == "", warnings: decision.Warnings}, nil
}
