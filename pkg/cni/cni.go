package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types020 "github.com/containernetworking/cni/pkg/types/020"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// Error codes of ours, above those that the specification keeps for itself.
const (
	codeRefused  = 100 // the pod's annotations cannot be obeyed
	codeDatapath = 101 // the kernel or the maps said no
	codePanic    = 102
)

// Funcs are the plugin's verbs, for skel.
func Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{
		Add:    guarded("ADD", add),
		Del:    guarded("DEL", del),
		Check:  guarded("CHECK", check),
		GC:     guarded("GC", gc),
		Status: guarded("STATUS", status),
	}
}

// call is one call of the plugin.
type call struct {
	args   *skel.CmdArgs
	config config
	log    *journal
}

// guarded reads the configuration, runs a verb, and turns a panic into an error
// that the runtime can show.
func guarded(name string, verb func(context.Context, *call) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) (err error) {
		c := &call{args: args}
		if c.config, err = parseConfig(args.StdinData); err != nil {
			return err
		}
		c.log = newJournal(c.config, logrus.Fields{"verb": name, "container": args.ContainerID, "interface": args.IfName})
		defer func() {
			if p := recover(); p != nil {
				c.log.WithField("stack", string(debug.Stack())).Errorf("panic: %v", p)
				err = types.NewError(codePanic, fmt.Sprintf("sluice-cni panicked: %v", p), "please report it; the stack is in the log")
			}
			c.log.flush()
		}()
		limit := addTime
		if name == "DEL" || name == "GC" {
			limit = delTime
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		return verb(ctx, c)
	}
}

// within runs what cannot be cancelled (a lock is held by another process, say)
// and stops waiting when the context ends.
func within(ctx context.Context, do func() error) error {
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		done <- do()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("not done in time: another process may hold the lock of the datapath: %w", ctx.Err())
	}
}

func (c *call) attachment() agentapi.Attachment {
	return agentapi.Attachment{Network: c.config.Name, ContainerID: c.args.ContainerID, Interface: c.args.IfName}
}

func (c *call) attachmentID() datapath.AttachmentID {
	return datapath.AttachmentID{Network: c.config.Name, Container: c.args.ContainerID, Interface: c.args.IfName}
}

func (c *call) datapath() (*datapath.Datapath, error) {
	return datapath.Open(datapath.Options{Dir: c.config.BPFFS})
}

// withDatapath does something with the datapath, if there is one, and stops waiting
// when the context ends.
func (c *call) withDatapath(ctx context.Context, do func(*datapath.Datapath) error) error {
	return within(ctx, func() error {
		d, err := c.datapath()
		if errors.Is(err, datapath.ErrNotUp) {
			return nil
		}
		if err != nil {
			return err
		}
		defer d.Close()
		return do(d)
	})
}

// printResult passes the previous plugin's result on, in the version asked for.
func (c *call) printResult() error {
	if c.config.PrevResult != nil {
		return types.PrintResult(c.config.PrevResult, c.config.CNIVersion)
	}
	// First of its network, as Multus may have it: there is nothing to pass on.
	if v := c.config.CNIVersion; v == "" || v == "0.1.0" || v == "0.2.0" {
		return (&types020.Result{CNIVersion: v}).Print() // a conversion wants an address
	}
	return types.PrintResult(&types100.Result{CNIVersion: types100.ImplementedSpecVersion}, c.config.CNIVersion)
}

// pod is who the runtime says it is; false for what is no pod of Kubernetes.
func (c *call) pod() (agentapi.Pod, bool, error) {
	args, err := parseArgs(c.args.Args)
	if err != nil {
		return agentapi.Pod{}, false, err
	}
	pod := agentapi.Pod{Namespace: string(args.K8S_POD_NAMESPACE), Name: string(args.K8S_POD_NAME), UID: string(args.K8S_POD_UID)}
	if pod.Namespace == "" || pod.Name == "" {
		return agentapi.Pod{}, false, nil
	}
	all, given := c.config.annotations()
	if given {
		pod.Annotations = map[string]string{}
	}
	for key, value := range all {
		if mesh.Reads(key) { // the others are nobody's business
			pod.Annotations[key] = value
		}
	}
	return pod, true, nil
}

