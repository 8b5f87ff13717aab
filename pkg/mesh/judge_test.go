package mesh

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// injected returns a pod as Istio's injector leaves it where a CNI plugin
// redirects.
func injected() Pod {
	return Pod{
		Metadata: Metadata{
			Namespace: "shop", Name: "cart-0", UID: "5f0f",
			Labels:      map[string]string{},
			Annotations: map[string]string{"sidecar.istio.io/status": "{}"},
		},
		Spec: Spec{
			InitContainers: []Container{{Name: "istio-validation", SecurityContext: runAs(1337, 1337)}},
			Containers: []Container{
				{Name: "cart"},
				{Name: "istio-proxy", Args: []string{"proxy", "sidecar", "--domain", "x"}, SecurityContext: runAs(1337, 1337)},
			},
		},
	}
}

func runAs(uid, gid int64) *SecurityContext {
	return &SecurityContext{RunAsUser: &uid, RunAsGroup: &gid}
}

func proxyOf(p *Pod) *Container { return &p.Spec.Containers[1] }

func setEnv(name, value string) func(*Pod) {
	return func(p *Pod) { proxyOf(p).Env = append(proxyOf(p).Env, EnvVar{Name: name, Value: value}) }
}

func annotate(key, value string) func(*Pod) {
	return func(p *Pod) { p.Metadata.Annotations[key] = value }
}

func both(changes ...func(*Pod)) func(*Pod) {
	return func(p *Pod) {
		for _, change := range changes {
			change(p)
		}
	}
}

func native(p *Pod) {
	proxy := *proxyOf(p)
	proxy.RestartPolicy = "Always"
	p.Spec.InitContainers = append(p.Spec.InitContainers, proxy)
	p.Spec.Containers = p.Spec.Containers[:1]
}

