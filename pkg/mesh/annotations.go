package mesh

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// The annotations that Judge and Apply read. All but the last are Istio's.
const (
	trafficPrefix = "traffic.sidecar.istio.io/"
	ownPrefix     = "sluice.dev/"

	annotationMode        = "sidecar.istio.io/interceptionMode"
	annotationInject      = "sidecar.istio.io/inject" // or label
	annotationStatus      = "sidecar.istio.io/status"
	annotationStatusPort  = "status.sidecar.istio.io/port"
	annotationProxyConfig = "proxy.istio.io/config"
	annotationReroute     = "istio.io/reroute-virtual-interfaces"
	annotationKubevirt    = trafficPrefix + "kubevirtInterfaces" // the old name of the same

	// AnnotationCapture says since when a pod's outbound is captured: "always",
	// or "proxy-ready" for init containers that need a network.
	AnnotationCapture = ownPrefix + "capture"
)

// setting is an annotation that has the rules changed.
type setting struct {
	key   string
	apply func(r *rules.Rules, value string) error
}

// settings are applied in this order, which is also that of messages. The
// status port comes after the excludes that it is added to.
var settings = []setting{
	{trafficPrefix + "includeOutboundIPRanges", func(r *rules.Rules, value string) (err error) {
		r.IncludeOutboundCIDRs, err = rules.ParseCIDRs(value, true)
		return err
	}},
	{trafficPrefix + "excludeOutboundIPRanges", func(r *rules.Rules, value string) error {
		ranges, err := rules.ParseCIDRs(value, false)
		r.ExcludeOutboundCIDRs = ranges.List
		return err
	}},
	{trafficPrefix + "includeOutboundPorts", func(r *rules.Rules, value string) error {
		ports, err := rules.ParsePorts(value, false)
		r.IncludeOutboundPorts = ports.List
		return err
	}},
	{trafficPrefix + "excludeOutboundPorts", func(r *rules.Rules, value string) error {
		ports, err := rules.ParsePorts(value, false)
		r.ExcludeOutboundPorts = ports.List
		return err
	}},
	{trafficPrefix + "includeInboundPorts", func(r *rules.Rules, value string) (err error) {
		r.IncludeInboundPorts, err = rules.ParsePorts(value, true)
		return err
	}},
	{trafficPrefix + "excludeInboundPorts", func(r *rules.Rules, value string) error {
		ports, err := rules.ParsePorts(value, false)
		r.ExcludeInboundPorts = ports.List
		return err
	}},
	{annotationStatusPort, func(r *rules.Rules, value string) error {
		port, err := parsePort(value)
		if port != 0 {
			r.ExcludeInboundPorts = append(slices.Clone(r.ExcludeInboundPorts), port)
		}
		return err
	}},
	{trafficPrefix + "excludeInterfaces", func(r *rules.Rules, value string) (err error) {
		r.ExcludeInterfaces, err = parseInterfaces(value)
		return err
	}},
	{annotationReroute, func(r *rules.Rules, value string) (err error) {
		r.RerouteInterfaces, err = parseInterfaces(value)
		return err
	}},
	{annotationKubevirt, func(r *rules.Rules, value string) (err error) {
		r.RerouteInterfaces, err = parseInterfaces(value)
		return err
	}},
	{AnnotationCapture, func(r *rules.Rules, value string) (err error) {
		r.From, err = rules.ParseFrom(value)
		return err
	}},
}

// ValueError says which setting of a pod is wrong, and how.
type ValueError struct {
	Setting string // such as "annotation sidecar.istio.io/interceptionMode"
	Value   string
	Err     error
}

func (e *ValueError) Error() string {
	return fmt.Sprintf("%s=%q: %s", e.Setting, shorten(e.Value), cutMiddle(e.Err.Error()))
}

func (e *ValueError) Unwrap() error { return e.Err }

// shorten and cutMiddle keep messages readable, and inside what a Kubernetes
// Event holds. The remedy is at the end of a message.
func shorten(value string) string {
	const most = 120
	if len(value) <= most {
		return value
	}
	return strings.ToValidUTF8(value[:most], "") + "..."
}

func cutMiddle(text string) string {
	const head, tail = 120, 280
	if len(text) <= head+tail {
		return text
	}
	return shorten(text) + strings.ToValidUTF8(text[len(text)-tail:], "")
}

