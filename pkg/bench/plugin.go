package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// plugin is sluice-cni as a runtime runs it, with a stand-in for the daemon that
// says "enroll" at once: what is measured has no API server in it.
type plugin struct {
	path, dir string
	stdin     []byte
}

type alwaysEnroll struct{}

func (alwaysEnroll) Handle(_ context.Context, _ agentapi.Request, _ *os.File) agentapi.Answer {
	r := rules.Default()
	return agentapi.Answer{Decision: agentapi.Enroll, Rules: &r}
}

// newPlugin finds sluice-cni beside this program.
func (s *stage) newPlugin() (*plugin, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	p := &plugin{path: filepath.Join(filepath.Dir(self), "sluice-cni")}
	if _, err := os.Stat(p.path); err != nil {
		return nil, fmt.Errorf("there is no sluice-cni beside %s (make build): %w", filepath.Base(self), err)
	}
	if p.dir, err = os.MkdirTemp("", "sluice-bench-cni-"); err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	s.closing(func() error { return os.RemoveAll(p.dir) })
	log := logrus.New()
	server, err := agentapi.Listen(filepath.Join(p.dir, "s"), alwaysEnroll{}, log)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.ctx))
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx) }()
	s.closing(func() error { cancel(); return <-served })
	p.stdin, err = json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": "bench", "type": "sluice-cni", "bpffs": s.node.bpffs,
		"socket": filepath.Join(p.dir, "s"), "stateFile": filepath.Join(p.dir, "state.json"), "logFile": filepath.Join(p.dir, "log"),
		"prevResult": map[string]any{"cniVersion": "1.0.0", "interfaces": []any{}, "ips": []any{}},
	})
	return p, err
}

func (p *plugin) add(place *site) error { return p.run("ADD", place) }
func (p *plugin) del(place *site) error { return p.run("DEL", place) }

func (p *plugin) run(verb string, place *site) error {
	cmd := exec.Command(p.path)
	id := fmt.Sprintf("bench%d", place.pod.Cookie())
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(p.path),
		fmt.Sprintf("CNI_NETNS=/proc/%d/fd/%d", os.Getpid(), place.pod.Fd()),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=" + id + ";K8S_POD_UID=" + id,
	}
	cmd.Stdin = strings.NewReader(string(p.stdin))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("sluice-cni %s: %w: %s", verb, err, strings.TrimSpace(string(out)))
	}
	return nil
}