func TestJudgeSkips(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Pod)
		reason string // "" if it is enrolled
	}{
		{"an injected pod", func(*Pod) {}, ""},
		{"host network", func(p *Pod) { p.Spec.HostNetwork = true }, "it uses the network of its node (hostNetwork)"},
		{"an excluded namespace", func(p *Pod) { p.Metadata.Namespace = "kube-system" }, "namespace kube-system is excluded"},
		{"a namespace that sounds alike", func(p *Pod) { p.Metadata.Namespace = "kube-system-2" }, ""},
		{"istio-init", func(p *Pod) { p.Spec.InitContainers = append(p.Spec.InitContainers, Container{Name: "istio-init"}) }, "it has a container istio-init, which redirects by iptables: have the injector leave that out"},
		{"an ordinary container istio-init", func(p *Pod) { p.Spec.Containers = append(p.Spec.Containers, Container{Name: "istio-init"}) }, "it has a container istio-init, which redirects by iptables: have the injector leave that out"},
		{"DISABLE_ENVOY", setEnv("DISABLE_ENVOY", "1"), "DISABLE_ENVOY is set for its proxy: there is no Envoy to redirect to"},
		{"DISABLE_ENVOY in the configuration", annotate("proxy.istio.io/config", "proxyMetadata: {DISABLE_ENVOY: 'T'}"), "DISABLE_ENVOY is set for its proxy: there is no Envoy to redirect to"},
		{"DISABLE_ENVOY that is false", setEnv("DISABLE_ENVOY", "false"), ""},
		{"DISABLE_ENVOY that nobody can read", setEnv("DISABLE_ENVOY", "yes"), ""},
		{"the last DISABLE_ENVOY", both(setEnv("DISABLE_ENVOY", "true"), setEnv("DISABLE_ENVOY", "false")), ""},
		{"DISABLE_ENVOY of the app", func(p *Pod) { p.Spec.Containers[0].Env = []EnvVar{{Name: "DISABLE_ENVOY", Value: "true"}} }, ""},
		{"no proxy", func(p *Pod) { proxyOf(p).Name = "envoy" }, "it has no container istio-proxy"},
		{"no container", func(p *Pod) { p.Spec = Spec{} }, "it has no container istio-proxy"},
		{"a native sidecar", native, ""},
		{"a proxy that ends", func(p *Pod) { native(p); p.Spec.InitContainers[1].RestartPolicy = "" }, "its istio-proxy is an init container without restartPolicy Always, which ends before the others start"},
		{"a gateway", func(p *Pod) { proxyOf(p).Args[1] = "router" }, "its proxy is a router and no sidecar"},
		{"a waypoint", func(p *Pod) { proxyOf(p).Args[1] = "waypoint" }, "its proxy is a waypoint and no sidecar"},
		{"a proxy without arguments", func(p *Pod) { proxyOf(p).Args = nil }, ""},
		{"a proxy of another program", func(p *Pod) { proxyOf(p).Args = []string{"router", "proxy"} }, ""},
		{"label inject=false", func(p *Pod) { p.Metadata.Labels["sidecar.istio.io/inject"] = "false" }, "label sidecar.istio.io/inject is false"},
		{"annotation inject=false", annotate("sidecar.istio.io/inject", "F"), "annotation sidecar.istio.io/inject is F"},
		{"the label beats the annotation", both(annotate("sidecar.istio.io/inject", "false"), func(p *Pod) { p.Metadata.Labels["sidecar.istio.io/inject"] = "true" }), ""},
		{"the label beats it the other way", both(annotate("sidecar.istio.io/inject", "true"), func(p *Pod) { p.Metadata.Labels["sidecar.istio.io/inject"] = "false" }), "label sidecar.istio.io/inject is false"},
		{"a label that nobody can read beats it too", both(annotate("sidecar.istio.io/inject", "false"), func(p *Pod) { p.Metadata.Labels["sidecar.istio.io/inject"] = "" }), ""},
		{"inject that nobody can read", annotate("sidecar.istio.io/inject", "no"), ""},
		{"no status", func(p *Pod) { delete(p.Metadata.Annotations, "sidecar.istio.io/status") }, "it has no annotation sidecar.istio.io/status: the injector did not make it a sidecar pod"},
		{"an empty status", annotate("sidecar.istio.io/status", ""), ""},
		{"mode NONE", annotate("sidecar.istio.io/interceptionMode", "NONE"), "its interception mode is NONE: nothing is to be redirected"},
		{"a bad value of a pod that is skipped", both(annotate("sluice.dev/capture", "x"), func(p *Pod) { p.Spec.HostNetwork = true }), "it uses the network of its node (hostNetwork)"},
		{"a bad value beside mode NONE", both(annotate("sluice.dev/capture", "x"), annotate("sidecar.istio.io/interceptionMode", "NONE")), "its interception mode is NONE: nothing is to be redirected"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod := injected()
			tt.change(&pod)
			got, err := Judge(pod, DefaultConfig())
			if err != nil || got.Skip != tt.reason {
				t.Fatalf("skip is %q, %v; want %q", got.Skip, err, tt.reason)
			}
			want := Decision{Skip: tt.reason}
			if tt.reason == "" {
				want.Rules = normal(t, DefaultConfig().Rules(), nil)
			}
			if diff := cmp.Diff(want, got, comparePrefixes); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestJudgeReadsTheProxysEnvironment(t *testing.T) {
	groups := func(n int) string { return strings.TrimSuffix(strings.Repeat("7,", n), ",") }
	for _, tt := range []struct {
		name   string
		change func(*Pod)
		want   func(*rules.Rules)
		warns  string
	}{
		{"DNS capture", setEnv("ISTIO_META_DNS_CAPTURE", "true"), func(r *rules.Rules) { r.DNS = true }, ""},
		{"DNS capture by configuration", annotate("proxy.istio.io/config", "proxyMetadata: {ISTIO_META_DNS_CAPTURE: \"1\"}"), func(r *rules.Rules) { r.DNS = true }, ""},
		{"the container beats the configuration", both(setEnv("ISTIO_META_DNS_CAPTURE", "false"), annotate("proxy.istio.io/config", "proxyMetadata: {ISTIO_META_DNS_CAPTURE: \"true\"}")), nil, ""},
		{"DNS capture that nobody can read", setEnv("ISTIO_META_DNS_CAPTURE", "yes"), nil, `env of istio-proxy ISTIO_META_DNS_CAPTURE="yes" is neither true nor false: it counts as false`},
		{"DNS capture from elsewhere", func(p *Pod) {
			proxyOf(p).Env = []EnvVar{{Name: "ISTIO_META_DNS_CAPTURE", ValueFrom: &struct{}{}}}
		}, nil, `ISTIO_META_DNS_CAPTURE="" is neither true nor false`},
		{"the last DNS capture", both(setEnv("ISTIO_META_DNS_CAPTURE", "x"), setEnv("ISTIO_META_DNS_CAPTURE", "T")), func(r *rules.Rules) { r.DNS = true }, ""},
		{"dual stack", setEnv("ISTIO_DUAL_STACK", "true"), nil, ""},
		{"dual stack that nobody can read", setEnv("ISTIO_DUAL_STACK", "on"), nil, `ISTIO_DUAL_STACK="on" is neither true nor false`},
		{"INVALID_DROP", setEnv("INVALID_DROP", "true"), nil, ""},
		{"INVALID_DROP that nobody can read", annotate("proxy.istio.io/config", "proxyMetadata: {INVALID_DROP: some}"), nil, `proxyMetadata in annotation proxy.istio.io/config INVALID_DROP="some" is neither true nor false`},
		{"all groups", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", "*"), nil, ""},
		{"some groups", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", "202,101,"), func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: []uint32{101, 202}} }, ""},
		{"64 groups", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", groups(64)), func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: []uint32{7}} }, ""},
		{"no group", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", ""), func(r *rules.Rules) { r.OwnerGroups = rules.Groups{} }, `ISTIO_OUTBOUND_OWNER_GROUPS is empty: no outbound connection is captured`},
		{"excluded groups", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "5,0"), func(r *rules.Rules) { r.ExcludeOwnerGroups = []uint32{0, 5} }, ""},
		{"excluded groups beside a list", both(setEnv("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "5"), setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", "5")), func(r *rules.Rules) { r.OwnerGroups = rules.Groups{List: []uint32{5}} }, ""},
		{"the loopback range", setEnv("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.1.2.3/8"), func(r *rules.Rules) { r.Loopback = prefixes("127.0.0.0/8")[0] }, ""},
		{"a native sidecar's", both(setEnv("ISTIO_META_DNS_CAPTURE", "true"), native), func(r *rules.Rules) { r.DNS = true }, ""},
		{"the app's own", func(p *Pod) { p.Spec.Containers[0].Env = []EnvVar{{Name: "ISTIO_META_DNS_CAPTURE", Value: "true"}} }, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) { expect(t, tt.change, DefaultConfig(), tt.want, tt.warns) })
	}
}

// expect judges a changed pod and wants these rules, and one warning if any.
func expect(t *testing.T, change func(*Pod), config Config, want func(*rules.Rules), warns string) {
	t.Helper()
	pod := injected()
	change(&pod)
	got, err := Judge(pod, config)
	if err != nil || got.Skip != "" {
		t.Fatal(got.Skip, err)
	}
	if diff := cmp.Diff(normal(t, DefaultConfig().Rules(), want), got.Rules, comparePrefixes); diff != "" {
		t.Error(diff)
	}
	if n := len(got.Warnings); n > 1 || n == 0 != (warns == "") || n == 1 && !strings.Contains(got.Warnings[0], warns) {
		t.Errorf("it warns %q, want one with %q", got.Warnings, warns)
	}
}

func TestJudgeFindsTheProxysIdentity(t *testing.T) {
	ids := func(uid, gid uint32) func(*rules.Rules) {
		return func(r *rules.Rules) { r.ProxyUIDs, r.ProxyGIDs = []uint32{uid}, []uint32{gid} }
	}
	tproxy := annotate("sidecar.istio.io/interceptionMode", "TPROXY")
	for _, tt := range []struct {
		name   string
		change func(*Pod)
		want   func(*rules.Rules)
		warns  string
	}{
		{"as injected", func(*Pod) {}, nil, ""},
		{"nobody says", func(p *Pod) { proxyOf(p).SecurityContext = nil }, nil, ""},
		{"its own", func(p *Pod) { proxyOf(p).SecurityContext = runAs(2000, 3000) }, ids(2000, 3000), ""},
		{"its own UID alone", func(p *Pod) { proxyOf(p).SecurityContext = &SecurityContext{RunAsUser: runAs(2000, 0).RunAsUser} }, ids(2000, 1337), ""},
		{"the highest", func(p *Pod) { proxyOf(p).SecurityContext = runAs(1<<32-2, 1<<32-2) }, ids(1<<32-2, 1<<32-2), ""},
		{"root with its group, for TPROXY", both(tproxy, func(p *Pod) { proxyOf(p).SecurityContext = runAs(0, 1337) }), func(r *rules.Rules) { r.Mode = rules.TProxy }, ""},
		{"root", func(p *Pod) { proxyOf(p).SecurityContext = runAs(0, 0) }, nil, "istio-proxy runs as UID 0, and the proxy is whoever runs as UID 1337 or GID 1337"},
		{"the pod's, which Istio does not look at", func(p *Pod) { p.Spec.SecurityContext = runAs(1000, 1000); proxyOf(p).SecurityContext = nil }, nil, "istio-proxy runs as UID 1000, and the proxy is"},
		{"the pod's, beside its own", func(p *Pod) { p.Spec.SecurityContext = runAs(1000, 1000) }, nil, ""},
		{"an app as the proxy", func(p *Pod) { p.Spec.Containers[0].SecurityContext = runAs(1337, 0) }, nil, "container cart runs as UID 1337, which is the proxy's: its connections are not captured"},
		{"an app in the proxy's group", func(p *Pod) { p.Spec.SecurityContext = &SecurityContext{RunAsGroup: runAs(0, 1337).RunAsGroup} }, nil, "container cart runs as GID 1337, which is the proxy's"},
	} {
		t.Run(tt.name, func(t *testing.T) { expect(t, tt.change, DefaultConfig(), tt.want, tt.warns) })
	}
}

func TestJudgeTakesTheMeshsDefaults(t *testing.T) {
	config := Config{ExcludedNamespaces: nil, Mode: rules.TProxy, From: rules.ProxyReady, DNS: true, ProxyUID: 5, ProxyGID: 6}
	meshs := func(r *rules.Rules) {
		r.Mode, r.From, r.DNS, r.ProxyUIDs, r.ProxyGIDs = rules.TProxy, rules.ProxyReady, true, []uint32{5}, []uint32{6}
	}
	unsaid := func(p *Pod) { proxyOf(p).SecurityContext = nil }
	for _, tt := range []struct {
		name   string
		config Config
		change func(*Pod)
		want   func(*rules.Rules)
		warns  string
	}{
		{"the pod says nothing", config, unsaid, meshs, ""},
		{"nothing is excluded", config, both(unsaid, func(p *Pod) { p.Metadata.Namespace = "kube-system" }), meshs, ""},
		{"the pod says the contrary", config, both(annotate("sidecar.istio.io/interceptionMode", "REDIRECT"), annotate("sluice.dev/capture", "always"), setEnv("ISTIO_META_DNS_CAPTURE", "false")), nil, ""},
		{"the pod says nonsense", config, both(unsaid, setEnv("ISTIO_META_DNS_CAPTURE", "")), both2(meshs, func(r *rules.Rules) { r.DNS = false }), "neither true nor false"},
		{"no ID is 1337", Config{Mode: rules.Redirect, From: rules.Always}, unsaid, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) { expect(t, tt.change, tt.config, tt.want, tt.warns) })
	}
}

func both2(changes ...func(*rules.Rules)) func(*rules.Rules) {
	return func(r *rules.Rules) {
		for _, change := range changes {
			change(r)
		}
	}
}

func TestJudgeRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Pod)
		says   string
	}{
		{"65 groups", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", strings.Repeat("1,", 65)), "these are 65 groups: give at most 64"},
		{"65 excluded groups", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", strings.Repeat("1,", 65)), "these are 65 groups: give at most 64"},
		{"a named group", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", "101,java"), `env of istio-proxy ISTIO_OUTBOUND_OWNER_GROUPS="101,java": "java" is not a GID: give numbers from 0 to 4294967294`},
		{"a range of groups", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "1-5"), `"1-5" is not a GID`},
		{"all groups and one", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS", "*,1"), `"*" is not a GID`},
		{"all groups excluded", setEnv("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "*"), `"*" is not a GID`},
		{"groups from elsewhere", func(p *Pod) {
			proxyOf(p).Env = []EnvVar{{Name: "ISTIO_OUTBOUND_OWNER_GROUPS", ValueFrom: &struct{}{}}}
		}, "its value comes from elsewhere (valueFrom): write it as a value"},
		{"a loopback range that is none", setEnv("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "10.0.0.0/8"), "give one such as 127.0.0.1/32"},
		{"too much loopback", setEnv("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.0/7"), "give one such as 127.0.0.1/32"},
		{"loopback of IPv6", setEnv("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "::1/128"), "give one such as 127.0.0.1/32"},
		{"a mapped loopback", setEnv("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "::ffff:127.0.0.1/128"), "give one such as 127.0.0.1/32"},
		{"a loopback address", setEnv("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1"), "give one such as 127.0.0.1/32"},
		{"a negative UID", func(p *Pod) { proxyOf(p).SecurityContext = runAs(-1, 1) }, `runAsUser of istio-proxy="-1": not an ID: give a number from 0 to 4294967294`},
		{"a GID too high", func(p *Pod) { proxyOf(p).SecurityContext = runAs(1, 1<<32-1) }, `runAsGroup of istio-proxy="4294967295": not an ID`},
	} {
		t.Run(tt.name, func(t *testing.T) { expectRefusal(t, tt.change, tt.says) })
	}
	for _, tt := range badRows {
		if strings.HasPrefix(tt.says, "unknown annotation") {
			continue // Istio starts such a pod
		}
		t.Run(tt.name, func(t *testing.T) { expectRefusal(t, annotate(tt.key, tt.value), tt.says) })
	}
}

func expectRefusal(t *testing.T, change func(*Pod), says string) {
	t.Helper()
	pod := injected()
	change(&pod)
	got, err := Judge(pod, DefaultConfig())
	if err == nil || !strings.HasPrefix(err.Error(), "pod shop/cart-0: ") || !strings.Contains(err.Error(), says) {
		t.Errorf("it says %v, want %q", err, says)
	}
	if diff := cmp.Diff(Decision{}, got, comparePrefixes); diff != "" {
		t.Error("a decision comes with the error:", diff)
	}
}

func TestJudgeRefusesAMeshWithoutMode(t *testing.T) {
	if _, err := Judge(injected(), Config{}); err == nil || !strings.Contains(err.Error(), "interception mode") {
		t.Error(err)
	}
}

func TestJudgeReadsAnnotationsAsApplyDoes(t *testing.T) {
	for _, tt := range applyRows {
		t.Run(tt.name, func(t *testing.T) { expect(t, annotate(tt.key, tt.value), DefaultConfig(), tt.want, "") })
	}
}

func TestJudgeWarnsOfTypingErrors(t *testing.T) {
	change := both(annotate("traffic.sidecar.istio.io/excludeOutboundPort", "80"), annotate("traffic.sidecar.istio.io/exclude", "80"), annotate("sluice.dev/capure", "always"))
	pod := injected()
	change(&pod)
	got, err := Judge(pod, DefaultConfig())
	if err != nil || len(got.Warnings) != 3 || got.Warnings[0] != "annotation sluice.dev/capure means nothing; known below sluice.dev/: capture" || !strings.HasPrefix(got.Warnings[1], "annotation traffic.sidecar.istio.io/exclude means nothing; known below traffic.sidecar.istio.io/: includeOutboundIPRanges,") {
		t.Errorf("%q, %v", got.Warnings, err)
	}
}

func TestJudgeLeavesThePodAlone(t *testing.T) {
	pod := injected()
	annotate("traffic.sidecar.istio.io/excludeOutboundPorts", "2,1")(&pod)
	before := fmt.Sprintf("%+v", pod)
	for range 2 {
		if _, err := Judge(pod, DefaultConfig()); err != nil {
			t.Fatal(err)
		}
	}
	if after := fmt.Sprintf("%+v", pod); after != before {
		t.Error("the pod has changed")
	}
}
