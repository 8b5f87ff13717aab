package ctl

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

type enrollFlags struct {
	netns, pod  string
	annotations []string
	uids, gids  []string
	inbound, tc string
	noGuard     bool
	dns         bool
	dnsPort     uint16
}

func newEnroll(c *common) *cobra.Command {
	var f enrollFlags
	cmd := &cobra.Command{
		Use:   "enroll --netns PATH-OR-NAME",
		Short: "Capture the TCP connections of a network namespace",
		Long: `enroll captures a namespace's connections from now on: outbound to the proxy's
port 15001, inbound to 15006. The proxy is whoever runs as --proxy-uid or
--proxy-gid; its own traffic is left alone. Without a proxy that listens,
connections are refused: nothing passes unseen.

Annotations are Istio's:
  traffic.sidecar.istio.io/includeOutboundIPRanges   "*", or CIDRs
  traffic.sidecar.istio.io/excludeOutboundIPRanges   CIDRs; wins over includes
  traffic.sidecar.istio.io/excludeOutboundPorts      ports
  traffic.sidecar.istio.io/includeInboundPorts       "*", or ports
  traffic.sidecar.istio.io/excludeInboundPorts       ports; without effect beside an include list

Enrolling a namespace again changes its rules and repairs what is missing; open
connections are left alone.`,
		Example: `  sluicectl enroll --netns web
  sluicectl enroll --netns /proc/4711/ns/net --pod shop/cart-0 \
    --annotation traffic.sidecar.istio.io/excludeOutboundPorts=3306,6379`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.enroll(cmd, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.netns, "netns", "", "network namespace: a name of \"ip netns list\", or a path")
	fl.StringVar(&f.pod, "pod", "", "NAMESPACE/NAME to show in tables")
	fl.StringArrayVar(&f.annotations, "annotation", nil, "KEY=VALUE; may be repeated")
	fl.StringSliceVar(&f.uids, "proxy-uid", nil, "UID of the proxy (default 1337); may be repeated")
	fl.StringSliceVar(&f.gids, "proxy-gid", nil, "GID of the proxy (default 1337); may be repeated")
	fl.StringVar(&f.inbound, "inbound", string(datapath.InboundSKLookup), "how inbound is captured: sk_lookup, or tc for proxies that listen with MPTCP")
	fl.StringVar(&f.tc, "tc", string(datapath.TCAuto), "how TC programs are attached: clsact (fast), tcx (a link that nobody else can remove; takes the kernel some 20 ms), or auto (tcx where TCP sockets are open already)")
	fl.BoolVar(&f.noGuard, "no-guard", false, "leave out the TC program that stops SYNs nobody has judged (raw sockets, for example)")
	fl.BoolVar(&f.dns, "dns", false, "capture port 53, UDP and TCP, to the DNS proxy on 127.0.0.1 and ::1")
	fl.Uint16Var(&f.dnsPort, "dns-port", rules.DefaultDNSPort, "port of the DNS proxy")
	cobra.CheckErr(cmd.MarkFlagRequired("netns"))
	return cmd
}

func (c *common) enroll(cmd *cobra.Command, f enrollFlags) error {
	pod, err := f.parse()
	if err != nil {
		return err
	}
	if err := needRoot(); err != nil {
		return err
	}
	ns, err := netns.Open(f.netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	d, err := c.open()
	if err != nil {
		return err
	}
	defer d.Close()
	done, err := d.Enroll(ns, pod)
	if err != nil {
		return err
	}
	what := "is enrolled"
	if done.Already {
		what = "was enrolled already and is now as asked"
	}
	cmd.Printf("%s %s (cookie %d, inbound by %s).\n", f.netns, what, done.Cookie, done.Inbound)
	if done.Listeners > 0 {
		cmd.Printf("  The proxy was running: %d of its listeners are known.\n", done.Listeners)
	} else if !done.Already {
		cmd.Printf("  The proxy does not listen yet (UID %v, GID %v): until it does, connections are refused.\n", pod.Rules.ProxyUIDs, pod.Rules.ProxyGIDs)
	}
	if done.Before > 0 {
		cmd.Printf("  %d connections were being opened before: they go on unredirected.\n", done.Before)
	}
	for _, note := range done.Notes {
		cmd.PrintErrln("sluicectl: warning: " + note)
	}
	return nil
}

// parse judges every value before anything is touched.
func (f enrollFlags) parse() (datapath.Pod, error) {
	pod := datapath.Pod{NoGuard: f.noGuard}
	var err error
	if pod.Inbound, err = datapath.ParseInbound(f.inbound); err != nil {
		return pod, fmt.Errorf("--inbound: %w", err)
	}
	if pod.TC, err = datapath.ParseTCAttach(f.tc); err != nil {
		return pod, fmt.Errorf("--tc: %w", err)
	}
	if f.pod != "" {
		namespace, name, ok := strings.Cut(f.pod, "/")
		if !ok || namespace == "" || name == "" || strings.Contains(name, "/") || len(namespace) > 63 || len(name) > 253 {
			return pod, fmt.Errorf("--pod: %q is not NAMESPACE/NAME, such as shop/cart-0", f.pod)
		}
		pod.Namespace, pod.Name = namespace, name
	}
	base := rules.Default()
	if base.ProxyUIDs, err = parseIDs(f.uids, base.ProxyUIDs); err != nil {
		return pod, fmt.Errorf("--proxy-uid: %w", err)
	}
	if base.ProxyGIDs, err = parseIDs(f.gids, base.ProxyGIDs); err != nil {
		return pod, fmt.Errorf("--proxy-gid: %w", err)
	}
	base.DNS, base.DNSPort = f.dns, f.dnsPort
	annotations := map[string]string{}
	for _, text := range f.annotations {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return pod, fmt.Errorf("--annotation: %q is not KEY=VALUE", text)
		}
		if !strings.Contains(key, "/") {
			return pod, fmt.Errorf("--annotation: %q is not a full annotation name, such as traffic.sidecar.istio.io/excludeOutboundPorts", key)
		}
		if _, twice := annotations[key]; twice {
			return pod, fmt.Errorf("--annotation: %s is given twice", key)
		}
		annotations[key] = value
	}
	if pod.Rules, err = mesh.Apply(base, annotations); err != nil {
		return pod, err
	}
	_, err = pod.Rules.Normalise()
	return pod, err
}

func parseIDs(texts []string, fallback []uint32) ([]uint32, error) {
	if len(texts) == 0 {
		return fallback, nil
	}
	var out []uint32
	for _, text := range texts {
		id, err := rules.ParseID(text)
		if err != nil {
			return nil, err
		}
		out = append(out, id)
	}
	return out, nil
}

func newUnenroll(c *common) *cobra.Command {
	var name string
	var cookie uint64
	cmd := &cobra.Command{
		Use:   "unenroll --netns PATH-OR-NAME",
		Short: "Leave a network namespace alone again",
		Long: `unenroll removes the namespace's programs and entries. New connections go
direct; captured ones that are open stay open. One that is not enrolled is no
error. A namespace that is gone is named by its --cookie ("sluicectl pods").`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (name == "") == (cookie == 0) {
				return errors.New("give either --netns or --cookie")
			}
			return c.unenroll(cmd, name, cookie)
		},
	}
	cmd.Flags().StringVar(&name, "netns", "", "network namespace: a name of \"ip netns list\", or a path")
	cmd.Flags().Uint64Var(&cookie, "cookie", 0, "cookie of a namespace that is gone")
	return cmd
}

func (c *common) unenroll(cmd *cobra.Command, name string, cookie uint64) error {
	if err := needRoot(); err != nil {
		return err
	}
	var ns *netns.NetNS
	if name != "" {
		var err error
		if ns, err = netns.Open(name); err != nil {
			return err
		}
		defer ns.Close()
		cookie = ns.Cookie()
	} else {
		name = fmt.Sprintf("cookie %d", cookie)
	}
	d, err := c.open()
	if err != nil {
		return err
	}
	defer d.Close()
	found, err := d.Unenroll(cookie, ns)
	if err != nil {
		return err
	}
	if !found {
		cmd.Printf("%s was not enrolled.\n", name)
		return nil
	}
	cmd.Printf("%s is not enrolled any more.\n", name)
	return nil
}
