package mesh

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// maxGroups is how many owner groups Istio takes.
const maxGroups = 64

// parseMode reads an interception mode. none is NONE, which is no mode of ours.
func parseMode(text string) (mode rules.Mode, none bool, err error) {
	switch text {
	case string(rules.Redirect), string(rules.TProxy):
		return rules.Mode(text), false, nil
	case "NONE":
		return "", true, nil
	}
	return "", false, errors.New("not an interception mode: give REDIRECT, TPROXY or NONE")
}

func parseFrom(text string) (rules.From, error) {
	switch text {
	case string(rules.Always), string(rules.ProxyReady):
		return rules.From(text), nil
	}
	return "", fmt.Errorf("this does not say since when to capture: give %s or %s", rules.Always, rules.ProxyReady)
}

// parsePort reads one port, of which 0 means none.
func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(strings.TrimSpace(text), 10, 16)
	if err != nil {
		return 0, errors.New("not a port: give one number from 0 to 65535 (0 for none)")
	}
	return uint16(port), nil
}

// parseInterfaces reads a comma-separated list of interface names, without
// spaces.
func parseInterfaces(text string) ([]string, error) {
	if text == "" {
		return nil, nil
	}
	names := strings.Split(text, ",")
	for _, name := range names {
		if err := rules.CheckInterface(name); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// parseGroups reads a comma-separated list of GIDs; "*" means all where star is
// true. Empty items are left out, as in Istio. Names are refused: iptables
// would look them up in the files of whatever container it runs in.
func parseGroups(text string, star bool) (rules.Groups, error) {
	if text == "*" && star {
		return rules.Groups{All: true}, nil
	}
	var out rules.Groups
	for item := range strings.SplitSeq(text, ",") {
		if item == "" {
			continue
		}
		gid, err := rules.ParseID(item)
		if err != nil {
			return rules.Groups{}, fmt.Errorf("%q is not a GID: give numbers from 0 to 4294967294, separated by commas; names mean another group in each image", item)
		}
		out.List = append(out.List, gid)
	}
	if n := len(out.List); n > maxGroups {
		return rules.Groups{}, fmt.Errorf("these are %d groups: give at most %d", n, maxGroups)
	}
	return out, nil
}

// parseLoopback reads what counts as the loopback address of IPv4.
func parseLoopback(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if err != nil || !prefix.Addr().Is4() || !prefix.Addr().IsLoopback() || prefix.Bits() < 8 {
		return netip.Prefix{}, errors.New("not a range of IPv4 loopback addresses: give one such as 127.0.0.1/32, inside 127.0.0.0/8")
	}
	return prefix, nil
}

// proxyConfig is what the annotation proxy.istio.io/config says of redirection.
type proxyConfig struct {
	InterceptionMode string            `json:"interceptionMode"`
	ProxyMetadata    map[string]string `json:"proxyMetadata"`
}

func parseProxyConfig(text string) (proxyConfig, error) {
	var out proxyConfig
	if err := yaml.Unmarshal([]byte(text), &out); err != nil {
		return proxyConfig{}, fmt.Errorf("not a ProxyConfig in YAML, with strings in proxyMetadata: %s", oneLine(err.Error()))
	}
	// What is nobody's here goes: among keys such as 1 and "1", which are one
	// in JSON, the decoder takes any.
	maps.DeleteFunc(out.ProxyMetadata, func(name, _ string) bool { return !slices.Contains(variables, name) })
	return out, nil
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
