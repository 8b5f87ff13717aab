package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// jobLimit is how long any job may take: most are milliseconds long, but
// where NAT has few tuples left it searches long for each.
const jobLimit = 5 * time.Minute

// process is a worker as its parent sees it.
type process struct {
	name    string
	cmd     *exec.Cmd
	in      io.WriteCloser
	jobs    *json.Encoder
	replies *json.Decoder
	stderr  bytes.Buffer
}

// startWorker starts this program as a worker in a namespace and a cgroup.
func startWorker(ctx context.Context, name string, ns *netns.NetNS, cgroup string, id Identity, files ...*os.File) (*process, error) {
	dir, err := os.Open(cgroup)
	if err != nil {
		return nil, fmt.Errorf("open the cgroup of %s: %w", name, err)
	}
	defer dir.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "bench", "worker",
		fmt.Sprint("--uid=", id.UID), fmt.Sprint("--gid=", id.GID), fmt.Sprint("--cpu=", id.CPU), fmt.Sprint("--inherits=", len(files) > 0))
	cmd.ExtraFiles = files
	// No preemption signals: the loops are short and never yield.
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=2")
	// An interrupt at the terminal is the parent's to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Setpgid: true}
	p := &process{name: name, cmd: cmd}
	cmd.Stderr = &p.stderr
	if p.in, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.jobs, p.replies = json.NewEncoder(p.in), json.NewDecoder(out)
	if err := ns.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("start worker %s: %w", name, err)
	}
	return p, nil
}

func (p *process) send(j job) error {
	if err := p.jobs.Encode(j); err != nil {
		return fmt.Errorf("worker %s: %w", p.name, err)
	}
	return nil
}

// receive waits for the reply to the oldest job that was sent.
func (p *process) receive() (reply, error) {
	watchdog := time.AfterFunc(jobLimit, p.kill)
	defer watchdog.Stop()
	var r reply
	if err := p.replies.Decode(&r); err != nil {
		return r, fmt.Errorf("worker %s ended: %w %s", p.name, err, strings.TrimSpace(p.stderr.String()))
	}
	if r.Error != "" {
		return r, fmt.Errorf("worker %s: %s", p.name, r.Error)
	}
	return r, nil
}

func (p *process) call(j job) (reply, error) {
	if err := p.send(j); err != nil {
		return reply{}, err
	}
	return p.receive()
}

// kill ends the worker now; one that has ended already is as good.
func (p *process) kill() { _ = p.cmd.Process.Kill() }

// Close ends the worker.
func (p *process) Close() error {
	p.in.Close()
	p.kill()
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) || errors.Is(err, context.Canceled) {
		return nil // killed, as it was to be
	}
	return err
}
