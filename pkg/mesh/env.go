package mesh

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
)

// The variables of the proxy that change redirection.
const (
	envDisableEnvoy  = "DISABLE_ENVOY"
	envDNS           = "ISTIO_META_DNS_CAPTURE"
	envDualStack     = "ISTIO_DUAL_STACK"
	envInvalidDrop   = "INVALID_DROP"
	envGroups        = "ISTIO_OUTBOUND_OWNER_GROUPS"
	envGroupsExclude = "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"
	envLoopback      = "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR"
)

// variables are all of them.
var variables = []string{envDisableEnvoy, envDNS, envDualStack, envInvalidDrop, envGroups, envGroupsExclude, envLoopback}

// ReadsVariable says whether a variable of the proxy can change what Judge decides.
func ReadsVariable(name string) bool { return slices.Contains(variables, name) }

// environment is that of the proxy: its container's, and what the injector
// would have put there from the annotation proxy.istio.io/config. The container
// wins, because it is what the proxy runs with.
type environment struct {
	env      map[string]EnvVar
	metadata map[string]string
}

func newEnvironment(c Container) map[string]EnvVar {
	out := make(map[string]EnvVar, len(c.Env))
	for _, v := range c.Env { // the last of a name wins, as in the container
		out[v.Name] = v
	}
	return out
}

// variable is one that is set, and where.
type variable struct {
	where, value string
	from         bool // its value is known to the kubelet alone
}

func (e environment) lookup(name string) (variable, bool) {
	if v, ok := e.env[name]; ok {
		return variable{"env of " + ProxyContainer + " " + name, v.Value, v.ValueFrom != nil}, true
	}
	if value, ok := e.metadata[name]; ok {
		return variable{"proxyMetadata in annotation " + annotationProxyConfig + " " + name, value, false}, true
	}
	return variable{}, false
}

// disabled is true only where DISABLE_ENVOY can be read as such.
func (e environment) disabled() bool {
	v, _ := e.lookup(envDisableEnvoy)
	yes, err := strconv.ParseBool(v.value)
	return err == nil && yes
}

// flag reads a variable that is true or false. What is neither counts as false,
// with a warning, as in Istio.
func (e environment) flag(name string, warnings *[]string) (value, set bool) {
	v, ok := e.lookup(name)
	if !ok {
		return false, false
	}
	value, err := strconv.ParseBool(v.value)
	if err != nil {
		*warnings = append(*warnings, fmt.Sprintf("%s=%q is neither true nor false: it counts as false", v.where, shorten(v.value)))
	}
	return value, true
}

// list gives a variable to parse. Nobody can guess a list.
func (e environment) list(name string, parse func(text string) error) error {
	v, ok := e.lookup(name)
	if !ok {
		return nil
	}
	if v.from {
		return &ValueError{v.where, "", errors.New("its value comes from elsewhere (valueFrom): write it as a value")}
	}
	if err := parse(v.value); err != nil {
		return &ValueError{v.where, v.value, err}
	}
	return nil
}

func (e environment) apply(out *Decision) error {
	r := &out.Rules
	if dns, set := e.flag(envDNS, &out.Warnings); set {
		r.DNS = dns
	}
	// Both families are always captured, and there is no conntrack whose
	// INVALID packets could be dropped: only a mistake is worth a word.
	e.flag(envDualStack, &out.Warnings)
	e.flag(envInvalidDrop, &out.Warnings)
	lists := []struct {
		name  string
		parse func(text string) error
	}{
		{envGroups, func(text string) (err error) {
			r.OwnerGroups, err = parseGroups(text, true)
			return err
		}},
		{envGroupsExclude, func(text string) error {
			groups, err := parseGroups(text, false)
			r.ExcludeOwnerGroups = groups.List
			return err
		}},
		{envLoopback, func(text string) (err error) {
			r.Loopback, err = parseLoopback(text)
			return err
		}},
	}
	for _, l := range lists {
		if err := e.list(l.name, l.parse); err != nil {
			return err
		}
	}
	if !r.OwnerGroups.All && len(r.OwnerGroups.List) == 0 {
		out.Warnings = append(out.Warnings, envGroups+` is empty: no outbound connection is captured; "*" captures those of all groups`)
	}
	return nil
}
