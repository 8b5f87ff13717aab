package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Node is the name of the cluster's one node.
const Node = "node"

// referencePlugins is where Debian has the CNI project's plugins.
const referencePlugins = "/usr/lib/cni"

// patience is how long each step of bringing a cluster up may take.
const patience = 3 * time.Minute

// Cluster is a running cluster.
type Cluster struct {
	Config *rest.Config // for its administrator
	Client kubernetes.Interface

	dir, pki, logs string
	kubernetes     string // the program of all of Kubernetes' parts
	say            func(format string, args ...any)

	mu        sync.Mutex
	processes map[string]*process
}

// process is one of the cluster's programs. Like an init system's service it is
// started again when it ends by itself: a kubelet does where its runtime is not up.
type process struct {
	mu      sync.Mutex
	cmd     *exec.Cmd
	stopped bool
	ended   chan struct{} // it was stopped, and has ended
}

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }

// Up brings a cluster up, with the images of the given archives, until its node is
// ready. It works only where Inside is true. program is tests/e2e/kubernetes, built;
// logs a directory for the logs of all programs, empty: a temporary one.
func Up(ctx context.Context, program, logs string, archives []string, say func(format string, args ...any)) (*Cluster, error) {
	if !Inside() {
		return nil, errors.New("a cluster is brought up only in namespaces of its own: see Run")
	}
	c := &Cluster{dir: os.Getenv(dirEnv), kubernetes: program, logs: logs, say: say, processes: map[string]*process{}}
	c.pki = c.path("pki")
	if c.logs == "" {
		c.logs = c.path("logs")
	}
	for _, dir := range []string{c.pki, c.logs, c.path("bin"), c.path("home"), "/opt/cni/bin", "/run/netns"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(writeCertificates(c.pki, Node), c.writeConfigs(), linkPlugins(), c.addKubectl()); err != nil {
		return nil, err
	}
	return c, errors.Join(c.startAll(ctx, archives))
}

func linkPlugins() error {
	plugins, err := filepath.Glob(referencePlugins + "/*")
	if err != nil || len(plugins) == 0 {
		return fmt.Errorf("there are no CNI plugins in %s: install containernetworking-plugins (hack/deps.sh e2e)", referencePlugins)
	}
	for _, p := range plugins {
		if err := os.Symlink(p, filepath.Join("/opt/cni/bin", filepath.Base(p))); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) startAll(ctx context.Context, archives []string) error {
	if err := errors.Join(c.Start(Etcd), c.Start(Containerd)); err != nil {
		return err
	}
	if err := c.await(ctx, "etcd", func() error { return get("http://127.0.0.1:2379/health") }); err != nil {
		return err
	}
	if err := c.Start(APIServer); err != nil {
		return err
	}
	if err := c.await(ctx, "containerd", func() error { return c.ctr("version") }); err != nil {
		return err
	}
	for _, archive := range archives {
		if err := c.Import(archive); err != nil {
			return err
		}
	}
	var err error
	if c.Config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig()); err != nil {
		return err
	}
	c.Config.QPS, c.Config.Burst = 200, 400
	if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
		return err
	}
	if err := c.AwaitAPI(ctx); err != nil {
		return err
	}
	for _, name := range []string{ControllerManager, Scheduler, Kubelet, KubeProxy} {
		if err := c.Start(name); err != nil {
			return err
		}
	}
	if err := c.AwaitNode(ctx); err != nil {
		return err
	}
	return c.await(ctx, "the default service account", func() error {
		_, err := c.Client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// AwaitAPI waits for the API server.
func (c *Cluster) AwaitAPI(ctx context.Context) error {
	return c.await(ctx, "the API server", func() error {
		return c.Client.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

// AwaitNode waits until the kubelet is well and says that its node is ready.
func (c *Cluster) AwaitNode(ctx context.Context) error {
	return c.await(ctx, "the node", func() error {
		if err := errors.Join(get("http://127.0.0.1:10248/healthz"), c.ctr("version")); err != nil {
			return err
		}
		node, err := c.Client.CoreV1().Nodes().Get(ctx, Node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range node.Status.Conditions {
			if condition.Type == corev1.NodeReady {
				if condition.Status == corev1.ConditionTrue {
					return nil
				}
				return errors.New(condition.Message)
			}
		}
		return errors.New("it has not said yet whether it is ready")
	})
}

func (c *Cluster) await(ctx context.Context, what string, try func() error) error {
	began := time.Now()
	for {
		err := try()
		if err == nil {
			c.say("%s is ready (%.1f s)", what, time.Since(began).Seconds())
			return nil
		}
		if time.Since(began) > patience {
			return fmt.Errorf("%s is not ready after %v: %w; its log is in %s", what, patience, err, c.logs)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func get(url string) error {
	response, err := http.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// Start starts one of the cluster's programs.
func (c *Cluster) Start(name string) error {
	args, ok := c.commands()[name]
	if !ok {
		return fmt.Errorf("the cluster has no program %q", name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.processes[name]; p != nil {
		select {
		case <-p.ended:
		default:
			return nil // it runs
		}
	}
	log, err := os.OpenFile(filepath.Join(c.logs, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	p := &process{ended: make(chan struct{})}
	if err := p.start(c.dir, log, args); err != nil {
		log.Close()
		return fmt.Errorf("start %s (hack/deps.sh e2e installs what is missing): %w", name, err)
	}
	go p.keep(c.dir, log, args)
	c.processes[name] = p
	return nil
}

func (p *process) start(dir string, log *os.File, args []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Dir = dir
	// CNI plugins and runc inherit containerd's environment: nothing of ours is in it.
	p.cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return p.cmd.Start()
}

// keep starts it again until it is stopped.
func (p *process) keep(dir string, log *os.File, args []string) {
	defer close(p.ended)
	defer log.Close()
	for {
		err := p.cmd.Wait()
		p.mu.Lock()
		stopped := p.stopped
		p.mu.Unlock()
		if stopped {
			return
		}
		fmt.Fprintln(log, "testbed: it has ended and is started again:", err)
		time.Sleep(300 * time.Millisecond)
		if err := p.start(dir, log, args); err != nil {
			fmt.Fprintln(log, "testbed: it does not start:", err)
			return
		}
	}
}

// signal sends a signal; it is not started again.
func (p *process) signal(s unix.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	_ = p.cmd.Process.Signal(s)
}

// Stop ends one of the programs, after three seconds by force (the API server takes
// a minute otherwise). Pods go on.
func (c *Cluster) Stop(name string) {
	c.mu.Lock()
	p := c.processes[name]
	c.mu.Unlock()
	if p == nil {
		return
	}
	p.signal(unix.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(3 * time.Second):
		p.signal(unix.SIGKILL)
		<-p.ended
	}
}

// Import gives the runtime an image.
func (c *Cluster) Import(archive string) error { return c.ctr("images", "import", archive) }

func (c *Cluster) ctr(args ...string) error {
	out, err := exec.Command("ctr", append([]string{"--address", containerdSock, "--namespace", "k8s.io"}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ctr %v: %w: %s", args, err, out)
	}
	return nil
}

// Tail writes the end of each program's log.
func (c *Cluster) Tail(w io.Writer, bytes int64) {
	logs, _ := filepath.Glob(filepath.Join(c.logs, "*.log"))
	for _, path := range logs {
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		if size, err := f.Seek(0, io.SeekEnd); err == nil {
			_, _ = f.Seek(max(0, size-bytes), io.SeekStart)
		}
		fmt.Fprintf(w, "\n--- the end of %s\n", filepath.Base(path))
		_, _ = io.Copy(w, f)
		f.Close()
	}
}
