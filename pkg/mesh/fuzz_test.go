package mesh

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

// FuzzJudge judges whatever decodes as a pod: twice the same, by name where it
// is refused, and never with a decision that means two things.
func FuzzJudge(f *testing.F) {
	files, err := filepath.Glob("testdata/pods/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		text, err = yaml.YAMLToJSON(text)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var pod Pod
		if json.Unmarshal(text, &pod) != nil {
			return
		}
		got, err := Judge(pod, DefaultConfig())
		again, errAgain := Judge(pod, DefaultConfig())
		if diff := cmp.Diff(got, again, comparePrefixes); diff != "" || (err == nil) != (errAgain == nil) || err != nil && err.Error() != errAgain.Error() {
			t.Fatalf("two judgements differ: %v, %v\n%s", err, errAgain, diff)
		}
		if err != nil {
			if !strings.HasPrefix(err.Error(), "pod "+pod.fullName()+": ") {
				t.Errorf("%q does not name %q", err, pod.fullName())
			}
			if diff := cmp.Diff(Decision{}, got, comparePrefixes); diff != "" {
				t.Error("a decision comes with an error:", diff)
			}
			return
		}
		checkDecision(t, got)
	})
}

// checkDecision wants a reason and nothing else, or rules that are in order.
func checkDecision(t *testing.T, got Decision) {
	t.Helper()
	if got.Skip != "" {
		if diff := cmp.Diff(Decision{Skip: got.Skip}, got, comparePrefixes); diff != "" {
			t.Error("rules come with a reason to skip:", diff)
		}
		return
	}
	again, err := got.Rules.Normalise()
	if err != nil || again.Digest() != got.Rules.Digest() {
		t.Errorf("the rules are not normalised: %v", err)
	}
}

func FuzzApply(f *testing.F) {
	for _, row := range applyRows {
		f.Add(row.key, row.value)
	}
	for _, row := range badRows {
		f.Add(row.key, row.value)
	}
	f.Fuzz(func(t *testing.T, key, value string) {
		got, err := Apply(rules.Default(), map[string]string{key: value})
		if err != nil {
			var bad *ValueError
			if !errors.As(err, &bad) {
				t.Errorf("%v is no ValueError", err)
			}
			return
		}
		checkDecision(t, got)
	})
}

// FuzzEnv gives the proxy one variable, by its container or by its annotation.
func FuzzEnv(f *testing.F) {
	for _, name := range variables {
		for _, value := range []string{"", "*", "true", "0", "1,2", "java", "127.0.0.0/8", "::1/128", "4294967295"} {
			f.Add(name, value)
		}
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		pod := injected()
		setEnv(name, value)(&pod)
		byEnv, errEnv := Judge(pod, DefaultConfig())
		byConfig, errConfig := decide(DefaultConfig().Rules(), nil, nil)
		if errConfig != nil {
			t.Fatal(errConfig)
		}
		metadata := environment{metadata: map[string]string{name: value}}
		if metadata.disabled() {
			byConfig = Decision{Skip: byEnv.Skip}
		} else if errConfig = metadata.apply(&byConfig); errConfig == nil {
			byConfig.Rules, errConfig = byConfig.Rules.Normalise()
		}
		if (errEnv == nil) != (errConfig == nil) {
			t.Fatalf("by env %v, by configuration %v", errEnv, errConfig)
		}
		if errEnv != nil {
			return
		}
		checkDecision(t, byEnv)
		if diff := cmp.Diff(byEnv.Rules, byConfig.Rules, comparePrefixes); diff != "" {
			t.Error(diff)
		}
	})
}

func FuzzParseProxyConfig(f *testing.F) {
	for _, seed := range []string{"", "{}", "interceptionMode: TPROXY", "proxyMetadata:\n  A: \"1\"\n  B: true\n", "proxyMetadata: {A: [1]}", "a: &a [*a]", "- x", "\t", "proxyMetadata: null", "1: 2"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseProxyConfig(text)
		again, errAgain := parseProxyConfig(text)
		if diff := cmp.Diff(got, again); diff != "" || (err == nil) != (errAgain == nil) {
			t.Errorf("%v, %v: %s", err, errAgain, diff)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%q is more than a line", err)
		}
	})
}

func FuzzParseGroups(f *testing.F) {
	for _, seed := range []string{"", "*", "1", "1,,2", "java", "1-5", "4294967295", " 1", "+1", "*,1"} {
		f.Add(seed, true)
		f.Add(seed, false)
	}
	f.Fuzz(func(t *testing.T, text string, star bool) {
		got, err := parseGroups(text, star)
		if (err != nil || got.All) && len(got.List) != 0 || got.All && (!star || text != "*") {
			t.Errorf("%q, %v is %+v, %v", text, star, got, err)
		}
		if err == nil && !got.All && (strings.Trim(text, "0123456789,") != "" || len(got.List) > maxGroups) {
			t.Errorf("%q is %+v", text, got)
		}
	})
}

func FuzzParseInterfaces(f *testing.F) {
	for _, seed := range []string{"", "eth0", "eth0,tap1", "eth0,", " eth0", "0eth", "abcdefghijklmnop", "a\nb", "ü"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseInterfaces(text)
		if err == nil && strings.Join(got, ",") != text || err != nil && got != nil {
			t.Errorf("%q is %q, %v", text, got, err)
		}
	})
}

func FuzzParseLoopback(f *testing.F) {
	for _, seed := range []string{"", "127.0.0.1/32", "127.0.0.0/8", "127.0.0.0/7", "::1/128", "::ffff:127.0.0.1/104", "127.0.0.1", "128.0.0.0/8", "127.0.0.1%lo/32"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseLoopback(text)
		if err != nil {
			return
		}
		r := rules.Default()
		r.Loopback = got
		if _, err := r.Normalise(); err != nil {
			t.Errorf("%q is accepted and then refused: %v", text, err)
		}
	})
}
