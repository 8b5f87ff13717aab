package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/netns"
)

// Rerouted interfaces have a virtual machine behind them. Two TC programs there
// write addresses of the address book into what it sends and receives: see
// bpf/reroute.c and docs/adr/0008.

// bookPrefix6 is where the address book has its IPv6 addresses (TARGETS6_0 in
// bpf/addr.h). It is local in pods that reroute, for as long as they do.
var bookPrefix6 = netip.MustParsePrefix("fd73:6c75:6963:6500::/96")

// bestLocalAddress of arp_announce: ARP does not tell the machine the source of
// the packet that waits for an answer, which is one of the address book.
const bestLocalAddress = 2

// checkReroute refuses what cannot be rerouted, rather than let it escape.
func (d *Datapath) checkReroute(pod Pod, network netns.Network) error {
	names := pod.Rules.RerouteInterfaces
	if len(names) == 0 {
		return nil
	}
	if !d.Features().IngressIfindex {
		return errors.New("this kernel does not tell sk_lookup programs the interface (Linux 5.17 does): interfaces cannot be rerouted")
	}
	if pod.NoGuard {
		return errors.New("interfaces cannot be rerouted without the guard: until one that comes later is rerouted, the guard stops what it would let through")
	}
	for _, l := range network.Links {
		if slices.Contains(names, l.Name) {
			if err := canReroute(l); err != nil {
				return err
			}
		}
	}
	return nil
}

func canReroute(l netns.Link) error {
	if l.Lo {
		return fmt.Errorf("interface %s cannot be rerouted: no machine is behind it", l.Name)
	}
	if l.Bridge != "" {
		return fmt.Errorf("interface %s cannot be rerouted: it is a port of the bridge %s, through which its packets come in; name that one", l.Name, l.Bridge)
	}
	return nil
}

// nameReroutes makes the pod's rows of reroutes exactly these names, and the
// IPv6 part of the address book local or not. It says whether IPv6 can be
// rerouted: where the namespace has none, what comes by it is dropped.
func (d *Datapath) nameReroutes(ns *netns.NetNS, names []string) (six bool, err error) {
	cookie := ns.Cookie()
	wanted := map[connectRerouteKey]bool{}
	for _, name := range names {
		key := connectRerouteKey{Cookie: cookie}
		setText(key.Name[:], name)
		wanted[key] = true
		err := d.maps["reroutes"].Update(key, connectReroute{}, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return false, tableError("reroutes", err)
		}
	}
	if len(names) == 0 {
		return false, unreroute(d.maps["reroutes"], cookie, ns)
	}
	_, err = dropReroutes(d.maps["reroutes"], ns, func(k connectRerouteKey) bool { return k.Cookie == cookie && !wanted[k] })
	if err != nil {
		return false, err
	}
	err = ns.AddLocalPrefix(bookPrefix6)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return false, nil // IPv6 is disabled
	}
	return err == nil, err
}

// rerouting are the programs of a rerouted interface.
var rerouting = []string{progRerouteIn, progRerouteOut}

// rerouteInterfaces attaches what the pod's rerouted interfaces need, or just
// what is missing, and says what.
func (d *Datapath) rerouteInterfaces(ns *netns.NetNS, network netns.Network, entries podNetwork, flags connectPodFlags, missing bool) (attached []string, err error) {
	for _, l := range network.Links {
		if !entries.reroutes(l.Index) {
			continue
		}
		if e := canReroute(l); e != nil {
			err = errors.Join(err, e)
			continue
		}
		more, e := d.rerouteOne(ns, l, flags, missing)
		attached = append(attached, more...)
		if e != nil && (!missing || !isGone(e)) { // it may go while it is looked at
			err = errors.Join(err, e)
		}
	}
	return attached, err
}

