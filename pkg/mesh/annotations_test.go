package mesh

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

var comparePrefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

// normal returns the default rules with a change, in the form that Apply and
// Judge return them.
func normal(t *testing.T, base rules.Rules, change func(*rules.Rules)) rules.Rules {
	t.Helper()
	if change != nil {
		change(&base)
	}
	out, err := base.Normalise()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// applyRows are the values that annotations may have, and what they mean.
var applyRows = []struct {
	name, key, value string
	want             func(*rules.Rules)
}{
	{"all ranges", "traffic.sidecar.istio.io/includeOutboundIPRanges", "*", nil},
	{"no range", "traffic.sidecar.istio.io/includeOutboundIPRanges", "", func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{} }},
	{"some ranges", "traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/8,fd00::/8", func(r *rules.Rules) { r.IncludeOutboundCIDRs = rules.CIDRs{List: prefixes("10.0.0.0/8", "fd00::/8")} }},
	{"excluded ranges", "traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.1.2.3/16", func(r *rules.Rules) { r.ExcludeOutboundCIDRs = prefixes("10.1.0.0/16") }},
	{"no excluded range", "traffic.sidecar.istio.io/excludeOutboundIPRanges", "", nil},
	{"excluded outbound ports", "traffic.sidecar.istio.io/excludeOutboundPorts", " 6379, 3306 ", func(r *rules.Rules) { r.ExcludeOutboundPorts = []uint16{3306, 6379} }},
	{"included outbound ports", "traffic.sidecar.istio.io/includeOutboundPorts", "8443,0,65535", func(r *rules.Rules) { r.IncludeOutboundPorts = []uint16{0, 8443, 65535} }},
	{"no included outbound port", "traffic.sidecar.istio.io/includeOutboundPorts", "", nil},
	{"all inbound ports", "traffic.sidecar.istio.io/includeInboundPorts", "*", nil},
	{"no inbound port", "traffic.sidecar.istio.io/includeInboundPorts", "", func(r *rules.Rules) { r.IncludeInboundPorts = rules.Ports{} }},
	{"some inbound ports", "traffic.sidecar.istio.io/includeInboundPorts", "81,80", func(r *rules.Rules) { r.IncludeInboundPorts = rules.Ports{List: []uint16{80, 81}} }},
	{"excluded inbound ports", "traffic.sidecar.istio.io/excludeInboundPorts", "9000", func(r *rules.Rules) { r.ExcludeInboundPorts = []uint16{9000, 15020, 15021, 15090} }},
	{"no excluded inbound port", "traffic.sidecar.istio.io/excludeInboundPorts", "", func(r *rules.Rules) { r.ExcludeInboundPorts = []uint16{15020, 15021, 15090} }},
	{"status port", "status.sidecar.istio.io/port", "15099", func(r *rules.Rules) { r.ExcludeInboundPorts = []uint16{15099} }},
	{"no status port", "status.sidecar.istio.io/port", "0", nil},
	{"excluded interfaces", "traffic.sidecar.istio.io/excludeInterfaces", "net1,eth1.5", func(r *rules.Rules) { r.ExcludeInterfaces = []string{"eth1.5", "net1"} }},
	{"no excluded interface", "traffic.sidecar.istio.io/excludeInterfaces", "", nil},
	{"rerouted interfaces", "istio.io/reroute-virtual-interfaces", "k6t-net0", func(r *rules.Rules) { r.RerouteInterfaces = []string{"k6t-net0"} }},
	{"rerouted interfaces by their old name", "traffic.sidecar.istio.io/kubevirtInterfaces", "tap0,tap1", func(r *rules.Rules) { r.RerouteInterfaces = []string{"tap0", "tap1"} }},
	{"REDIRECT", "sidecar.istio.io/interceptionMode", "REDIRECT", nil},
	{"TPROXY", "sidecar.istio.io/interceptionMode", "TPROXY", func(r *rules.Rules) { r.Mode = rules.TProxy }},
	{"TPROXY in the proxy's configuration", "proxy.istio.io/config", "interceptionMode: TPROXY\nconcurrency: 2", func(r *rules.Rules) { r.Mode = rules.TProxy }},
	{"an empty configuration", "proxy.istio.io/config", "", nil},
	{"a configuration in JSON", "proxy.istio.io/config", `{"proxyMetadata":{"ISTIO_META_DNS_CAPTURE":"true"}}`, func(r *rules.Rules) { r.DNS = true }},
	{"a bare true", "proxy.istio.io/config", "proxyMetadata:\n  ISTIO_META_DNS_CAPTURE: true\n", func(r *rules.Rules) { r.DNS = true }},
	{"groups", "proxy.istio.io/config", "proxyMetadata: {ISTIO_OUTBOUND_OWNER_GROUPS: \"202,,101\"}", func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: []uint32{101, 202}} }},
	{"capture always", "sluice.dev/capture", "always", nil},
	{"capture when the proxy is ready", "sluice.dev/capture", "proxy-ready", func(r *rules.Rules) { r.From = rules.ProxyReady }},
	{"somebody else's", "kubernetes.io/psp", "traffic", nil},
	{"the injector's", "sidecar.istio.io/status", "{}", nil},
}

