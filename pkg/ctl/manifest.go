package ctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
)

const giveManifest = "give a running pod's manifest, as \"kubectl get pod NAME -o yaml\" prints it"

// maxManifest is more than an API server keeps of a pod.
const maxManifest = 4 << 20

// besideManifest are the flags that say nothing of rules: all others would be
// without effect beside --manifest, and are refused.
var besideManifest = []string{"manifest", "netns", "bpffs", "inbound", "tc", "no-guard"}

// checkFlags judges which flags are given, and refuses what would be without
// effect.
func checkFlags(flags *pflag.FlagSet) error {
	if !flags.Changed("netns") {
		return errors.New("give --netns: a name of \"ip netns list\", or a path such as /proc/PID/ns/net")
	}
	if err := checkManifestFlags(flags); err != nil {
		return err
	}
	if flags.Changed("dns-port") && !flags.Changed("dns") {
		return errors.New("--dns-port is without effect: give --dns too")
	}
	return nil
}

func checkManifestFlags(flags *pflag.FlagSet) error {
	manifest := flags.Lookup("manifest")
	if !manifest.Changed {
		return nil
	}
	if manifest.Value.String() == "" { // an unset variable of a script
		return errors.New("--manifest: name a file, or - for stdin")
	}
	var refused []string
	flags.Visit(func(flag *pflag.Flag) {
		if !slices.Contains(besideManifest, flag.Name) {
			refused = append(refused, "--"+flag.Name)
		}
	})
	if len(refused) > 0 {
		return fmt.Errorf("--manifest alone says what the pod's rules are: leave out %s", strings.Join(refused, " and "))
	}
	return nil
}

// fromManifest judges the pod of --manifest with the mesh's defaults, and names
// pod after it.
func (f enrollFlags) fromManifest(pod *datapath.Pod, stdin io.Reader) (mesh.Decision, error) {
	text, err := readManifest(f.manifest, stdin)
	if err != nil {
		return mesh.Decision{}, fmt.Errorf("--manifest: %w", err)
	}
	described, err := parseManifest(text)
	if err != nil {
		return mesh.Decision{}, fmt.Errorf("--manifest: %s: %w", f.manifest, err)
	}
	meta := described.Metadata
	pod.Namespace, pod.Name, pod.UID = meta.Namespace, meta.Name, meta.UID
	decision, err := mesh.Judge(described, mesh.DefaultConfig())
	if decision.Skip != "" {
		decision.Skip = fmt.Sprintf("pod %s/%s: %s", meta.Namespace, meta.Name, decision.Skip)
	}
	return decision, err
}

func readManifest(name string, stdin io.Reader) ([]byte, error) {
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		stdin = file
	}
	text, err := io.ReadAll(io.LimitReader(stdin, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxManifest {
		return nil, fmt.Errorf("%s is larger than %d MiB: that is no pod's manifest", name, maxManifest>>20)
	}
	return text, nil
}

// parseManifest reads one pod. A pod without a namespace is in "default", as
// for kubectl.
func parseManifest(text []byte) (mesh.Pod, error) {
	var out struct {
		Kind string `json:"kind"`
		mesh.Pod
	}
	switch documents := countDocuments(string(text)); {
	case documents == 0:
		return mesh.Pod{}, errors.New("it is empty: " + giveManifest)
	case documents > 1:
		return mesh.Pod{}, errors.New("these are several documents: give one pod")
	}
	// A key that is given twice would be one of the two, without a word.
	inJSON, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return mesh.Pod{}, fmt.Errorf("not a pod's YAML or JSON: %s", strings.Join(strings.Fields(err.Error()), " "))
	}
	err = json.Unmarshal(inJSON, &out)
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return mesh.Pod{}, mistyped(inJSON, wrong)
	}
	if err != nil {
		return mesh.Pod{}, fmt.Errorf("not a pod's YAML or JSON: %w", err)
	}
	if out.Kind == "" {
		return mesh.Pod{}, errors.New("it has no kind: " + giveManifest)
	}
	if out.Kind != "Pod" {
		return mesh.Pod{}, fmt.Errorf("its kind is %q, not Pod: %s", out.Kind, giveManifest)
	}
	meta := &out.Metadata
	if meta.Namespace == "" {
		meta.Namespace = "default"
	}
	if err := checkPodName(meta.Namespace, meta.Name); err != nil {
		return mesh.Pod{}, err
	}
	return out.Pod, nil
}

// countDocuments counts the YAML documents that hold something; the decoder
// would read the first and drop the others without a word.
func countDocuments(text string) int {
	documents, something := 0, false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \t\r\n")
		if rest, begins := strings.CutPrefix(line, "---"); begins && (rest == "" || rest[0] == ' ') {
			line, something = strings.TrimSpace(rest), false
		}
		if something || line == "" || strings.ContainsRune("#%", rune(line[0])) {
			continue // after the first, a comment, a directive
		}
		documents, something = documents+1, true
	}
	return documents
}
