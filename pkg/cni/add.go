package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types020 "github.com/containernetworking/cni/pkg/types/020"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// printResult passes the previous plugin's result on, in the version asked for.
func (c *call) printResult() error {
	if c.config.PrevResult != nil {
		if was, _ := c.config.RawPrevResult["cniVersion"].(string); was != c.config.CNIVersion {
			return types.PrintResult(c.config.PrevResult, c.config.CNIVersion)
		}
		// As it came, with what this version of the library may not know.
		if err := json.NewEncoder(os.Stdout).Encode(c.config.RawPrevResult); err != nil {
			return types.NewError(types.ErrIOFailure, "the result cannot be printed", err.Error())
		}
		return nil
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
		return nil
	}
	log := c.log.WithField("pod", pod.Namespace+"/"+pod.Name)
	ns, err := os.Open(c.args.Netns)
	if err != nil {
		return types.NewError(types.ErrInvalidNetNS, "the pod's network namespace cannot be opened", err.Error())
	}
	defer ns.Close()
	began := time.Now()
	v, err := decide(ctx, c.config, pod, c.attachment(), ns)
	for _, w := range v.warnings {
		log.Warn(w)
	}
	if err != nil {
		log.WithError(err).Error("pod refused")
		return refusal(pod, err)
	}
	if v.skip != "" {
		log.WithField("reason", v.skip).Info("pod left alone")
		return nil
	}
	if err = c.enroll(pod, v); err != nil {
		log.WithError(err).Error("pod not enrolled")
		c.tell(ctx, agentapi.Request{Verb: agentapi.Undo, Attachment: c.attachment(), Pod: pod})
		return types.NewError(codeDatapath, fmt.Sprintf("pod %s/%s cannot be enrolled, and must not start outside the mesh", pod.Namespace, pod.Name), err.Error())
	}
	log.WithFields(logrus.Fields{"provisional": v.provisional, "duration": time.Since(began).String()}).Info("pod enrolled")
	return nil
}

// tell says something to the daemon that it can do without.
func (c *call) tell(ctx context.Context, request agentapi.Request) {
	ctx, cancel := context.WithTimeout(ctx, logTime)
	defer cancel()
	if _, err := agentapi.Call(ctx, c.config.Socket, request, nil); err != nil {
		c.log.WithError(err).Debug("the daemon was not told")
	}
}

// refusal is the error of a pod that nobody may start yet, or at all.
func refusal(pod agentapi.Pod, err error) error {
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