func TestApplyReadsEachAnnotation(t *testing.T) {
	for _, tt := range applyRows {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Apply(rules.Default(), map[string]string{tt.key: tt.value})
			if err != nil || got.Skip != "" || len(got.Warnings) != 0 {
				t.Fatalf("%v, %+v", err, got)
			}
			if diff := cmp.Diff(normal(t, rules.Default(), tt.want), got.Rules, comparePrefixes); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// badRows are values that mean nothing, and what is said to that.
var badRows = []struct{ name, key, value, says string }{
	{"an address for a range", "traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.1", "write it as 10.0.0.0/8"},
	{"a space", "traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/8, 11.0.0.0/8", "without spaces"},
	{"all but", "traffic.sidecar.istio.io/excludeOutboundIPRanges", "*", `"*" is not allowed here`},
	{"a named port", "traffic.sidecar.istio.io/includeInboundPorts", "http", "give numbers from 0 to 65535"},
	{"a range of ports", "traffic.sidecar.istio.io/includeInboundPorts", "80-90", "no ranges"},
	{"all inbound excluded", "traffic.sidecar.istio.io/excludeInboundPorts", "*", `"*" is not allowed here`},
	{"all outbound excluded", "traffic.sidecar.istio.io/excludeOutboundPorts", "*", `"*" is not allowed here`},
	{"all outbound included", "traffic.sidecar.istio.io/includeOutboundPorts", "*", `"*" is not allowed here`},
	{"a port too high", "traffic.sidecar.istio.io/includeOutboundPorts", "65536", "give numbers from 0 to 65535"},
	{"a port too few", "traffic.sidecar.istio.io/excludeOutboundPorts", "80,", `"" is not a port`},
	{"two status ports", "status.sidecar.istio.io/port", "1,2", "give one number from 0 to 65535"},
	{"an empty status port", "status.sidecar.istio.io/port", "", "give one number"},
	{"an interface too long", "traffic.sidecar.istio.io/excludeInterfaces", "abcdefghijklmnop", "at most 15"},
	{"an interface with a space", "traffic.sidecar.istio.io/excludeInterfaces", "eth0, eth1", `" eth1" is not the name of an interface`},
	{"an interface without a name", "istio.io/reroute-virtual-interfaces", "tap0,", `"" is not the name of an interface`},
	{"an old interface", "traffic.sidecar.istio.io/kubevirtInterfaces", "0tap", "of which the first is a letter"},
	{"a mode in small letters", "sidecar.istio.io/interceptionMode", "redirect", "give REDIRECT, TPROXY or NONE"},
	{"an empty mode", "sidecar.istio.io/interceptionMode", "", "give REDIRECT, TPROXY or NONE"},
	{"another time of capture", "sluice.dev/capture", "never", "choose always or proxy-ready"},
	{"no YAML", "proxy.istio.io/config", "{", "not a ProxyConfig in YAML"},
	{"a list", "proxy.istio.io/config", "[a]", "not a ProxyConfig in YAML"},
	{"metadata that is none", "proxy.istio.io/config", "proxyMetadata: {a: [b]}", "with strings in proxyMetadata"},
	{"a configured mode", "proxy.istio.io/config", "interceptionMode: SOME", "give REDIRECT, TPROXY or NONE"},
	{"a named group", "proxy.istio.io/config", "proxyMetadata: {ISTIO_OUTBOUND_OWNER_GROUPS: java}", "names mean another group in each image"},
	{"an unknown one", "traffic.sidecar.istio.io/excludeOutboundPort", "80", "unknown annotation; known below traffic.sidecar.istio.io/: includeOutboundIPRanges,"},
	{"an unknown one of Sluice's", "sluice.dev/capure", "proxy-ready", "unknown annotation; known below sluice.dev/: capture"},
}

func TestApplyRefusesWithTheAnnotationsName(t *testing.T) {
	for _, tt := range badRows {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Apply(rules.Default(), map[string]string{tt.key: tt.value})
			var bad *ValueError
			if !errors.As(err, &bad) {
				t.Fatalf("%v is no ValueError", err)
			}
			if !strings.Contains(err.Error(), tt.key) || !strings.Contains(err.Error(), bad.Value) || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("it says %q, want %q in it", err, tt.says)
			}
			if diff := cmp.Diff(Decision{}, got, comparePrefixes); diff != "" {
				t.Error("rules come with the error:", diff)
			}
		})
	}
}

