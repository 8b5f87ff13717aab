package mesh

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

func TestApplyReadsIstiosAnnotations(t *testing.T) {
	got, err := Apply(rules.Default(), map[string]string{
		"traffic.sidecar.istio.io/includeOutboundIPRanges": "10.0.0.0/8",
		"traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.1.0.0/16,fd00::/8",
		"traffic.sidecar.istio.io/includeInboundPorts":     "80,81",
		"traffic.sidecar.istio.io/excludeInboundPorts":     "82",
		"traffic.sidecar.istio.io/excludeOutboundPorts":    "3306",
		"sidecar.istio.io/interceptionMode":                "REDIRECT",
		"kubernetes.io/psp":                                "not ours",
		"traffic.sidecar.istio.io/excludeInterfaces":       "",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := rules.Default()
	want.IncludeOutboundCIDRs = rules.CIDRs{List: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	want.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")}
	want.IncludeInboundPorts = rules.Ports{List: []uint16{80, 81}}
	want.ExcludeInboundPorts = []uint16{82}
	want.ExcludeOutboundPorts = []uint16{3306}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestApplyTellsEmptyFromAbsent(t *testing.T) {
	got, err := Apply(rules.Default(), map[string]string{
		"traffic.sidecar.istio.io/includeOutboundIPRanges": "",
		"traffic.sidecar.istio.io/includeInboundPorts":     "",
	})
	if err != nil || got.IncludeOutboundCIDRs.All || got.IncludeInboundPorts.All {
		t.Errorf("empty lists include everything: %+v, %v", got, err)
	}
	got, err = Apply(rules.Default(), nil)
	if err != nil || !got.IncludeOutboundCIDRs.All || !got.IncludeInboundPorts.All {
		t.Errorf("absent ones do not: %+v, %v", got, err)
	}
}

func TestApplyRefusesWithTheAnnotationsName(t *testing.T) {
	for key, value := range map[string]string{
		"traffic.sidecar.istio.io/includeOutboundIPRanges": "10.0.0.1",
		"traffic.sidecar.istio.io/excludeOutboundIPRanges": "*",
		"traffic.sidecar.istio.io/includeInboundPorts":     "http",
		"traffic.sidecar.istio.io/excludeInboundPorts":     "*",
		"traffic.sidecar.istio.io/excludeOutboundPorts":    "65536",
		"traffic.sidecar.istio.io/excludeOutboundPort":     "80",
		"traffic.sidecar.istio.io/includeOutboundPorts":    "80",
		"traffic.sidecar.istio.io/excludeInterfaces":       "1eth",
		"traffic.sidecar.istio.io/kubevirtInterfaces":      "tap0",
		"istio.io/reroute-virtual-interfaces":              "tap0",
		"sidecar.istio.io/interceptionMode":                "TPROXY",
	} {
		got, err := Apply(rules.Default(), map[string]string{key: value})
		var bad *AnnotationError
		if !errors.As(err, &bad) || bad.Key != key || bad.Value != value || !strings.Contains(err.Error(), key) {
			t.Errorf("%s=%s: %v", key, value, err)
		}
		if len(got.ProxyUIDs) != 0 {
			t.Errorf("%s=%s: rules come with the error", key, value)
		}
	}
}

func TestApplyLeavesItsBaseAlone(t *testing.T) {
	base := rules.Default()
	base.ExcludeOutboundPorts = []uint16{1}
	if _, err := Apply(base, map[string]string{"traffic.sidecar.istio.io/excludeOutboundPorts": "2"}); err != nil {
		t.Fatal(err)
	}
	if base.ExcludeOutboundPorts[0] != 1 {
		t.Error("the base has changed")
	}
}

func FuzzApply(f *testing.F) {
	f.Add("traffic.sidecar.istio.io/excludeOutboundPorts", "80,443")
	f.Add("traffic.sidecar.istio.io/includeOutboundIPRanges", "*")
	f.Add("traffic.sidecar.istio.io/", "")
	f.Fuzz(func(t *testing.T, key, value string) {
		got, err := Apply(rules.Default(), map[string]string{key: value})
		if err != nil {
			var bad *AnnotationError
			if !errors.As(err, &bad) {
				t.Errorf("%v is no AnnotationError", err)
			}
			return
		}
		if _, err := got.Normalise(); err != nil {
			t.Errorf("%s=%q is accepted and then refused: %v", key, value, err)
		}
	})
}