func add(ctx context.Context, c *call) error {
	pod, ok, err := c.pod()
	if err != nil {
		return err
	}
	if !ok {
		c.log.Info("no pod of Kubernetes: left alone")
		return c.printResult()
	}
	c.log.setPod(pod)
	ns, err := os.Open(c.args.Netns)
	if err != nil {
		return types.NewError(types.ErrInvalidNetNS, "the pod's network namespace cannot be opened", err.Error())
	}
	defer ns.Close()
	began := time.Now()
	v, err := decide(ctx, c.config, pod, c.attachment(), ns)
	for _, w := range v.warnings {
		c.log.Warn(w)
	}
	if err != nil {
		return c.refuse(pod, err)
	}
	if v.skip != "" {
		c.log.WithField("reason", v.skip).Info("pod left alone")
		return c.printResult()
	}
	err = within(ctx, func() error { return c.enroll(pod, v) })
	if err != nil {
		c.log.WithError(err).Error("pod not enrolled")
		return types.NewError(codeDatapath, fmt.Sprintf("pod %s/%s cannot be enrolled, and must not start outside the mesh", pod.Namespace, pod.Name), err.Error())
	}
	c.log.WithFields(logrus.Fields{"provisional": v.provisional, "duration": time.Since(began).String()}).Info("pod enrolled")
	return c.printResult()
}

// refuse is the error of a pod that nobody may start yet, or at all.
func (c *call) refuse(pod agentapi.Pod, err error) error {
	c.log.WithError(err).Error("pod refused")
	who := fmt.Sprintf("pod %s/%s", pod.Namespace, pod.Name)
	var no *agentapi.Error
	switch {
	case errors.Is(err, agentapi.ErrUndecidable):
		return types.NewError(types.ErrTryAgainLater, who+" has to wait for Sluice's node daemon", err.Error())
	case errors.As(err, &no) && no.Later:
		return types.NewError(types.ErrTryAgainLater, who+" has to wait", err.Error())
	}
	return types.NewError(codeRefused, who+" cannot be enrolled as it is", err.Error())
}

// enroll records the attachment first: if anything ends us half-way, DEL finds
// the record and removes whatever is there.
func (c *call) enroll(pod agentapi.Pod, v verdict) error {
	ns, err := netns.Open(c.args.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	d, err := c.datapath()
	if err != nil {
		return err
	}
	defer d.Close()
	record := datapath.Attachment{AttachmentID: c.attachmentID(), Cookie: ns.Cookie(), Provisional: v.provisional}
	if err := d.Attach(record); err != nil {
		return err
	}
	_, err = d.Enroll(ns, datapath.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Rules: v.rules})
	if err == nil {
		return nil
	}
	_, _, undo := d.Release(record.AttachmentID, ns)
	return errors.Join(err, undo)
}

// del never fails: an error would keep the other plugins of the chain from
// freeing what they hold. What it cannot remove, the daemon finds by the death of
// the namespace.
func del(ctx context.Context, c *call) error {
	err := c.withDatapath(ctx, func(d *datapath.Datapath) error {
		var ns *netns.NetNS // nil: it is gone already
		if open, err := netns.Open(c.args.Netns); err == nil {
			defer open.Close()
			ns = open
		}
		released, found, err := d.Release(c.attachmentID(), ns)
		if found {
			c.log.WithField("unenrolled", released.Unenrolled).Info("attachment released")
		}
		return err
	})
	if err != nil {
		c.log.WithError(err).Error("not everything could be removed; the daemon will")
	}
	return nil
}

func gc(ctx context.Context, c *call) error {
	err := c.withDatapath(ctx, func(d *datapath.Datapath) error {
		var valid []datapath.AttachmentID
		for _, a := range c.config.ValidAttachments {
			valid = append(valid, datapath.AttachmentID{Container: a.ContainerID, Interface: a.IfName})
		}
		released, err := d.ReleaseStale(c.config.Name, valid)
		for _, r := range released {
			c.log.WithFields(logrus.Fields{"stale": r.Container + "/" + r.Interface, "unenrolled": r.Unenrolled}).Info("attachment released")
		}
		return err
	})
	if err != nil {
		c.log.WithError(err).Error("not everything could be collected; the daemon will")
	}
	return nil
}

// check compares what is with what should be.
func check(ctx context.Context, c *call) error {
	err := c.withDatapath(ctx, func(d *datapath.Datapath) error {
		attachment, found, err := d.Attachment(c.attachmentID())
		if err != nil || !found { // not found: a pod outside the mesh
			return err
		}
		return d.CheckPod(attachment.Cookie)
	})
	if err != nil {
		return types.NewError(codeDatapath, "the pod's redirection is not as it should be", err.Error())
	}
	return nil
}

// status fails only where a pod outside the mesh could not start: an error makes
// the whole node NotReady. What a person should know goes to stderr.
func status(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, daemonTime)
	defer cancel()
	if _, err := agentapi.Call(ctx, c.config.Socket, agentapi.Request{Verb: agentapi.Status}, nil); err != nil {
		fmt.Fprintf(os.Stderr, "sluice-cni: pods of the mesh cannot start now, others can: %v\n", err)
	}
	return nil
}
