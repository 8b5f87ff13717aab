// Package mesh turns what a mesh says about a pod into rules. It is pure: no
// kernel, no API server.
package mesh

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// The traffic annotations of Istio's sidecar that this version reads.
const (
	annotationPrefix     = "traffic.sidecar.istio.io/"
	includeOutboundCIDRs = annotationPrefix + "includeOutboundIPRanges"
	excludeOutboundCIDRs = annotationPrefix + "excludeOutboundIPRanges"
	includeInboundPorts  = annotationPrefix + "includeInboundPorts"
	excludeInboundPorts  = annotationPrefix + "excludeInboundPorts"
	excludeOutboundPorts = annotationPrefix + "excludeOutboundPorts"
	excludeInterfaces    = annotationPrefix + "excludeInterfaces"
)

// refused are annotations that change the redirection in ways that this version
// cannot reproduce. Ignoring one would let traffic escape or break.
var refused = []string{
	annotationPrefix + "includeOutboundPorts",
	annotationPrefix + "kubevirtInterfaces",
	"istio.io/reroute-virtual-interfaces",
}

// AnnotationError says which annotation is wrong, and how.
type AnnotationError struct {
	Key, Value string
	Err        error
}

func (e *AnnotationError) Error() string {
	return fmt.Sprintf("annotation %s=%q: %v", e.Key, e.Value, e.Err)
}

func (e *AnnotationError) Unwrap() error { return e.Err }

// Apply returns base changed as the annotations say. Annotations that have
// nothing to do with redirection are ignored; a bad value is an
// *AnnotationError.
func Apply(base rules.Rules, annotations map[string]string) (rules.Rules, error) {
	out := base
	for _, key := range refused {
		if value := annotations[key]; value != "" {
			return rules.Rules{}, &AnnotationError{key, value, fmt.Errorf("not supported yet: remove it")}
		}
	}
	if mode, ok := annotations["sidecar.istio.io/interceptionMode"]; ok && mode != "REDIRECT" {
		return rules.Rules{}, &AnnotationError{"sidecar.istio.io/interceptionMode", mode, fmt.Errorf("only REDIRECT is supported yet")}
	}
	for key, value := range annotations {
		if err := applyOne(&out, key, value); err != nil {
			return rules.Rules{}, &AnnotationError{key, value, err}
		}
	}
	return out, nil
}

func applyOne(out *rules.Rules, key, value string) error {
	var err error
	var ports rules.Ports
	var cidrs rules.CIDRs
	switch key {
	case includeOutboundCIDRs:
		out.IncludeOutboundCIDRs, err = rules.ParseCIDRs(value, true)
	case excludeOutboundCIDRs:
		cidrs, err = rules.ParseCIDRs(value, false)
		out.ExcludeOutboundCIDRs = cidrs.List
	case includeInboundPorts:
		out.IncludeInboundPorts, err = rules.ParsePorts(value, true)
	case excludeInboundPorts:
		ports, err = rules.ParsePorts(value, false)
		out.ExcludeInboundPorts = ports.List
	case excludeOutboundPorts:
		ports, err = rules.ParsePorts(value, false)
		out.ExcludeOutboundPorts = ports.List
	case excludeInterfaces:
		out.ExcludeInterfaces, err = rules.ParseInterfaces(value)
	default:
		if strings.HasPrefix(key, annotationPrefix) && !slices.Contains(refused, key) {
			return fmt.Errorf("unknown traffic annotation: known are includeOutboundIPRanges, excludeOutboundIPRanges, includeInboundPorts, excludeInboundPorts, excludeOutboundPorts and excludeInterfaces")
		}
	}
	return err
}
