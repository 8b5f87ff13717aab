package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// node is the datapath as the daemon uses it: by cookies, never by a descriptor
// that is kept.
type node interface {
	Pods() ([]datapath.PodInfo, error)
	Attachments() ([]datapath.Attachment, error)
	InForce(cookie uint64, r rules.Rules) (datapath.Force, bool, error)
	Settle(cookie uint64) error
	CheckPod(cookie uint64) error
	Sweep() (datapath.Swept, error)
	Strays() ([]uint64, error)
	DropStrays(cookies []uint64) error
	Stats() ([]datapath.StatInfo, error)
	Fill() ([]datapath.Fill, error)
	Features() datapath.Features

	// Change enrolls again a namespace that is enrolled.
	Change(cookie uint64, pod datapath.Pod) error
	// Leave un-enrolls a living namespace.
	Leave(cookie uint64) error
	// StillUp returns datapath.ErrNotUp once what is pinned has been removed.
	StillUp() error
	// Repair enrolls a running pod, to whose namespace one of its processes leads.
	// With reset it closes the app's open connections.
	Repair(found running, pod datapath.Pod, reset bool) (repaired, error)
}

// kernelNode is the real one.
type kernelNode struct{ *datapath.Datapath }

// errNotFound is returned for a namespace that no process leads to.
var errNotFound = errors.New("no process or name leads to the pod's network namespace")

// byCookie opens a living namespace for the time of a call.
func (n kernelNode) byCookie(cookie uint64, do func(*netns.NetNS) error) error {
	ns, found, err := n.Namespace(cookie)
	if err != nil {
		return err
	}
	if !found {
		return errNotFound
	}
	defer ns.Close()
	return do(ns)
}

func (n kernelNode) Change(cookie uint64, pod datapath.Pod) error {
	return n.byCookie(cookie, func(ns *netns.NetNS) error {
		_, err := n.Enroll(ns, pod)
		return err
	})
}

// InForce is the datapath's, which compares IDs as the machine sees them, for
// rules with the IDs that the pod sees: they differ in a user namespace.
func (n kernelNode) InForce(cookie uint64, r rules.Rules) (datapath.Force, bool, error) {
	force, found, err := n.Datapath.InForce(cookie, r)
	if err != nil || !found || force.Follows {
		return force, found, err
	}
	err = n.byCookie(cookie, func(ns *netns.NetNS) error {
		seen, err := asSeen(ns, r)
		if err != nil {
			return err
		}
		force, found, err = n.Datapath.InForce(cookie, seen)
		return err
	})
	if errors.Is(err, errNotFound) {
		err = nil // nobody translates; who changes the rules is told
	}
	return force, found, err
}

func (n kernelNode) Leave(cookie uint64) error {
	return n.byCookie(cookie, func(ns *netns.NetNS) error {
		_, err := n.Unenroll(cookie, ns)
		return err
	})
}

// repaired says what Repair did.
type repaired struct {
	Cookie uint64
	Before []netns.Connection // of the app, open before, and so outside the mesh
	Reset  int                // of them, that were closed
	Notes  []string
}

func (n kernelNode) Repair(found running, pod datapath.Pod, reset bool) (repaired, error) {
	ns, err := found.namespace()
	if err != nil {
		return repaired{}, err
	}
	defer ns.Close()
	out := repaired{Cookie: ns.Cookie()}
	before, owned, err := appConnections(ns, pod.Rules) // while those that are captured cannot be among them
	if err != nil {
		out.Notes = append(out.Notes, "its open connections cannot be listed: "+err.Error())
	}
	e, err := n.Enroll(ns, pod)
	if err != nil {
		return repaired{}, err
	}
	out.Notes = append(out.Notes, e.Notes...)
	if e.Already {
		return out, nil
	}
	out.Before = before
	if reset {
		out.reset(ns.Reset, owned)
	}
	return out, nil
}

// reset closes connections until it cannot.
func (r *repaired) reset(closeOne func(netns.Connection) error, connections []netns.Connection) {
	for _, c := range connections {
		if err := closeOne(c); err != nil {
			r.Notes = append(r.Notes, "not every connection is closed: "+err.Error())
			return
		}
		r.Reset++
	}
}

// appConnections are the connections of a namespace that are not its proxy's, and
// those of them of which it is known who has them open: the proxy may be known by
// its group alone, which the kernel does not note of a socket.
func appConnections(ns *netns.NetNS, r rules.Rules) (all, owned []netns.Connection, err error) {
	proxy, err := asSeen(ns, r)
	if err != nil {
		return nil, nil, err
	}
	connections, err := ns.Connections()
	if err != nil {
		return nil, nil, err
	}
	owners, err := ns.Owners(connections)
	if err != nil {
		return nil, nil, err
	}
	for i, c := range connections {
		if slices.Contains(proxy.ProxyUIDs, c.UID) || slices.ContainsFunc(owners[i], func(o netns.Owner) bool {
			return slices.Contains(proxy.ProxyUIDs, o.UID) || slices.Contains(proxy.ProxyGIDs, o.GID)
		}) {
			continue
		}
		all = append(all, c)
		if len(owners[i]) > 0 {
			owned = append(owned, c)
		}
	}
	return all, owned, nil
}

// asSeen are a pod's rules with the IDs that the machine sees.
func asSeen(ns *netns.NetNS, r rules.Rules) (rules.Rules, error) {
	normal, err := r.Normalise()
	if err != nil {
		return rules.Rules{}, err
	}
	ids, err := ns.IDs()
	if err != nil {
		return rules.Rules{}, err
	}
	return normal.Translate(ids.UID, ids.GID)
}

// running is what leads to a running pod's namespace: processes whose cgroup named
// one of its UIDs a moment ago, and the addresses that the API server knows.
type running struct {
	pids      []int
	uids      []string
	addresses []netip.Addr
}

// namespace finds a running pod's network namespace: that of a process whose
// cgroup names the pod, which holds the pod's address and is not the machine's.
// A process of a pod may be in a namespace of its own making.
func (r running) namespace() (*netns.NetNS, error) {
	seen := map[uint64]bool{}
	var errs error
	for _, pid := range r.pids {
		ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			continue // it has ended
		}
		if !seen[ns.Inode()] && inPod(pid, r.uids) { // still: numbers are used again
			seen[ns.Inode()] = true
			err := holds(ns, r.addresses)
			if err == nil {
				return ns, nil
			}
			errs = errors.Join(errs, err)
		}
		ns.Close()
	}
	if errs != nil {
		return nil, errs
	}
	return nil, errNotFound
}

func holds(ns *netns.NetNS, addresses []netip.Addr) error {
	if err := ns.RefuseHost(); err != nil {
		return fmt.Errorf("a process of the pod is not in a pod's namespace: %w", err)
	}
	network, err := ns.Inspect()
	if err != nil {
		return err
	}
	for _, a := range addresses {
		if slices.Contains(network.Addresses, a) {
			return nil
		}
	}
	return fmt.Errorf("the namespace of the pod's process has %v, and the pod is said to have %v", network.Addresses, addresses)
}
