package rules

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTranslateReplacesEveryID(t *testing.T) {
	// The machine's numbers of this pod stand in another order than the pod's.
	shift := func(kind string, by uint32) func(uint32) (uint32, error) {
		return func(id uint32) (uint32, error) {
			if id == 9 {
				return 0, fmt.Errorf("%s 9 is not mapped", kind)
			}
			if id > 5000 {
				return id - 5000, nil
			}
			return id + by, nil
		}
	}
	uid, gid := shift("UID", 100000), shift("GID", 200000)

	r := Default()
	r.ProxyUIDs, r.ProxyGIDs = []uint32{1337, 6000}, []uint32{7000, 1337}
	r.ExcludeOwnerGroups = []uint32{10, 8000}
	want := r
	want.ProxyUIDs, want.ProxyGIDs = []uint32{101337, 1000}, []uint32{2000, 201337} // their order means something
	want.ExcludeOwnerGroups = []uint32{3000, 200010}                                // theirs does not
	wantNormal, err := want.Normalise()
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Translate(uid, gid)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantNormal, got, comparePrefixes); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]uint32{1337, 6000}, r.ProxyUIDs); diff != "" {
		t.Error("the rules that were translated changed:", diff)
	}

	list := Default()
	list.OwnerGroups = Groups{List: []uint32{10, 8000}}
	if got, err := list.Translate(uid, gid); err != nil || !cmp.Equal(got.OwnerGroups.List, []uint32{3000, 200010}) {
		t.Errorf("the owner groups are %v, %v", got.OwnerGroups.List, err)
	}

	for name, change := range map[string]func(*Rules){
		"UID":         func(r *Rules) { r.ProxyUIDs = []uint32{1337, 9} },
		"GID":         func(r *Rules) { r.ProxyGIDs = []uint32{9} },
		"group":       func(r *Rules) { r.OwnerGroups = Groups{List: []uint32{9}} },
		"other group": func(r *Rules) { r.ExcludeOwnerGroups = []uint32{9} },
	} {
		r := Default()
		change(&r)
		if _, err := r.Translate(uid, gid); err == nil {
			t.Errorf("a %s that is not mapped is translated", name)
		}
	}
}

func TestParseFrom(t *testing.T) {
	for text, want := range map[string]From{"always": Always, "proxy-ready": ProxyReady, "": "", "Always": "", "ready": ""} {
		got, err := ParseFrom(text)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v", text, got, err)
		}
	}
}
