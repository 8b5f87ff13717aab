package rules

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// naive says what Istio's chain does with an address: excludes come first, then
// includes.
func naive(r Rules, a netip.Addr) bool {
	holds := func(p netip.Prefix) bool { return p.Contains(a) }
	if slices.ContainsFunc(r.ExcludeOutboundCIDRs, holds) {
		return false
	}
	return r.IncludeOutboundCIDRs.All || slices.ContainsFunc(r.IncludeOutboundCIDRs.List, holds)
}

// longest is what the kernel does with compiled rules: the longest prefix that
// holds the address decides.
func longest(c Compiled, a netip.Addr) bool {
	for bits := a.BitLen(); bits >= 0; bits-- {
		p, _ := a.Prefix(bits)
		if v, ok := c.CIDRs[p]; ok {
			return v == Capture
		}
	}
	return c.OutDefaultCapture
}

// randomAddr has few different bits, so that prefixes often nest.
func randomAddr(r *rand.Rand) netip.Addr {
	if r.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte{10, byte(r.IntN(3)), byte(r.IntN(3) << 6), byte(r.IntN(4))})
	}
	var b [16]byte
	b[0], b[3], b[8], b[15] = 0xfd, byte(r.IntN(3)), byte(r.IntN(3)<<6), byte(r.IntN(4))
	return netip.AddrFrom16(b)
}

func randomPrefixes(r *rand.Rand) []netip.Prefix {
	var out []netip.Prefix
	for range r.IntN(8) {
		a := randomAddr(r)
		p, _ := a.Prefix(r.IntN(a.BitLen() + 1))
		out = append(out, p)
	}
	return out
}

func TestCompiledRangesDecideAsIstiosChainDoes(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	captured := 0
	for range 3000 {
		r := Default()
		r.IncludeOutboundCIDRs = CIDRs{All: random.IntN(3) == 0, List: randomPrefixes(random)}
		r.ExcludeOutboundCIDRs = randomPrefixes(random)
		normal, err := r.Normalise()
		if err != nil {
			t.Fatal(err)
		}
		c := normal.Compile()
		for range 20 {
			a := randomAddr(random)
			want := naive(r, a)
			if got := longest(c, a); got != want {
				t.Fatalf("seed %d: %v is captured: %v, want %v\ninclude %+v\nexclude %v", seed, a, got, want, r.IncludeOutboundCIDRs, r.ExcludeOutboundCIDRs)
			}
			if want {
				captured++
			}
		}
	}
	if captured < 1000 || captured > 59000 {
		t.Errorf("%d of 60000 addresses are captured: these sets say little", captured)
	}
}

func TestCompileOfSeveralIDs(t *testing.T) {
	for _, tt := range []struct {
		name         string
		uids, gids   []uint32
		loopback     bool
		wantU, wantG map[uint32]Exemption
	}{
		{"UID and GID", []uint32{1}, []uint32{2}, false, map[uint32]Exemption{1: Exempt | Self}, map[uint32]Exemption{2: Exempt}},
		{"GID alone", nil, []uint32{2, 3}, false, map[uint32]Exemption{}, map[uint32]Exemption{2: Exempt | Self, 3: Exempt}},
		{"two UIDs", []uint32{5, 1}, []uint32{2}, false, map[uint32]Exemption{5: Exempt | Self, 1: Exempt}, map[uint32]Exemption{2: Exempt}},
		{"with a loopback range", []uint32{5, 1}, []uint32{2}, true, map[uint32]Exemption{5: Exempt | Self, 1: Exempt | Self}, map[uint32]Exemption{2: Exempt | Self}},
	} {
		r := Default()
		r.ProxyUIDs, r.ProxyGIDs = tt.uids, tt.gids
		if tt.loopback {
			r.IncludeOutboundCIDRs = CIDRs{List: cidrs("127.0.0.0/8")}
		}
		c := r.Compile()
		if diff := cmp.Diff(tt.wantU, c.UIDs); diff != "" {
			t.Errorf("%s: UIDs: %s", tt.name, diff)
		}
		if diff := cmp.Diff(tt.wantG, c.GIDs); diff != "" {
			t.Errorf("%s: GIDs: %s", tt.name, diff)
		}
	}
}

func TestWhichIncludedRangesAreLoopback(t *testing.T) {
	for text, want := range map[string]bool{
		"127.0.0.0/8": true, "127.0.0.1/32": true, "127.1.0.0/16": true, "126.0.0.0/7": false, "0.0.0.0/0": false,
		"::1/128": true, "::/0": false, "::/127": false, "10.0.0.0/8": false,
	} {
		r := Default()
		r.IncludeOutboundCIDRs = CIDRs{List: cidrs(text)}
		if got := r.Compile().LocalCapturable; got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

func TestCompileOfPorts(t *testing.T) {
	r := Default()
	r.ExcludeOutboundPorts = []uint16{0, 65535}
	normal, err := r.Normalise()
	if err != nil {
		t.Fatal(err)
	}
	c := normal.Compile()
	if diff := cmp.Diff(map[uint16]Verdict{0: Direct, 65535: Direct}, c.OutPorts); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[uint16]Verdict{15020: Direct, 15021: Direct, 15090: Direct}, c.InPorts); diff != "" || !c.InDefaultCapture {
		t.Error(c.InDefaultCapture, diff)
	}
}

func TestOfMachinesCompiledRangesTellTheIncludedAddresses(t *testing.T) {
	included := 0
	for seed := range uint64(1000) {
		random := rand.New(rand.NewPCG(seed, 7))
		r := Default()
		r.IncludeOutboundCIDRs = CIDRs{List: randomPrefixes(random)}
		r.ExcludeOutboundCIDRs = randomPrefixes(random)
		normal, err := r.Normalise()
		if err != nil {
			t.Fatal(err)
		}
		c := normal.Compile()
		for range 20 {
			a := randomAddr(random)
			want := slices.ContainsFunc(r.IncludeOutboundCIDRs.List, func(p netip.Prefix) bool { return p.Contains(a) })
			got := false
			for bits := a.BitLen(); bits >= 0; bits-- {
				p := netip.PrefixFrom(a, bits).Masked()
				if _, there := c.CIDRs[p]; there {
					got = c.Rerouted[p]
					break
				}
			}
			if got != want {
				t.Fatalf("seed %d: %v is rerouted: %v, want %v\ninclude %v\nexclude %v", seed, a, got, want, r.IncludeOutboundCIDRs.List, r.ExcludeOutboundCIDRs)
			}
			if want {
				included++
			}
		}
	}
	if included < 1000 || included > 19000 {
		t.Errorf("%d of 20000 addresses are included: these sets say little", included)
	}
}