// Apply changes base as annotations say, for a pod that is known by nothing
// else. Annotations that have nothing to do with redirection are ignored; a bad
// value, or an annotation of traffic or of Sluice's own that does not exist, is a
// *ValueError.
func Apply(base rules.Rules, annotations map[string]string) (Decision, error) {
	if reason := notInjected(nil, annotations); reason != "" {
		return Decision{Skip: reason}, nil
	}
	if keys := unknown(annotations); len(keys) > 0 {
		return Decision{}, &ValueError{"annotation " + keys[0], annotations[keys[0]], fmt.Errorf("unknown annotation; %s", known(keys[0]))}
	}
	return decide(base, annotations, nil)
}

// decide applies annotations and the proxy's environment to base.
func decide(base rules.Rules, annotations map[string]string, env map[string]EnvVar) (Decision, error) {
	out := Decision{Rules: base}
	config, err := readProxyConfig(annotations)
	if err != nil {
		return Decision{}, err
	}
	e := environment{env: env, metadata: config.ProxyMetadata}
	if e.disabled() {
		return Decision{Skip: "DISABLE_ENVOY is set for its proxy: there is no Envoy to redirect to"}, nil
	}
	none, err := applyMode(&out.Rules, annotations, config)
	if none || err != nil {
		return Decision{Skip: noneReason(none)}, err
	}
	if err := applyAnnotations(&out.Rules, annotations); err != nil {
		return Decision{}, err
	}
	if err := e.apply(&out); err != nil {
		return Decision{}, err
	}
	if out.Rules, err = out.Rules.Normalise(); err != nil {
		return Decision{}, err
	}
	return out, nil
}

func noneReason(none bool) string {
	if !none {
		return ""
	}
	return "its interception mode is NONE: nothing is to be redirected"
}

func readProxyConfig(annotations map[string]string) (proxyConfig, error) {
	text, ok := annotations[annotationProxyConfig]
	if !ok {
		return proxyConfig{}, nil
	}
	config, err := parseProxyConfig(text)
	if err != nil {
		return proxyConfig{}, &ValueError{"annotation " + annotationProxyConfig, text, err}
	}
	return config, nil
}

// applyMode takes the mode from its annotation, or else from the proxy's
// configuration, which the injector would make that annotation of.
func applyMode(r *rules.Rules, annotations map[string]string, config proxyConfig) (none bool, err error) {
	where := "annotation " + annotationMode
	text, ok := annotations[annotationMode]
	if !ok {
		where = "interceptionMode in annotation " + annotationProxyConfig
		if text = config.InterceptionMode; text == "" {
			return false, nil
		}
	}
	mode, none, err := parseMode(text)
	if err != nil {
		return false, &ValueError{where, text, err}
	}
	if !none {
		r.Mode = mode
	}
	return none, nil
}

func applyAnnotations(r *rules.Rules, annotations map[string]string) error {
	_, renamed := annotations[annotationReroute]
	for _, s := range settings {
		value, ok := annotations[s.key]
		if !ok || renamed && s.key == annotationKubevirt {
			continue
		}
		if err := s.apply(r, value); err != nil {
			return &ValueError{"annotation " + s.key, value, err}
		}
	}
	for _, name := range r.ExcludeInterfaces {
		if slices.Contains(r.RerouteInterfaces, name) {
			return &ValueError{"annotation " + trafficPrefix + "excludeInterfaces", annotations[trafficPrefix+"excludeInterfaces"],
				errors.New(name + " is also rerouted: take it out of one of the two annotations")}
		}
	}
	return nil
}

// prefixOf is the prefix of a key if every annotation below it is about
// redirection, and else empty.
func prefixOf(key string) string {
	for _, prefix := range []string{trafficPrefix, ownPrefix} {
		if strings.HasPrefix(key, prefix) {
			return prefix
		}
	}
	return ""
}

// unknown returns annotations about redirection that do not exist, in order: most
// likely somebody meant one that does.
func unknown(annotations map[string]string) []string {
	var out []string
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		exists := slices.ContainsFunc(settings, func(s setting) bool { return s.key == key })
		if prefixOf(key) != "" && !exists {
			out = append(out, key)
		}
	}
	return out
}

// known says what there is where an unknown key was looked for.
func known(key string) string {
	prefix := prefixOf(key)
	var names []string
	for _, s := range settings {
		if name, ok := strings.CutPrefix(s.key, prefix); ok {
			names = append(names, name)
		}
	}
	return fmt.Sprintf("known below %s: %s", prefix, strings.Join(names, ", "))
}

// Reads says whether an annotation can change what Judge decides. Others need not
// be given to it.
func Reads(key string) bool {
	switch key {
	case annotationMode, annotationInject, annotationStatus, annotationStatusPort, annotationProxyConfig, annotationReroute:
		return true
	}
	return prefixOf(key) != ""
}