func TestApplyAddsTheStatusPortToTheExcludes(t *testing.T) {
	got, err := Apply(rules.Default(), map[string]string{
		"traffic.sidecar.istio.io/excludeInboundPorts": "1",
		"status.sidecar.istio.io/port":                 "2",
	})
	if diff := cmp.Diff([]uint16{1, 2, 15020, 15021, 15090}, got.Rules.ExcludeInboundPorts); err != nil || diff != "" {
		t.Error(err, diff)
	}
}

func TestApplyPrefersTheNewNameOfReroute(t *testing.T) {
	for _, value := range []string{"tap0", ""} {
		got, err := Apply(rules.Default(), map[string]string{
			"istio.io/reroute-virtual-interfaces":         value,
			"traffic.sidecar.istio.io/kubevirtInterfaces": "not an interface",
		})
		if err != nil || strings.Join(got.Rules.RerouteInterfaces, ",") != value {
			t.Errorf("%q: %v, %v", value, got.Rules.RerouteInterfaces, err)
		}
	}
}

func TestApplyRefusesAnInterfaceThatIsBoth(t *testing.T) {
	_, err := Apply(rules.Default(), map[string]string{
		"traffic.sidecar.istio.io/excludeInterfaces": "net1,tap0",
		"istio.io/reroute-virtual-interfaces":        "tap0",
	})
	if err == nil || !strings.Contains(err.Error(), `excludeInterfaces="net1,tap0": tap0 is also rerouted`) {
		t.Error(err)
	}
}

func TestTheModesAnnotationBeatsTheConfiguration(t *testing.T) {
	got, err := Apply(rules.Default(), map[string]string{
		"sidecar.istio.io/interceptionMode": "REDIRECT",
		"proxy.istio.io/config":             "interceptionMode: NONE",
	})
	if err != nil || got.Skip != "" || got.Rules.Mode != rules.Redirect {
		t.Error(got, err)
	}
}

func TestModeNoneIsAReasonToSkip(t *testing.T) {
	for key, value := range map[string]string{
		"sidecar.istio.io/interceptionMode": "NONE",
		"proxy.istio.io/config":             "interceptionMode: NONE",
	} {
		got, err := Apply(rules.Default(), map[string]string{key: value})
		if err != nil || got.Skip != "its interception mode is NONE: nothing is to be redirected" {
			t.Errorf("%s: %+v, %v", key, got, err)
		}
	}
}

func TestApplySkipsWhatIsNotToBeInjected(t *testing.T) {
	for value, want := range map[string]string{
		"false": "annotation sidecar.istio.io/inject is false",
		"0":     "annotation sidecar.istio.io/inject is 0",
		"true":  "",
		"maybe": "",
	} {
		got, err := Apply(rules.Default(), map[string]string{"sidecar.istio.io/inject": value})
		if err != nil || got.Skip != want {
			t.Errorf("%s: %+v, %v", value, got, err)
		}
	}
}

func TestReadsWhatCanChangeADecision(t *testing.T) {
	for key, want := range map[string]bool{
		"sluice.dev/capture": true, "sluice.dev/capure": true, "traffic.sidecar.istio.io/x": true,
		"sidecar.istio.io/inject": true, "sidecar.istio.io/proxyCPU": false, "sluice.dev": false, "": false,
	} {
		if got := Reads(key); got != want {
			t.Errorf("%q: %t", key, got)
		}
	}
}

func TestApplyLeavesItsBaseAlone(t *testing.T) {
	base := rules.Default()
	base.ExcludeOutboundPorts = []uint16{1}
	base.ExcludeInboundPorts = make([]uint16, 1, 8)
	if _, err := Apply(base, map[string]string{
		"traffic.sidecar.istio.io/excludeOutboundPorts": "2",
		"status.sidecar.istio.io/port":                  "3",
	}); err != nil {
		t.Fatal(err)
	}
	if base.ExcludeOutboundPorts[0] != 1 || base.ExcludeInboundPorts[:2][1] != 0 {
		t.Error("the base has changed")
	}
}

func TestALongValueIsShortened(t *testing.T) {
	for key, says := range map[string]string{
		"sidecar.istio.io/interceptionMode":            "give REDIRECT, TPROXY or NONE",
		"traffic.sidecar.istio.io/excludeInboundPorts": "no ranges",
		"traffic.sidecar.istio.io/excludeInterfaces":   "of which the first is a letter",
	} {
		_, err := Apply(rules.Default(), map[string]string{key: strings.Repeat("ü", 10000)})
		if err == nil || len(err.Error()) > 800 || !strings.Contains(err.Error(), `ü..."`) || !strings.HasSuffix(err.Error(), says) {
			t.Error(err)
		}
	}
}

func TestAProxyConfigKeepsOnlyWhatCounts(t *testing.T) {
	got, err := parseProxyConfig("concurrency: 2\nproxyMetadata: {1: a, \"1\": b, ISTIO_DUAL_STACK: x}")
	want := proxyConfig{ProxyMetadata: map[string]string{"ISTIO_DUAL_STACK": "x"}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
}
