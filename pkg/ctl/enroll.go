package ctl

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/mesh"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

type enrollFlags struct {
	netns, pod  string
	manifest    string
	annotations []string
	uids, gids  []string
	inbound, tc string
	capture     string
	captureSet  bool
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

The rules are Istio's annotations, for example
  traffic.sidecar.istio.io/includeOutboundIPRanges   "*", or CIDRs
  traffic.sidecar.istio.io/excludeOutboundIPRanges   CIDRs; wins over includes
  traffic.sidecar.istio.io/excludeOutboundPorts      ports
  traffic.sidecar.istio.io/includeInboundPorts       "*", or ports
  traffic.sidecar.istio.io/excludeInboundPorts       ports; without effect beside an include list
  traffic.sidecar.istio.io/excludeInterfaces         names; nothing is captured in or out through these
all of which are in docs/rules.md. --manifest takes them, the proxy's identity
and the pod's names from a pod's YAML or JSON, as the injector leaves it, and
enrols it if it has a sidecar.

Enrolling a namespace again changes its rules and repairs what is missing; open
connections are left alone. Addresses, routes and interfaces that change later
are seen by "sluicectl watch", or once by "sluicectl refresh".`,
		Example: `  sluicectl enroll --netns web
  sluicectl enroll --netns /proc/4711/ns/net --pod shop/cart-0 \
    --annotation traffic.sidecar.istio.io/excludeOutboundPorts=3306,6379
  kubectl get pod -n shop cart-0 -o yaml | sluicectl enroll --netns web --manifest -`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.enroll(cmd, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.netns, "netns", "", "network namespace: a name of \"ip netns list\", or a path")
	fl.StringVar(&f.pod, "pod", "", "NAMESPACE/NAME to show in tables")
	fl.StringArrayVar(&f.annotations, "annotation", nil, "KEY=VALUE; may be repeated")
	fl.StringSliceVar(&f.uids, "proxy-uid", nil, "UID of the proxy (default 1337); may be repeated")
	fl.StringSliceVar(&f.gids, "proxy-gid", nil, "GID of the proxy (default 1337); may be repeated")
	fl.StringVar(&f.manifest, "manifest", "", "file with the pod's YAML or JSON (- is stdin), in place of --pod, --annotation, --proxy-uid, --proxy-gid, --capture, --dns and --dns-port")
	fl.StringVar(&f.inbound, "inbound", string(datapath.InboundSKLookup), "how inbound is captured: sk_lookup, or tc for proxies that listen with MPTCP")
	fl.StringVar(&f.tc, "tc", string(datapath.TCAuto), "how TC programs are attached: clsact (fast), tcx (a link that nobody else can remove; takes the kernel some 20 ms), or auto (tcx where TCP sockets are open already)")
	fl.StringVar(&f.capture, "capture", string(rules.Always), "since when outbound is captured: always, or proxy-ready (direct until the proxy listens, for init containers)")
	fl.BoolVar(&f.noGuard, "no-guard", false, "leave out the TC program that stops SYNs nobody has judged (raw sockets, for example)")
	fl.BoolVar(&f.dns, "dns", false, "capture port 53, UDP and TCP, to the DNS proxy on 127.0.0.1 and ::1")
	fl.Uint16Var(&f.dnsPort, "dns-port", rules.DefaultDNSPort, "port of the DNS proxy, beside --dns")
	return cmd
}

func (c *common) enroll(cmd *cobra.Command, f enrollFlags) error {
	if err := checkFlags(cmd.Flags()); err != nil {
		return err
	}
	f.captureSet = cmd.Flags().Changed("capture")
	pod, decision, err := f.parse(cmd.InOrStdin())
	if err != nil {
		return err
	}
	for _, warning := range decision.Warnings {
		cmd.PrintErrln("sluicectl: warning: " + warning)
	}
	if decision.Skip != "" {
		cmd.Printf("Nothing was enrolled: %s.\n", decision.Skip)
		if c.isEnrolled(f.netns) {
			cmd.PrintErrf("sluicectl: warning: %s stays enrolled with the rules it had; %s leaves it alone\n", f.netns, c.hint("unenroll --netns "+shellWord(f.netns)))
		}
		return nil
	}
	if err := c.mayChange("what is enrolled here follows the pods' annotations: change those"); err != nil {
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
	} else if !done.Already && pod.Rules.From == rules.ProxyReady {
		cmd.Printf("  The proxy does not listen yet (%s): until it does, outbound connections go direct and inbound ones are refused.\n", proxyText(pod.Rules))
	} else if pod.Rules.From != rules.ProxyReady {
		cmd.Printf("  The proxy does not listen yet (%s): until it does, connections are refused.\n", proxyText(pod.Rules))
	}
	if done.UserNS {
		cmd.Printf("  It has a user namespace of its own: %s shows its IDs as the machine's.\n", c.hint("rules"))
	}
	if done.Before > 0 {
		cmd.Printf("  %d connections were being opened before: they go on unredirected.\n", done.Before)
	}
	for _, note := range done.Notes {
		cmd.PrintErrln("sluicectl: warning: " + note)
	}
	return nil
}

// isEnrolled is false also where that cannot be told: nothing is up, or the
// caller is not root.
func (c *common) isEnrolled(name string) bool {
	ns, err := netns.Open(name)
	if err != nil {
		return false
	}
	defer ns.Close()
	d, err := c.open()
	if err != nil {
		return false
	}
	defer d.Close()
	cookies, err := d.Cookies()
	return err == nil && slices.Contains(cookies, ns.Cookie())
}

// proxyText says who the proxy is, such as "UID 1337, GID 1337".
func proxyText(r rules.Rules) string {
	var texts []string
	for _, id := range r.ProxyUIDs {
		texts = append(texts, fmt.Sprintf("UID %d", id))
	}
	for _, id := range r.ProxyGIDs {
		texts = append(texts, fmt.Sprintf("GID %d", id))
	}
	return strings.Join(texts, ", ")
}

// parse judges every value before anything is touched.
func (f enrollFlags) parse(stdin io.Reader) (datapath.Pod, mesh.Decision, error) {
	pod := datapath.Pod{NoGuard: f.noGuard}
	var decision mesh.Decision
	var err error
	if pod.Inbound, err = datapath.ParseInbound(f.inbound); err != nil {
		return pod, decision, fmt.Errorf("--inbound: %w", err)
	}
	if pod.TC, err = datapath.ParseTCAttach(f.tc); err != nil {
		return pod, decision, fmt.Errorf("--tc: %w", err)
	}
	if f.manifest != "" {
		decision, err = f.fromManifest(&pod, stdin)
	} else {
		decision, err = f.fromFlags(&pod)
	}
	if err != nil || decision.Skip != "" {
		return pod, decision, err
	}
	pod.Rules = decision.Rules
	return pod, decision, nil
}

func (f enrollFlags) fromFlags(pod *datapath.Pod) (mesh.Decision, error) {
	var none mesh.Decision
	if f.pod != "" {
		namespace, name, ok := strings.Cut(f.pod, "/")
		if !ok || strings.Contains(name, "/") {
			return none, fmt.Errorf("--pod: %q is not NAMESPACE/NAME, such as shop/cart-0", f.pod)
		}
		if err := checkPodName(namespace, name); err != nil {
			return none, fmt.Errorf("--pod: %w", err)
		}
		pod.Namespace, pod.Name = namespace, name
	}
	base := rules.Default()
	var err error
	if base.ProxyUIDs, err = parseIDs(f.uids, base.ProxyUIDs); err != nil {
		return none, fmt.Errorf("--proxy-uid: %w", err)
	}
	if base.ProxyGIDs, err = parseIDs(f.gids, base.ProxyGIDs); err != nil {
		return none, fmt.Errorf("--proxy-gid: %w", err)
	}
	if base.From, err = rules.ParseFrom(f.capture); err != nil {
		return none, fmt.Errorf("--capture: %w", err)
	}
	base.DNS, base.DNSPort = f.dns, f.dnsPort
	annotations := map[string]string{}
	for _, text := range f.annotations {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return none, fmt.Errorf("--annotation: %q is not KEY=VALUE", text)
		}
		if !strings.Contains(key, "/") {
			return none, fmt.Errorf("--annotation: %q is not a full annotation name, such as traffic.sidecar.istio.io/excludeOutboundPorts", key)
		}
		if _, twice := annotations[key]; twice {
			return none, fmt.Errorf("--annotation: %s is given twice", key)
		}
		annotations[key] = value
	}
	if value, both := annotations[mesh.AnnotationCapture]; both && f.captureSet && value != f.capture {
		return none, fmt.Errorf("--capture %s and annotation %s=%s contradict each other: leave one of them out", f.capture, mesh.AnnotationCapture, value)
	}
	return mesh.Apply(base, annotations)
}

const label = `[a-z0-9]([-a-z0-9]*[a-z0-9])?`

// What Kubernetes takes for names (RFC 1123): a namespace is a label, a pod's name
// is labels with dots. The map holds no longer ones.
var (
	oneLabel  = regexp.MustCompile("^" + label + "$")
	subdomain = regexp.MustCompile("^" + label + `(\.` + label + ")*$")
)

// checkPodName refuses what Kubernetes would not call a pod.
func checkPodName(namespace, name string) error {
	for _, n := range []struct {
		what, text, of string
		form           *regexp.Regexp
		most           int
	}{
		{"namespace", namespace, `small letters, digits and "-"`, oneLabel, 63},
		{"pod name", name, `small letters, digits, "-" and "."`, subdomain, 253},
	} {
		switch {
		case n.text == "":
			return fmt.Errorf("the %s is missing", n.what)
		case len(n.text) > n.most:
			return fmt.Errorf("the %s is too long: it has %d characters, and Kubernetes takes at most %d", n.what, len(n.text), n.most)
		case !n.form.MatchString(n.text):
			return fmt.Errorf("%q is no %s: Kubernetes takes %s, with a letter or digit at both ends", n.text, n.what, n.of)
		}
	}
	return nil
}

func parseIDs(texts []string, fallback []uint32) ([]uint32, error) {
	if texts == nil {
		return fallback, nil
	}
	if len(texts) == 0 { // an unset variable of a script
		return nil, errors.New("it is empty: give a number from 0 to 4294967294, or leave the flag out for 1337")
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
		Args: noArgs,
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
	if err := c.mayChange("a pod stays redirected as long as it lives: delete it, or take the whole node down with " + c.hint("down --now")); err != nil {
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
