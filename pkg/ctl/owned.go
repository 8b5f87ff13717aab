package ctl

import (
	"fmt"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
)

// owner is the node daemon whose datapath this command line is about, if there is
// one.
func (c *common) owner() (agentapi.Owner, bool, error) {
	o, owned, err := agentapi.OwnerOf(c.runDir)
	return o, owned && same(o.BPFFS, c.dir), err
}

// mayChange refuses to change by hand what a node daemon owns, with what to do
// instead: it would put back what it finds changed, or rely on what is not so.
func (c *common) mayChange(instead string) error {
	if err := needRoot(); err != nil {
		return err
	}
	o, owned, err := c.owner()
	if err != nil || !owned {
		return err
	}
	return fmt.Errorf("this node belongs to the daemon sluiced (%s), and %s", o, instead)
}
