package mesh

import "github.com/sluice-mesh/sluice/pkg/rules"

// Config holds what a mesh says of all its pods, where a pod says nothing.
type Config struct {
	// ExcludedNamespaces are those whose pods are never enrolled.
	ExcludedNamespaces []string `json:"excludedNamespaces"`

	Mode rules.Mode `json:"mode"` // of interception
	From rules.From `json:"from"` // since when outbound is captured
	DNS  bool       `json:"dns"`  // whether DNS is captured

	// ProxyUID and ProxyGID are the proxy's where its container does not say;
	// 0 means 1337.
	ProxyUID uint32 `json:"proxyUID"`
	ProxyGID uint32 `json:"proxyGID"`
}

// statusPort is where Istio's agent serves health and metrics.
const statusPort = 15020

// DefaultConfig returns the defaults of Istio's CNI plugin.
func DefaultConfig() Config {
	return Config{
		ExcludedNamespaces: []string{"kube-system"},
		Mode:               rules.Redirect,
		From:               rules.Always,
		ProxyUID:           rules.DefaultProxyID,
		ProxyGID:           rules.DefaultProxyID,
	}
}

// Rules returns the rules of a sidecar pod that says nothing itself. They are
// those of Istio's CNI plugin, which exempts outbound port 15020 too.
func (c Config) Rules() rules.Rules {
	r := rules.Default()
	r.Mode, r.From, r.DNS = c.Mode, c.From, c.DNS
	r.ExcludeOutboundPorts = []uint16{statusPort}
	if c.ProxyUID != 0 {
		r.ProxyUIDs = []uint32{c.ProxyUID}
	}
	if c.ProxyGID != 0 {
		r.ProxyGIDs = []uint32{c.ProxyGID}
	}
	return r
}
