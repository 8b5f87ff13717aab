package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func testEntry() Entry {
	return Entry{
		Socket:    "/run/sluice/sluiced.sock",
		StateFile: "/run/sluice/state.json",
		Extra:     map[string]any{"wire": 1},
	}
}

// inputs calls f with every file of testdata with the suffix.
func inputs(t *testing.T, suffix string, f func(t *testing.T, file string, in []byte)) {
	t.Helper()
	files, err := filepath.Glob("testdata/*" + suffix)
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata has no *%s: %v", suffix, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			in, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			f(t, filepath.Base(file), in)
		})
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", file+".golden")
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v; write it with go test -update", err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("differs from %s (-want +got):\n%s", path, diff)
	}
}

// wantLast fails unless the runtime's own parser sees the entry once, at the
// end, with all that the plugin needs.
func wantLast(t *testing.T, list []byte) {
	t.Helper()
	parsed, err := libcni.ConfListFromBytes(list)
	if err != nil {
		t.Fatalf("libcni refuses the result: %v", err)
	}
	for i, p := range parsed.Plugins {
		if last := i == len(parsed.Plugins)-1; (p.Network.Type == Type) != last {
			t.Errorf("plugin %d is %s", i, p.Network.Type)
		}
	}
	ours := parsed.Plugins[len(parsed.Plugins)-1]
	if !ours.Network.Capabilities[AnnotationsCapability] || !bytes.Contains(ours.Bytes, []byte("/run/sluice/state.json")) {
		t.Errorf("the entry lacks something: %s", ours.Bytes)
	}
}

// decoded is a list without Sluice's entries, for comparing meanings.
func decoded(t *testing.T, text []byte) map[string]any {
	t.Helper()
	var v map[string]any
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	if err := decoder.Decode(&v); err != nil {
		t.Fatal(err)
	}
	var others []any
	for _, p := range v["plugins"].([]any) {
		if p.(map[string]any)["type"] != Type {
			others = append(others, p)
		}
	}
	v["plugins"] = others
	return v
}

func floats(t *testing.T, text []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestInsertIntoEveryList(t *testing.T) {
	inputs(t, ".conflist", func(t *testing.T, file string, in []byte) {
		out, err := Insert(in, testEntry())
		if err != nil {
			t.Fatal(err)
		}
		golden(t, file, out)
		if diff := cmp.Diff(decoded(t, in), decoded(t, out)); diff != "" {
			t.Errorf("something else changed:\n%s", diff)
		}
		again, err := Insert(out, testEntry())
		if err != nil || !bytes.Equal(again, out) {
			t.Errorf("a second Insert changes it again (%v):\n%s", err, again)
		}
		if file == "ours-in-the-middle.conflist" {
			return // its place is kept
		}
		wantLast(t, out)
		removed, err := Remove(out)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(file, "ours") && !bytes.Equal(removed, in) {
			t.Errorf("Remove does not give back what was there:\n%s", cmp.Diff(string(in), string(removed)))
		}
		if Contains(removed) {
			t.Errorf("an entry is left:\n%s", removed)
		}
	})
}

func TestConvertEveryConf(t *testing.T) {
	inputs(t, ".conf", func(t *testing.T, file string, in []byte) {
		e := testEntry()
		e.Origin = &Origin{Conf: file}
		out, err := Convert(in, e)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, file, out)
		wantLast(t, out)

		// Apart from the entry it is what libcni would have made of the file.
		clean, err := Remove(in) // multus-delegates.conf has a copy of the entry
		if err != nil {
			t.Fatal(err)
		}
		conf, err := libcni.NetworkPluginConfFromBytes(clean)
		if err != nil {
			t.Fatal(err)
		}
		list, err := libcni.ConfListFromConf(conf) //nolint:staticcheck // containerd and CRI-O call it
		if err != nil {
			t.Fatal(err)
		}
		ours, err := libcni.ConfListFromBytes(out)
		if err != nil {
			t.Fatal(err)
		}
		// Compared as floats: libcni writes 1.5e3 as 1500.
		diff := cmp.Diff(list.Plugins[0].Network, ours.Plugins[0].Network)
		diff += cmp.Diff(floats(t, list.Plugins[0].Bytes), floats(t, ours.Plugins[0].Bytes))
		diff += cmp.Diff([]string{list.Name, list.CNIVersion}, []string{ours.Name, ours.CNIVersion})
		if diff != "" {
			t.Errorf("libcni reads the file otherwise:\n%s", diff)
		}

		parsed, err := Parse(out)
		if err != nil || parsed.Ours == nil || parsed.Ours.Origin == nil || parsed.Ours.Origin.Conf != file {
			t.Fatalf("the origin is not to be read back: %+v, %v", parsed, err)
		}
		updated, err := Insert(out, testEntry()) // names no origin: the old one stays
		if err != nil || !bytes.Equal(updated, out) {
			t.Errorf("Insert into a converted list changes it (%v):\n%s", err, updated)
		}
		back, ok := Restore(out)
		if !ok || !bytes.Equal(back, clean) {
			t.Errorf("Restore gives %v:\n%s", ok, cmp.Diff(string(clean), string(back)))
		}
	})
}

