package report

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

type item struct {
	Name  string   `json:"name"`
	Count uint64   `json:"count"`
	Tags  []string `json:"tags"`
}

func TestWriteMatchesItsGoldenFiles(t *testing.T) {
	items := []item{{"shop/cart-0", 1<<64 - 1, []string{"a", "b: c"}}, {"<none> & \"quotes\"", 0, []string{}}}
	rows := Rows{Head: []string{"NAME", "COUNT"}, Lines: [][]string{{"shop/cart-0", "18446744073709551615"}, {"ü", "0"}}, Empty: "Nothing."}
	for _, tt := range []struct {
		file   string
		format Format
		value  any
		rows   Rows
	}{
		{"list.json", JSON, items, rows}, {"list.yaml", YAML, items, rows}, {"list.txt", Table, items, rows},
		{"empty.json", JSON, []item{}, Rows{}}, {"empty.yaml", YAML, []item{}, Rows{}}, {"empty.txt", Table, nil, Rows{Head: rows.Head, Empty: "Nothing."}},
	} {
		var got bytes.Buffer
		if err := Write(&got, tt.format, tt.value, tt.rows); err != nil {
			t.Errorf("%s: %v", tt.file, err)
			continue
		}
		path := filepath.Join("testdata", tt.file)
		if *update {
			if err := os.WriteFile(path, got.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got.String()); diff != "" {
			t.Errorf("%s: %s", tt.file, diff)
		}
	}
}

func TestARareColumnIsThereWhereALineHasIt(t *testing.T) {
	head := []string{"NAME", "RARE"}
	for _, tt := range []struct {
		name  string
		lines [][]string
		want  string
	}{
		{"no line has it", [][]string{{"a", ""}, {"b", ""}}, "NAME\na\nb\n"},
		{"a line has it", [][]string{{"a", ""}, {"b", "x"}}, "NAME   RARE\na      \nb      x\n"},
	} {
		var got bytes.Buffer
		if err := Write(&got, Table, nil, Rows{Head: head, Lines: tt.lines, RareLast: true}); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(tt.want, got.String()); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

func TestParseFormat(t *testing.T) {
	for _, text := range []string{"table", "json", "yaml"} {
		if f, err := ParseFormat(text); err != nil || string(f) != text {
			t.Errorf("%s: %v, %v", text, f, err)
		}
	}
	for _, text := range []string{"", "JSON", "xml"} {
		if _, err := ParseFormat(text); err == nil {
			t.Errorf("%q is a format", text)
		}
	}
}

type brokenWriter struct{}

var errBroken = errors.New("broken")

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func TestWriteSaysWhenItCannot(t *testing.T) {
	for _, f := range []Format{Table, JSON, YAML} {
		for _, rows := range []Rows{{Empty: "Nothing."}, {Head: []string{"A"}, Lines: [][]string{{"b"}}}} {
			if err := Write(brokenWriter{}, f, []item{}, rows); !errors.Is(err, errBroken) {
				t.Errorf("%s: %v", f, err)
			}
		}
	}
}