func (d *Datapath) rerouteOne(ns *netns.NetNS, l netns.Link, flags connectPodFlags, missing bool) (attached []string, err error) {
	for _, name := range rerouting {
		if missing && d.hasTC(ns, l, name, flags) {
			continue
		}
		if err := d.attachTC(ns, l, name, flags); err != nil {
			return attached, fmt.Errorf("attach %s to %s of %s: %w", name, l.Name, ns.Path(), err)
		}
		attached = append(attached, name+" to "+l.Name)
	}
	key := connectRerouteKey{Cookie: ns.Cookie()}
	setText(key.Name[:], l.Name)
	var row connectReroute
	if err := d.maps["reroutes"].Lookup(key, &row); err != nil {
		return attached, fmt.Errorf("read reroutes: %w", err)
	}
	return attached, d.routeLocally(ns, l, key, row)
}

// routeLocally lets the interface take and send packets of 127.0.0.0/8, which
// reroute_in and reroute_out, attached before, allow the address book only. The
// values from before are kept first, so that a crash loses none.
func (d *Datapath) routeLocally(ns *netns.NetNS, l netns.Link, key connectRerouteKey, row connectReroute) error {
	if row.Changed == 0 || row.Ifindex != uint32(l.Index) {
		localnet, err := readNumber(ns, localnetOf(l.Name))
		if err != nil {
			return err
		}
		announce, err := readNumber(ns, announceOf(l.Name))
		if err != nil {
			return err
		}
		row = connectReroute{Ifindex: uint32(l.Index), Changed: 1, RouteLocalnet: localnet, ArpAnnounce: announce}
		if err := d.maps["reroutes"].Put(key, row); err != nil {
			return tableError("reroutes", err)
		}
	}
	return errors.Join(
		ns.WriteSysctl(localnetOf(l.Name), "1"),
		ns.WriteSysctl(announceOf(l.Name), strconv.Itoa(bestLocalAddress)))
}

func localnetOf(link string) string { return "ipv4/conf/" + link + "/route_localnet" }
func announceOf(link string) string { return "ipv4/conf/" + link + "/arp_announce" }

func readNumber(ns *netns.NetNS, name string) (uint8, error) {
	value, err := ns.ReadSysctl(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(value, 10, 8)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", name, err)
	}
	return uint8(n), nil
}

// unreroute gives a pod's interfaces back what they had, and forgets them. It
// comes before the TC programs go: without them, 127.0.0.0/8 of the pod would be
// open to the machine. A dead namespace (nil) has taken all of it along.
func unreroute(reroutes *ebpf.Map, cookie uint64, ns *netns.NetNS) error {
	some, err := dropReroutes(reroutes, ns, func(k connectRerouteKey) bool { return k.Cookie == cookie })
	if ns != nil && some {
		err = errors.Join(err, ns.RemoveLocalPrefix(bookPrefix6))
	}
	return err
}

func dropReroutes(reroutes *ebpf.Map, ns *netns.NetNS, chosen func(connectRerouteKey) bool) (some bool, err error) {
	keys, err := keysOf(reroutes, chosen)
	if err != nil {
		return false, err
	}
	for _, key := range keys {
		var row connectReroute
		if ns != nil && reroutes.Lookup(key, &row) == nil {
			err = errors.Join(err, restore(ns, row))
		}
		err = errors.Join(err, deleteKey(reroutes, key))
	}
	return len(keys) > 0, err
}

// restore writes the values from before, if the interface is still there: by
// whatever name.
func restore(ns *netns.NetNS, row connectReroute) error {
	if row.Changed == 0 {
		return nil
	}
	network, err := ns.Inspect()
	if err != nil {
		return err
	}
	at := slices.IndexFunc(network.Links, func(l netns.Link) bool { return uint32(l.Index) == row.Ifindex })
	if at < 0 {
		return nil
	}
	name := network.Links[at].Name
	err = errors.Join(
		ns.WriteSysctl(localnetOf(name), strconv.Itoa(int(row.RouteLocalnet))),
		ns.WriteSysctl(announceOf(name), strconv.Itoa(int(row.ArpAnnounce))))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it went meanwhile
	}
	return err
}
