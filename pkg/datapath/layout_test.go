package datapath

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
)

func TestAnEntryIsConvertedByTheNamesOfItsFields(t *testing.T) {
	old := []field{{"a", 0, 4}, {"gone", 4, 2}, {"text", 6, 4}}
	entry := []byte{1, 2, 3, 4, 9, 9, 'a', 'b', 0, 0}
	for name, tt := range map[string]struct {
		to   []field
		want string // of the bytes; empty: an error
	}{
		"the same":                 {old, "\x01\x02\x03\x04\x09\x09ab\x00\x00"},
		"elsewhere, one left out":  {[]field{{"text", 0, 4}, {"a", 4, 4}}, "ab\x00\x00\x01\x02\x03\x04\x00\x00"},
		"a new one is zero":        {[]field{{"new", 0, 4}, {"a", 4, 4}}, "\x00\x00\x00\x00\x01\x02\x03\x04\x00\x00"},
		"a number grows":           {[]field{{"a", 0, 8}}, "\x01\x02\x03\x04\x00\x00\x00\x00\x00\x00"},
		"a text shrinks as it may": {[]field{{"text", 0, 2}}, "ab\x00\x00\x00\x00\x00\x00\x00\x00"},
		"a text would be cut":      {[]field{{"text", 0, 1}}, ""},
		"a number would be cut":    {[]field{{"a", 0, 2}}, ""},
	} {
		got, err := convert(entry, old, tt.to, len(entry))
		if tt.want == "" {
			if err == nil {
				t.Errorf("%s: no error, and %q", name, got)
			}
		} else if err != nil || string(got) != tt.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, tt.want)
		}
	}
}

func testSpecs(t *testing.T) map[string]*ebpf.MapSpec {
	t.Helper()
	d := &Datapath{}
	d.opts.complete()
	specs, err := d.mapSpecs()
	if err != nil {
		t.Fatal(err)
	}
	return specs
}

func TestFieldsOfStructsInStructsAreNamedInFull(t *testing.T) {
	s, err := shapeOf(testSpecs(t)["pods"])
	if err != nil {
		t.Fatal(err)
	}
	want := []field{
		{"addr4.b", 0, 16}, {"addr6.b", 16, 16}, {"rules_id", 32, 4}, {"flags", 36, 4}, {"out_port", 40, 2}, {"in_port", 42, 2},
		{"dns_port", 44, 2}, {"way_back", 46, 2}, {"loopback_net", 48, 4}, {"loopback_mask", 52, 4},
	}
	if diff := cmp.Diff(want, s.value, cmp.AllowUnexported(field{})); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]field{{"", 0, 8}}, s.key, cmp.AllowUnexported(field{})); diff != "" {
		t.Error(diff)
	}
}

// A field that takes the place of padding changes no size, and the layout all the
// same.
func TestTheDigestOfALayoutIsThatOfItsFields(t *testing.T) {
	before, err := digestOf(testSpecs(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(map[string]*ebpf.MapSpec){
		"a field has another name": func(s map[string]*ebpf.MapSpec) {
			s["pods"].Value.(*btf.Struct).Members[2].Name = "else"
		},
		"two have changed places": func(s map[string]*ebpf.MapSpec) {
			m := s["pods"].Value.(*btf.Struct).Members
			m[2].Name, m[3].Name = m[3].Name, m[2].Name
		},
		"a value is larger": func(s map[string]*ebpf.MapSpec) { s["stats"].ValueSize = 16 },
		"a map is not there": func(s map[string]*ebpf.MapSpec) {
			delete(s, "targets")
		},
	} {
		specs := testSpecs(t)
		change(specs)
		after, err := digestOf(specs)
		if err != nil || after == before {
			t.Errorf("%s: %s, as before, %v", name, after, err)
		}
	}
	specs := testSpecs(t)
	specs["handshakes"].MaxEntries = 7
	if after, err := digestOf(specs); err != nil || after != before {
		t.Errorf("another size makes another layout: %s, %v", after, err)
	}
}

// Every map is of one kind or the other. Who adds one has to choose: does a
// program write it?
func TestSharedMapsAreThoseThatProgramsWrite(t *testing.T) {
	specs := testSpecs(t)
	names := slices.Sorted(maps.Keys(specs))
	for _, name := range sharedMaps {
		if specs[name] == nil {
			t.Errorf("there is no map %s, only %s", name, strings.Join(names, " "))
		}
	}
	copied := []string{
		"attachments", "cidr_rules4", "cidr_rules6", "interface_names", "interfaces", "own_addrs", "pod_names", "pods",
		"port_rules", "proxy_ids", "reroutes", "routes4", "routes6", "rule_sets",
	}
	got := slices.DeleteFunc(names, isShared)
	if diff := cmp.Diff(copied, got); diff != "" {
		t.Error("a map is neither in sharedMaps nor here:", diff)
	}
}