func TestInsertKeepsThePlaceAndUpdatesTheContents(t *testing.T) {
	in := []byte(`{"name":"n","plugins":[{"type":"a"},{"socket":"/old","type":"sluice-cni","origin":{"link":"x"}},{"type":"b"}]}`)
	out, err := Insert(in, Entry{Socket: "/new"})
	if err != nil {
		t.Fatal(err)
	}
	list, err := Parse(out)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a", Type, "b"}, list.Types); diff != "" {
		t.Error(diff)
	}
	want := &Entry{Socket: "/new", Origin: &Origin{Link: "x"}}
	if diff := cmp.Diff(want, list.Ours); diff != "" {
		t.Error(diff)
	}
}

// Another installer that marshals a map anew sorts the keys and drops our
// layout. That is no reason to write.
func TestInsertLeavesAnEqualEntryAsItIsWritten(t *testing.T) {
	out, err := Insert([]byte(`{"name":"n","plugins":[{"type":"a"}]}`), testEntry())
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(out, &v); err != nil {
		t.Fatal(err)
	}
	sorted, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	again, err := Insert(sorted, testEntry())
	if err != nil || !bytes.Equal(again, sorted) {
		t.Errorf("it was written again (%v):\n%s", err, again)
	}
}

func TestRemoveReachesMultusDelegates(t *testing.T) {
	in, err := os.ReadFile("testdata/multus-delegates.conf")
	if err != nil {
		t.Fatal(err)
	}
	if !Contains(in) {
		t.Fatal("the file has no copy of the entry")
	}
	out, err := Remove(in)
	if err != nil {
		t.Fatal(err)
	}
	if Contains(out) || !bytes.Contains(out, []byte(`"portmap"`)) {
		t.Errorf("left:\n%s", out)
	}
	list, err := Insert([]byte(fmt.Sprintf(`{"name":"n","plugins":[%s]}`, in)), testEntry())
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(list, []byte(Type)); n != 1 {
		t.Errorf("after Insert the entry stands there %d times:\n%s", n, list)
	}
}

func TestRestoreDeclinesWhatAConfCannotSay(t *testing.T) {
	e := testEntry()
	e.Origin = &Origin{Conf: "10-x.conf"}
	out, err := Convert([]byte("{\n \"name\": \"n\",\n \"type\": \"ptp\"\n}\n"), e)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := Restore(out); !ok {
		t.Fatal("what Convert made cannot be restored")
	}
	for what, change := range map[string][2]string{
		"a third plugin":  {`{"type":"x"},` + "\n    {\n      \"type\": \"sluice-cni\"", `    {` + "\n" + `      "type": "sluice-cni"`},
		"disableCheck":    {`"disableCheck": true, "plugins"`, `"plugins"`},
		"another name":    {`"name": "m",` + "\n" + `  "plugins"`, `"name": "n",` + "\n" + `  "plugins"`},
		"another version": {`"cniVersion": "1.0.0", "plugins"`, `"plugins"`},
		"no origin":       {`"origine"`, `"origin"`},
	} {
		changed := strings.Replace(string(out), change[1], change[0], 1)
		if changed == string(out) {
			t.Fatalf("%s: nothing was changed", what)
		}
		if conf, ok := Restore([]byte(changed)); ok {
			t.Errorf("%s: restored to %s", what, conf)
		}
	}
}

