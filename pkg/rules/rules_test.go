package rules

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var comparePrefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func cidrs(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

func TestParsePorts(t *testing.T) {
	for _, tt := range []struct {
		text string
		star bool
		want Ports
		err  string
	}{
		{"", false, Ports{}, ""},
		{" ", true, Ports{}, ""},
		{"*", true, Ports{All: true}, ""},
		{"*", false, Ports{}, `"*" is not allowed here`},
		{"80", false, Ports{List: []uint16{80}}, ""},
		{"0,65535", false, Ports{List: []uint16{0, 65535}}, ""},
		{" 80 , 81 ", false, Ports{List: []uint16{80, 81}}, ""},
		{"65536", false, Ports{}, `"65536" is not a port`},
		{"-1", false, Ports{}, `"-1" is not a port`},
		{"+1", false, Ports{}, `"+1" is not a port`},
		{"80-90", false, Ports{}, `"80-90" is not a port`},
		{"80,", false, Ports{}, `"" is not a port`},
		{"80,*", true, Ports{}, `"*" is not a port`},
		{"0x50", false, Ports{}, `"0x50" is not a port`},
		{"http", false, Ports{}, `"http" is not a port`},
	} {
		got, err := ParsePorts(tt.text, tt.star)
		checkParsed(t, tt.text, got, tt.want, err, tt.err)
	}
}

func TestParseCIDRs(t *testing.T) {
	for _, tt := range []struct {
		text string
		star bool
		want CIDRs
		err  string
	}{
		{"", false, CIDRs{}, ""},
		{"*", true, CIDRs{All: true}, ""},
		{"*", false, CIDRs{}, `"*" is not allowed here`},
		{"10.0.0.0/8", false, CIDRs{List: cidrs("10.0.0.0/8")}, ""},
		{"10.0.0.0/8,2001:db8::/32", false, CIDRs{List: cidrs("10.0.0.0/8", "2001:db8::/32")}, ""},
		{"0.0.0.0/0,::/0", false, CIDRs{List: cidrs("0.0.0.0/0", "::/0")}, ""},
		{"10.0.0.1", false, CIDRs{}, `"10.0.0.1" is not an address range`},
		{"10.0.0.0/8, 11.0.0.0/8", false, CIDRs{}, `" 11.0.0.0/8" is not an address range`},
		{"10.0.0.0/33", false, CIDRs{}, `"10.0.0.0/33" is not an address range`},
		{"10.0.0/8", false, CIDRs{}, `"10.0.0/8" is not an address range`},
		{"::ffff:10.0.0.0/104", false, CIDRs{}, "is not an address range"},
		{"fe80::%eth0/64", false, CIDRs{}, "is not an address range"},
		{"10.0.0.0/8,", false, CIDRs{}, `"" is not an address range`},
		{"*,10.0.0.0/8", true, CIDRs{}, `"*" is not an address range`},
	} {
		got, err := ParseCIDRs(tt.text, tt.star)
		checkParsed(t, tt.text, got, tt.want, err, tt.err)
	}
}

func checkParsed[T any](t *testing.T, text string, got, want T, err error, wantErr string) {
	t.Helper()
	if wantErr != "" {
		if err == nil || !strings.Contains(err.Error(), wantErr) {
			t.Errorf("%q: error %v, want one with %q", text, err, wantErr)
		}
		return
	}
	if err != nil {
		t.Errorf("%q: %v", text, err)
	}
	if diff := cmp.Diff(want, got, comparePrefixes); diff != "" {
		t.Errorf("%q: %s", text, diff)
	}
}

func TestParseID(t *testing.T) {
	for text, want := range map[string]uint32{"0": 0, "1337": 1337, "4294967294": 1<<32 - 2} {
		if got, err := ParseID(text); err != nil || got != want {
			t.Errorf("%q is %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "-1", "4294967295", "4294967296", "1337 ", "root", "1e3"} {
		if got, err := ParseID(text); err == nil {
			t.Errorf("%q is %d, want an error", text, got)
		}
	}
}

func TestNormaliseMakesEqualRulesEqual(t *testing.T) {
	a, b := Default(), Default()
	a.ExcludeInboundPorts, b.ExcludeInboundPorts = []uint16{9090, 15021, 80}, []uint16{80, 9090, 80}
	a.ExcludeOutboundPorts, b.ExcludeOutboundPorts = []uint16{2, 1, 2}, []uint16{1, 2}
	a.ProxyUIDs, b.ProxyUIDs = []uint32{1337, 1338, 1337}, []uint32{1337, 1338}
	a.ExcludeOutboundCIDRs, b.ExcludeOutboundCIDRs = cidrs("10.1.2.3/8", "fd00::1/8"), cidrs("fd00::/8", "10.0.0.0/8", "10.0.0.0/8")
	a.IncludeOutboundCIDRs.List = cidrs("1.0.0.0/8") // without effect beside All
	a, errA := a.Normalise()
	b, errB := b.Normalise()
	if errA != nil || errB != nil {
		t.Fatal(errA, errB)
	}
	if diff := cmp.Diff(a, b, comparePrefixes, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
	if a.Digest() != b.Digest() {
		t.Error("their digests differ")
	}
	again, err := a.Normalise()
	if err != nil || again.Digest() != a.Digest() {
		t.Error("normalising again changes them:", err)
	}
	if diff := cmp.Diff([]uint16{80, 9090, 15020, 15021, 15090}, a.ExcludeInboundPorts); diff != "" {
		t.Error(diff)
	}
	b.OutboundPort++
	if a.Digest() == b.Digest() {
		t.Error("different rules have the same digest")
	}
}

func TestNormaliseKeepsTheOrderOfIDs(t *testing.T) {
	r := Default()
	r.ProxyUIDs = []uint32{2, 1, 2}
	r, err := r.Normalise()
	if diff := cmp.Diff([]uint32{2, 1}, r.ProxyUIDs); diff != "" || err != nil {
		t.Error(err, diff)
	}
}

func TestNormaliseIgnoresInboundExcludesBesideAList(t *testing.T) {
	r := Default()
	r.IncludeInboundPorts = Ports{List: []uint16{15020, 80}}
	r.ExcludeInboundPorts = []uint16{80}
	r, err := r.Normalise()
	if err != nil {
		t.Fatal(err)
	}
	c := r.Compile()
	if diff := cmp.Diff(map[uint16]Verdict{80: Capture, 15020: Capture}, c.InPorts); diff != "" || c.InDefaultCapture {
		t.Error(c.InDefaultCapture, diff)
	}
}

func TestNormaliseRefuses(t *testing.T) {
	for name, change := range map[string]func(*Rules){
		"must be 1 to 65535": func(r *Rules) { r.OutboundPort = 0 },
		"must differ":        func(r *Rules) { r.InboundPort = r.OutboundPort },
		"a UID or a GID":     func(r *Rules) { r.ProxyUIDs, r.ProxyGIDs = nil, nil },
	} {
		r := Default()
		change(&r)
		if _, err := r.Normalise(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v, want one with %q", err, name)
		}
	}
}

func FuzzParsePorts(f *testing.F) {
	for _, seed := range []string{"", "*", "80", "80,443", " 1 , 2", "0,65535", "65536", "80-90", ",", "\x00", "٣"} {
		f.Add(seed, true)
		f.Add(seed, false)
	}
	f.Fuzz(func(t *testing.T, text string, star bool) {
		got, err := ParsePorts(text, star)
		if err != nil {
			if len(got.List) != 0 || got.All {
				t.Error("an error comes with ports")
			}
			return
		}
		if got.All && (!star || len(got.List) != 0) {
			t.Errorf("%q is %+v", text, got)
		}
		if n := strings.Count(text, ",") + 1; len(got.List) != n && len(got.List) != 0 {
			t.Errorf("%q has %d items and gives %v", text, n, got.List)
		}
	})
}

func FuzzParseCIDRs(f *testing.F) {
	for _, seed := range []string{"", "*", "10.0.0.0/8", "10.0.0.1/8,::/0", "::ffff:1.2.3.4/96", "fe80::1%lo/64", "1.2.3.4", "/", "10.0.0.0/08"} {
		f.Add(seed, true)
		f.Add(seed, false)
	}
	f.Fuzz(func(t *testing.T, text string, star bool) {
		got, err := ParseCIDRs(text, star)
		if err != nil {
			return
		}
		for _, p := range got.List {
			if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
				t.Errorf("%q gives %v", text, p)
			}
		}
		// What it prints of them is read as the same.
		var texts []string
		for _, p := range got.List {
			texts = append(texts, p.String())
		}
		if again, err := ParseCIDRs(strings.Join(texts, ","), false); err != nil || !cmp.Equal(again.List, got.List, comparePrefixes) {
			t.Errorf("%q is read as %v, then as %v, %v", text, got.List, again.List, err)
		}
	})
}

func FuzzParseID(f *testing.F) {
	for _, seed := range []string{"0", "1337", "4294967294", "4294967295", "-1", "", "1_000"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if id, err := ParseID(text); err == nil && (id == 1<<32-1 || strings.Trim(text, "0123456789") != "") {
			t.Errorf("%q is %d", text, id)
		}
	})
}
