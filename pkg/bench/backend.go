package bench

import (
	"errors"
	"fmt"
	"slices"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// role says what a backend is compared with.
type role int

const (
	floor   role = iota // no redirection: what everything is compared with
	rival               // does the same in another way
	ours                // Sluice as it is by default
	variant             // Sluice in another way: left out where the way makes no difference
	control             // not redirected, but where Sluice's node programs run
)

// definition is a backend. A later one needs a line in definitions and nothing in
// the harness.
type definition struct {
	name string
	role role
	// iptables backends are what X_added_vs_iptables is beside: the cheapest of them.
	iptables bool
	// redirect captures what rules say; nil: nothing is redirected.
	redirect func(n *node, ns *netns.NetNS, r rules.Rules) error
	// udp is false for one that cannot capture DNS over UDP.
	udp bool
}

// Names of backends that the workloads or the ratios mention.
const (
	none       = "none"
	sluice     = "sluice"
	noGuard    = "sluice-noguard"
	bystander  = "bystander"
	withHooks  = "with"    // a process in a cgroup with Sluice's programs, not enrolled
	without    = "without" // the same in a cgroup without programs
	proxyID    = 1337
	appID      = 1000
	addrsInUse = 64 // destinations used in turn, alike for every backend
)

func definitions() []definition {
	return []definition{
		{name: none, role: floor, udp: true},
		{name: "iptables-legacy", role: rival, iptables: true, udp: true, redirect: restoreBy("iptables-legacy-restore")},
		{name: "iptables-nft", role: rival, iptables: true, udp: true, redirect: restoreBy("iptables-nft-restore")},
		{name: "nftables", role: rival, redirect: loadNft},
		{name: sluice, role: ours, udp: true, redirect: enroll(datapath.Pod{})},
		{name: noGuard, role: variant, udp: true, redirect: enroll(datapath.Pod{NoGuard: true})},
		{name: "sluice-tc", role: variant, redirect: enroll(datapath.Pod{Inbound: datapath.InboundTC})},
		{name: "sluice-tc-noguard", role: variant, redirect: enroll(datapath.Pod{Inbound: datapath.InboundTC, NoGuard: true})},
		{name: bystander, role: control},
	}
}

// enroll is Sluice, as pod says.
func enroll(pod datapath.Pod) func(*node, *netns.NetNS, rules.Rules) error {
	return func(n *node, ns *netns.NetNS, r rules.Rules) error {
		pod := pod
		pod.Rules = r
		_, err := n.datapath.Enroll(ns, pod)
		return err
	}
}

func (d definition) redirects() bool { return d.redirect != nil }

// meshed says that its processes are where Sluice's node programs run.
func (d definition) meshed() bool { return d.role == ours || d.role == variant || d.role == control }

// of are the definitions that have one of the roles.
func of(defs []definition, roles ...role) (out []definition) {
	for _, d := range defs {
		if slices.Contains(roles, d.role) {
			out = append(out, d)
		}
	}
	return out
}

func named(defs []definition, names ...string) (out []definition) {
	for _, d := range defs {
		if slices.Contains(names, d.name) {
			out = append(out, d)
		}
	}
	return out
}

func namesOf(defs []definition) (out []string) {
	for _, d := range defs {
		out = append(out, d.name)
	}
	return out
}

// backend is a definition brought to life: namespaces, and processes in them.
type backend struct {
	definition
	node            *node
	site            *site
	app, proxy, far *process // far is nil where nobody needs it
}

// world is how a backend's namespaces are made.
type world struct {
	rules  rules.Rules
	ipv6   bool
	noFar  bool // without a process in the far namespace
	asIs   bool // TIME_WAIT as the kernel has it by default
	noWork bool // without any process: what is measured needs none
}

// start makes a backend's namespaces and processes. What it cannot have, such
// as a missing iptables, is an error that names it.
func (s *stage) start(def definition, w world) (*backend, error) {
	place, err := newSite(w)
	if err != nil {
		return nil, err
	}
	b := &backend{definition: def, node: s.node, site: place}
	if err := b.start(s, w); err != nil {
		return nil, errors.Join(fmt.Errorf("backend %s: %w", def.name, err), b.Close())
	}
	return b, nil
}

func (b *backend) start(s *stage, w world) error {
	if b.redirects() {
		if err := b.redirect(s.node, b.site.pod, w.rules); err != nil {
			return err
		}
	}
	if w.noWork {
		return nil
	}
	cgroup := s.cgroupOf(b)
	var err error
	if b.app, err = s.worker(b.name+"/app", b.site.pod, cgroup, appID); err != nil {
		return err
	}
	if b.proxy, err = s.worker(b.name+"/proxy", b.site.pod, cgroup, proxyID); err != nil {
		return err
	}
	for _, addr := range listenersOf(w) {
		if _, err := b.proxy.call(job{Kind: jobListen, Addr: addr}); err != nil {
			return err
		}
	}
	if w.noFar {
		return nil
	}
	if b.far, err = s.worker(b.name+"/far", b.site.far, s.node.plain, appID); err != nil {
		return err
	}
	_, err = b.far.call(job{Kind: jobListen, Addr: farPort})
	return err
}

// cgroupOf is where a backend's processes run.
func (s *stage) cgroupOf(b *backend) string {
	if b.meshed() {
		return s.node.mesh
	}
	return s.node.plain
}

// Close ends the processes; the namespaces go with them. What Sluice has noted of
// the pod is removed: the node's next pods are not to be beside dead ones.
func (b *backend) Close() error {
	var errs error
	for _, p := range []*process{b.app, b.proxy, b.far} {
		if p != nil {
			errs = errors.Join(errs, p.Close())
		}
	}
	if b.redirects() && b.role != rival && b.node.datapath != nil {
		_, err := b.node.datapath.Unenroll(b.site.pod.Cookie(), b.site.pod)
		errs = errors.Join(errs, err)
	}
	return errors.Join(errs, b.site.Close())
}

// fleet are backends that one section measures side by side.
type fleet map[string]*backend

func (f fleet) Close() error {
	var errs error
	for name, b := range f {
		errs = errors.Join(errs, b.Close())
		delete(f, name)
	}
	return errs
}

// names are those of defs that are there.
func (f fleet) names(defs []definition) (out []string) {
	for _, d := range defs {
		if f[d.name] != nil {
			out = append(out, d.name)
		}
	}
	return out
}

// fleet starts backends and proves each. Without the floor or Sluice there is
// nothing to measure; what else a machine cannot have is left out, with the reason.
func (s *stage) fleet(defs []definition, w world, prove func(*backend) error) (fleet, error) {
	out := fleet{}
	for _, def := range defs {
		b, err := s.start(def, w)
		if err == nil {
			out[def.name] = b
			if err = prove(b); err != nil {
				err = fmt.Errorf("backend %s: %w", def.name, err)
			}
		}
		if s.ctx.Err() != nil {
			return nil, errors.Join(s.ctx.Err(), out.Close())
		}
		if err == nil {
			continue
		}
		if def.role == floor || def.role == ours {
			return nil, errors.Join(err, out.Close())
		}
		if b := out[def.name]; b != nil {
			err = errors.Join(err, b.Close())
			delete(out, def.name)
		}
		s.leaveOut(def.name, err)
	}
	return out, nil
}
