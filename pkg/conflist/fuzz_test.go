package conflist

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

// seeds are the files of testdata.
func seeds(f *testing.F) {
	f.Helper()
	for _, pattern := range []string{"testdata/*.conf", "testdata/*.conflist", "testdata/*.golden"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("no %s: %v", pattern, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
}

// What a runtime accepts it accepts with the entry too, and removal restores it.
func FuzzInsert(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		out, err := Insert(in, testEntry())
		if err != nil {
			return
		}
		list, err := libcni.ConfListFromBytes(out)
		if err != nil {
			t.Fatalf("valid in, invalid out: %v\n%s\n%s", err, in, out)
		}
		ours := 0
		for _, p := range list.Plugins {
			if p.Network.Type == Type {
				ours++
			}
		}
		if ours != 1 {
			t.Fatalf("the entry stands there %d times:\n%s", ours, out)
		}
		if again, err := Insert(out, testEntry()); err != nil || !bytes.Equal(again, out) {
			t.Fatalf("not idempotent (%v):\n%s\n%s", err, out, again)
		}
		removed, err := Remove(out)
		if err != nil {
			t.Fatal(err)
		}
		if Contains(removed) {
			t.Fatalf("an entry is left:\n%s", removed)
		}
		if !Contains(in) && !bytes.Equal(removed, in) {
			t.Fatalf("not restored:\n%q\n%q", in, removed)
		}
	})
}

// The same for a single plugin's configuration.
func FuzzConvert(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		e := testEntry()
		e.Origin = &Origin{Conf: "10-x.conf"}
		out, err := Convert(in, e)
		if err != nil {
			return
		}
		if _, err := libcni.ConfListFromBytes(out); err != nil {
			t.Fatalf("valid in, invalid out: %v\n%s", err, out)
		}
		back, ok := Restore(out)
		if !ok || (!Contains(in) && !bytes.Equal(back, in)) {
			t.Fatalf("not restored (%v):\n%q\n%q", ok, in, back)
		}
	})
}
