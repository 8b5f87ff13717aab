package install

import (
	"fmt"
	"strings"
	"time"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

// patience says how long losses are put up with.
type patience struct {
	tolerated       int // losses that are repaired at once
	delay, maxDelay time.Duration
	probation       time.Duration // what is put back after a contest must last this long, and the delay
	memory          time.Duration // after this, a loss is forgotten
}

// contest decides how soon to put back what somebody else took away. The first
// losses within memory are repaired at once, the next ones after delays that
// double; two installers that overwrite each other's file without end would
// have the runtime reload all the time.
type contest struct {
	patience

	held     bool // it was in place at the last look
	losses   int  // in a row
	total    int
	lastLoss time.Time
	placedAt time.Time
}

// waitError is a reason that time alone may end.
type waitError struct {
	reason string
	after  time.Duration
}

func (e *waitError) Error() string { return e.reason }

// missing notes that it is not in place, and returns how long to leave it so.
func (c *contest) missing(now time.Time) time.Duration {
	if c.held {
		if now.Sub(c.lastLoss) > c.memory+c.wait() {
			c.losses = 0
		}
		c.held = false
		c.losses++
		c.total++
		c.lastLoss = now
	}
	if c.losses == 0 {
		return 0 // it was never in place: the first installation
	}
	return c.lastLoss.Add(c.wait()).Sub(now)
}

// placed notes that it was put in place.
func (c *contest) placed(now time.Time) { c.held, c.placedAt = true, now }

// present notes that it is in place, and returns how long until that can be
// trusted.
func (c *contest) present(now time.Time) time.Duration {
	if !c.held {
		c.placed(now)
	}
	if c.losses <= c.tolerated {
		return 0
	}
	return c.placedAt.Add(c.probation + c.wait()).Sub(now)
}

// wait is the delay after the losses so far.
func (c *contest) wait() time.Duration {
	if c.losses <= c.tolerated {
		return 0
	}
	doublings := min(c.losses-c.tolerated-1, 30)
	return min(c.delay<<doublings, c.maxDelay)
}

// contestedConf names the file, who is in it and what to set.
func contestedConf(file string, list conflist.List, losses int) string {
	who := "which holds no other plugin"
	if others := list.Others(); len(others) > 0 {
		who = "whose other plugins are " + strings.Join(others, ", ")
	}
	remedy := "find out which installer rewrites the file, and have it stop"
	for _, t := range list.Others() {
		if t == "cilium-cni" {
			remedy = "set cni.exclusive=false in Cilium's Helm values (cni-exclusive: \"false\" in the ConfigMap cilium-config)"
		}
	}
	return fmt.Sprintf("%s, %s, was overwritten without Sluice's entry %d times in a row: %s", file, who, losses, remedy)
}

func contestedBinary(file string, losses int) string {
	return fmt.Sprintf("%s was overwritten or removed %d times in a row: find out which installer does that, and have it stop", file, losses)
}