func TestBadInputIsASentence(t *testing.T) {
	huge := `{"name":"n","plugins":[` + strings.Repeat("[", 20000)
	for in, want := range map[string]string{
		"":                                     "it is empty",
		" \n":                                  "it is empty",
		"\xef\xbb\xbf{}":                       "byte order mark",
		"[]":                                   "no JSON object",
		"null":                                 "no JSON object",
		"{\n\"name\": \"n\",\n\"plugins\": [":  "line 3",
		"{} {}":                                "no valid JSON",
		`{"name":"n","plugins":[{"type":"a"}`:  "no valid JSON",
		`{"name":"n"}`:                         "no plugins",
		`{"name":"n","plugins":[]}`:            "no plugins",
		`{"name":"n","plugins":{}}`:            "plugins",
		`{"name":"n","plugins":[1]}`:           "plugin",
		`{"name":"n","plugins":[{"type":""}]}`: "missing 'type'",
		`{"name":1,"plugins":[{"type":"a"}]}`:  "name",
		`{"plugins":[{"type":"a"}]}`:           "no name",
		huge:                                   "JSON",
	} {
		if _, err := Insert([]byte(in), testEntry()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want a sentence with %q", in, err, want)
		}
	}
	if _, err := Parse([]byte(`{"name":"n"}`)); !errors.Is(err, ErrNoInlinedPlugins) {
		t.Errorf("a list of a folder: %v", err)
	}
	e := testEntry()
	if _, err := Convert([]byte(`{"type":"a"}`), e); err == nil {
		t.Error("Convert works without an origin")
	}
	e.Origin = &Origin{Conf: "x.conf"}
	if _, err := Convert([]byte(`{"type":"sluice-cni"}`), e); err == nil {
		t.Error("Convert chains Sluice after itself")
	}
	if _, err := Convert([]byte(`{"name":"n","plugins":[{"type":"a"}]}`), e); err == nil {
		t.Error("Convert takes a list")
	}
}

func TestDuplicateKeysAreReadAsTheRuntimeReadsThem(t *testing.T) {
	in := []byte(`{"name":"n","plugins":[{"type":"a"}],"plug\u0069ns":[{"type":"b"}]}`)
	out, err := Insert(in, testEntry())
	if err != nil {
		t.Fatal(err)
	}
	wantLast(t, out)
}

func TestHugeList(t *testing.T) {
	var in bytes.Buffer
	in.WriteString("{\n  \"name\": \"huge\",\n  \"plugins\": [\n")
	for i := range 20000 {
		fmt.Fprintf(&in, "    {\"type\": \"p%d\", \"data\": [{\"a\": {\"b\": [1, 2, 3.50]}}, \"%s\"]},\n", i, strings.Repeat("x", 50))
	}
	in.WriteString("    {\"type\": \"last\"}\n  ]\n}\n")
	out, err := Insert(in.Bytes(), testEntry())
	if err != nil {
		t.Fatal(err)
	}
	wantLast(t, out)
	removed, err := Remove(out)
	if err != nil || !bytes.Equal(removed, in.Bytes()) {
		t.Errorf("Remove does not give back what was there: %v", err)
	}
}

func TestEntryWithoutAJSONForm(t *testing.T) {
	e := Entry{Socket: "/s", Extra: map[string]any{"f": func() {}}}
	if e.Validate() == nil {
		t.Error("Validate passes a function")
	}
	if out, err := Insert([]byte(`{"name":"n","plugins":[{"type":"a"}]}`), e); err != nil || !bytes.Contains(out, []byte(`"/s"`)) {
		t.Errorf("%s, %v", out, err)
	}
	e = Entry{Extra: map[string]any{"type": "evil", "more": "<&>"}}
	if text, err := e.MarshalJSON(); err != nil || !bytes.Contains(text, []byte(`"type":"sluice-cni"`)) ||
		!bytes.Contains(text, []byte(`"more":"<&>"`)) || bytes.Contains(text, []byte("evil")) {
		t.Errorf("%s, %v", text, err)
	}
}
