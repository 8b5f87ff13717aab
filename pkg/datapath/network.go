package datapath

import (
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// podNetwork is what the maps hold of a pod's network: read from the namespace,
// and written as a difference to what is there.
type podNetwork struct {
	own        map[connectAddr]connectOwnKind
	names      map[string]connectInterfaceKind // that the rules name, there or not
	interfaces map[uint32]connectInterfaceKind // by index
	routes     map[netip.Prefix]connectRouteKind
}

// networkOf is what should be in the maps of a namespace that looks like this.
func networkOf(network netns.Network, names map[string]connectInterfaceKind) podNetwork {
	// What the rerouted interfaces' address book has local is no address of the pod.
	network.Local = slices.DeleteFunc(slices.Clone(network.Local), func(p netip.Prefix) bool { return p == bookPrefix6 })
	out := podNetwork{own: map[connectAddr]connectOwnKind{}, names: names, interfaces: interfacesOf(network, names)}
	for _, a := range network.Broadcasts {
		out.own[toAddr(a)] = connectOwnKindOWN_BROADCAST
	}
	for _, p := range network.Local {
		if p.IsSingleIP() {
			out.own[toAddr(p.Addr())] = connectOwnKindOWN_ADDR
		}
	}
	for _, a := range network.Addresses {
		out.own[toAddr(a)] = connectOwnKindOWN_ADDR
	}
	out.routes = compileRoutes(network, out.interfaces, out.named(connectInterfaceKindINTERFACE_EXCLUDED))
	for p := range out.routes { // IPv6 addresses of lo have one
		if p.IsSingleIP() && out.own[toAddr(p.Addr())] == connectOwnKindOWN_ADDR {
			delete(out.routes, p) // own_addrs is asked first
		}
	}
	return out
}

// flags are those of a pod with this network.
func (n podNetwork) flags() (flags connectPodFlags) {
	if n.named(connectInterfaceKindINTERFACE_EXCLUDED) {
		flags |= connectPodFlagsPOD_HAS_INTERFACES
	}
	for _, kind := range n.routes {
		if kind == connectRouteKindROUTE_LOCAL {
			flags |= connectPodFlagsPOD_HAS_LOCALS
		}
	}
	return flags
}

// interfacesOf finds the interfaces that the rules name, and those that carry an
// excluded one: a SYN that is sent through a VLAN or a bridge passes the
// interface below it as well.
func interfacesOf(network netns.Network, names map[string]connectInterfaceKind) map[uint32]connectInterfaceKind {
	out := map[uint32]connectInterfaceKind{}
	for _, l := range network.Links {
		if kind, ok := names[l.Name]; ok {
			out[uint32(l.Index)] = kind
		}
	}
	above := func(index int) bool {
		kind := out[uint32(index)]
		return kind == connectInterfaceKindINTERFACE_EXCLUDED || kind == connectInterfaceKindINTERFACE_CARRIER
	}
	carry := func(index int) (more bool) {
		if index == 0 || out[uint32(index)] != 0 {
			return false
		}
		out[uint32(index)] = connectInterfaceKindINTERFACE_CARRIER
		return true
	}
	for more := len(out) > 0; more; {
		more = false
		for _, l := range network.Links {
			if above(l.Index) {
				more = carry(l.Parent) || more
			}
			if above(l.Master) {
				more = carry(l.Index) || more
			}
		}
	}
	if slices.Contains(slices.Collect(maps.Values(names)), connectInterfaceKindINTERFACE_REROUTED) {
		for _, l := range network.Links { // the guard stops what comes from others
			if out[uint32(l.Index)] == 0 {
				out[uint32(l.Index)] = connectInterfaceKindINTERFACE_OTHER
			}
		}
	}
	return out
}

// hasRoutes says whether a pod has entries in routes4 or routes6. Listing a trie
// takes 9 us an entry, so those of other pods are not looked at in vain.
func hasRoutes(flags connectPodFlags) bool {
	return flags&(connectPodFlagsPOD_HAS_INTERFACES|connectPodFlagsPOD_HAS_LOCALS) != 0
}

// readNetwork reads what the maps hold of a pod.
func (d *Datapath) readNetwork(cookie uint64, flags connectPodFlags) (podNetwork, error) {
	out := podNetwork{
		own: map[connectAddr]connectOwnKind{}, names: map[string]connectInterfaceKind{},
		interfaces: map[uint32]connectInterfaceKind{}, routes: map[netip.Prefix]connectRouteKind{},
	}
	err := errors.Join(
		eachOf(d.maps["own_addrs"], func(k connectOwnAddrKey) bool { return k.Cookie == cookie },
			func(k connectOwnAddrKey, v connectOwnKind) { out.own[k.Addr] = v }),
		eachOf(d.maps["interface_names"], func(k connectInterfaceName) bool { return k.Cookie == cookie },
			func(k connectInterfaceName, v connectInterfaceKind) { out.names[text(k.Name[:])] = v }),
		eachOf(d.maps["interfaces"], func(k connectInterfaceKey) bool { return k.Cookie == cookie },
			func(k connectInterfaceKey, v connectInterfaceKind) { out.interfaces[k.Ifindex] = v }),
	)
	if !hasRoutes(flags) {
		return out, err
	}
	low, high := uint32(cookie), uint32(cookie>>32)
	return out, errors.Join(err,
		eachOf(d.maps["routes4"], func(k connectRoute4Key) bool { return k.CookieLow == low && k.CookieHigh == high },
			func(k connectRoute4Key, v connectRouteKind) {
				out.routes[netip.PrefixFrom(netip.AddrFrom4(k.Addr), int(k.Prefixlen)-cookieBits)] = v
			}),
		eachOf(d.maps["routes6"], func(k connectRoute6Key) bool { return k.CookieLow == low && k.CookieHigh == high },
			func(k connectRoute6Key, v connectRouteKind) {
				out.routes[netip.PrefixFrom(netip.AddrFrom16(k.Addr), int(k.Prefixlen)-cookieBits)] = v
			}),
	)
}

// changeNetwork makes the maps hold new in place of old. If a table is full, or
// a write fails otherwise, they hold old again.
func (d *Datapath) changeNetwork(cookie uint64, old, new podNetwork) error {
	err := d.writeNetwork(cookie, old, new)
	if err == nil {
		return nil
	}
	now, readErr := d.readNetwork(cookie, connectPodFlagsPOD_HAS_LOCALS)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	return errors.Join(err, d.writeNetwork(cookie, now, old))
}

// entry is one write to a map; a nil value removes.
type entry struct {
	table      string
	key, value any
}

// writeNetwork changes one entry at a time while connections are judged by them.
// Addresses and interfaces are each a matter of their own.
func (d *Datapath) writeNetwork(cookie uint64, old, new podNetwork) error {
	var entries []entry
	difference(old.own, new.own, func(a connectAddr, v any) {
		entries = append(entries, entry{"own_addrs", connectOwnAddrKey{Cookie: cookie, Addr: a}, v})
	})
	difference(old.interfaces, new.interfaces, func(index uint32, v any) {
		entries = append(entries, entry{"interfaces", connectInterfaceKey{Cookie: cookie, Ifindex: index}, v})
	})
	difference(old.names, new.names, func(name string, v any) {
		key := connectInterfaceName{Cookie: cookie}
		setText(key.Name[:], name)
		entries = append(entries, entry{"interface_names", key, v})
	})
	for _, step := range routeSteps(old.routes, new.routes) {
		table, key := routeKey(cookie, step.prefix)
		entries = append(entries, entry{table, key, step.kind})
	}
	for _, e := range entries {
		if e.value == nil {
			if err := deleteKey(d.maps[e.table], e.key); err != nil {
				return err
			}
		} else if err := d.maps[e.table].Put(e.key, e.value); err != nil {
			return tableError(e.table, err)
		}
		failpoint.Step("network: entry changed")
	}
	return nil
}

// difference visits the keys whose values differ, with the new value; nil for
// those that go, which come first, to make room.
func difference[K, V comparable](old, new map[K]V, visit func(K, any)) {
	for k := range old {
		if _, ok := new[k]; !ok {
			visit(k, nil)
		}
	}
	for k, v := range new {
		if was, ok := old[k]; !ok || was != v {
			visit(k, v)
		}
	}
}

// forgetNetwork removes the entries of the pods that are chosen.
func (d *Datapath) forgetNetwork(routes bool, chosen func(cookie uint64) bool) error {
	err := errors.Join(
		deleteWhere(d.maps["own_addrs"], func(k connectOwnAddrKey) bool { return chosen(k.Cookie) }),
		deleteWhere(d.maps["interface_names"], func(k connectInterfaceName) bool { return chosen(k.Cookie) }),
		deleteWhere(d.maps["interfaces"], func(k connectInterfaceKey) bool { return chosen(k.Cookie) }),
	)
	if !routes {
		return err
	}
	return errors.Join(err,
		deleteWhere(d.maps["routes4"], func(k connectRoute4Key) bool { return chosen(uint64(k.CookieHigh)<<32 | uint64(k.CookieLow)) }),
		deleteWhere(d.maps["routes6"], func(k connectRoute6Key) bool { return chosen(uint64(k.CookieHigh)<<32 | uint64(k.CookieLow)) }),
	)
}

func (n podNetwork) excludes(index int) bool {
	return n.interfaces[uint32(index)] == connectInterfaceKindINTERFACE_EXCLUDED
}

func (n podNetwork) reroutes(index int) bool {
	return n.interfaces[uint32(index)] == connectInterfaceKindINTERFACE_REROUTED
}

// named says whether the rules name an interface as of this kind, there or not.
func (n podNetwork) named(kind connectInterfaceKind) bool {
	return slices.Contains(slices.Collect(maps.Values(n.names)), kind)
}

// missing are the names of interfaces that are not there.
func (n podNetwork) missing(network netns.Network) []string {
	names := maps.Clone(n.names)
	for _, l := range network.Links {
		delete(names, l.Name)
	}
	return slices.Sorted(maps.Keys(names))
}
