package cni

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
)

// Error codes of ours, above those that the specification keeps for itself.
const (
	codeRefused  = 100 // the pod's annotations cannot be obeyed
	codeDatapath = 101 // the kernel or the maps said no
	codePanic    = 102
)

// verb is one of the specification's, and how it is run.
type verb struct {
	name  string
	limit time.Duration // of all that it does; see logTime for what comes after
	// mayFail is false where an error of ours would do more harm than what it is
	// about: the other plugins of the chain could not free what they hold, or the
	// node would not be Ready.
	mayFail bool
	run     func(context.Context, *call) error
}

// Funcs are the plugin's verbs, for skel.
func Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{
		Add:    verb{"ADD", addTime, true, add}.call,
		Del:    verb{"DEL", delTime, false, del}.call,
		Check:  verb{"CHECK", addTime, true, check}.call,
		GC:     verb{"GC", delTime, false, gc}.call,
		Status: verb{"STATUS", statusTime, false, status}.call,
	}
}

// call is one call of the plugin.
type call struct {
	args   *skel.CmdArgs
	config config
	log    *journal
}

// call reads the configuration and runs the verb until its time is over. A panic
// becomes an error that the runtime can show.
func (v verb) call(args *skel.CmdArgs) error {
	c := &call{args: args}
	var err error
	if c.config, err = parseConfig(args.StdinData); err != nil {
		return err
	}
	if v.name == "ADD" { // nobody else needs it, so for nobody else can it be wrong
		if err := c.config.parsePrevResult(); err != nil {
			return err
		}
	}
	c.log = newJournal(c.config, logrus.Fields{"verb": v.name, "container": args.ContainerID, "interface": args.IfName})
	defer c.log.flush()
	ctx, cancel := context.WithTimeout(context.Background(), v.limit)
	defer cancel()
	err = c.within(ctx, v)
	if !v.mayFail && err != nil {
		c.log.WithError(err).Error("not everything could be done; the daemon will do it")
		return nil
	}
	if v.name == "ADD" && err == nil {
		return c.printResult()
	}
	return err
}

// within runs a verb and stops waiting when the context ends: much of what a verb
// waits for (the lock of the datapath, the kernel's of a namespace) cannot be
// interrupted. Ending the process then leaves what a kill at that moment would, and
// the runtime's DEL removes it.
func (c *call) within(ctx context.Context, v verb) error {
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				c.log.WithField("stack", string(debug.Stack())).Errorf("panic: %v", p)
				done <- types.NewError(codePanic, fmt.Sprintf("sluice-cni panicked: %v", p), "please report it; the stack is in the log")
			}
		}()
		done <- v.run(ctx, c)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		why := fmt.Sprintf("another process may hold the lock of %s (\"fuser -v %s\" names it), or the node has no time for this one", c.config.BPFFS, c.config.BPFFS)
		c.log.Error("not done in time: " + why)
		return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("%s is not done after %v", v.name, v.limit), why)
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

// withDatapath does something with the datapath, if there is one.
func (c *call) withDatapath(do func(*datapath.Datapath) error) error {
	d, err := c.datapath()
	if errors.Is(err, datapath.ErrNotUp) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	return do(d)
}
