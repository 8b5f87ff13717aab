package cni

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// del needs neither the namespace nor the daemon. What it cannot remove, the daemon
// finds by the death of the namespace.
func del(_ context.Context, c *call) error {
	return c.withDatapath(func(d *datapath.Datapath) error {
		var ns *netns.NetNS // nil: it is gone already
		if open, err := netns.Open(c.args.Netns); err == nil {
			defer open.Close()
			ns = open
		}
		released, found, err := d.Release(c.attachmentID(), ns)
		if found && err == nil {
			c.log.WithField("unenrolled", released.Unenrolled).Info("attachment released")
		}
		return err
	})
}

func gc(_ context.Context, c *call) error {
	return c.withDatapath(func(d *datapath.Datapath) error {
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
}

// check compares what is with what should be: with what the attachment's record
// says, and with the daemon's rules where it answers.
func check(ctx context.Context, c *call) error {
	err := c.withDatapath(func(d *datapath.Datapath) error {
		attachment, found, err := d.Attachment(c.attachmentID())
		if err != nil || !found { // not found: a pod outside the mesh
			return err
		}
		ns, err := netns.Open(c.args.Netns)
		if err != nil {
			return err
		}
		defer ns.Close()
		if attachment.Cookie != ns.Cookie() {
			return fmt.Errorf("this is network namespace %d, and ADD was asked about %d: make the pod's sandbox anew", ns.Cookie(), attachment.Cookie)
		}
		if err := d.CheckNamespace(ns); err != nil {
			return err
		}
		should, err := c.shouldBe(ctx)
		if err != nil || should == nil {
			return err
		}
		return d.CheckRules(ns, *should)
	})
	if err != nil {
		return types.NewError(codeDatapath, "the pod's redirection is not as it should be", err.Error())
	}
	return nil
}

// shouldBe are the rules that the daemon knows the pod to have; nil where it does
// not answer or does not know.
func (c *call) shouldBe(ctx context.Context) (*rules.Rules, error) {
	ctx, cancel := context.WithTimeout(ctx, daemonTime)
	defer cancel()
	ns, err := os.Open(c.args.Netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	answer, err := agentapi.Call(ctx, c.config.Socket, agentapi.Request{Verb: agentapi.Check, Attachment: c.attachment()}, ns)
	if errors.Is(err, agentapi.ErrNoDaemon) {
		c.log.WithError(err).Warn("the rules are not compared")
		return nil, nil
	}
	return answer.Rules, err
}

// status says on stderr what a person should know, and is never an error: pods
// outside the mesh can start all the same, and an error makes the node NotReady.
func status(ctx context.Context, c *call) error {
	ctx, cancel := context.WithTimeout(ctx, daemonTime)
	defer cancel()
	_, daemonErr := agentapi.Call(ctx, c.config.Socket, agentapi.Request{Verb: agentapi.Status}, nil)
	d, err := c.datapath()
	if err == nil {
		err = d.Close()
	}
	if err = errors.Join(daemonErr, err); err != nil {
		fmt.Fprintf(os.Stderr, "sluice-cni: pods of the mesh cannot start now, others can: %v\n", err)
	}
	return nil
}
