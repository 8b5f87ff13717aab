package ctl

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"strings"
)

// mistyped says which value of a manifest has a type that its field does not take,
// by its path in the manifest rather than in Go.
func mistyped(text []byte, err *json.UnmarshalTypeError) error {
	path, is, want := pathAt(text, err.Offset), jsonWords(err.Value), typeWords(err.Type)
	if path == "" {
		return fmt.Errorf("it is %s and no pod", is)
	}
	remedy := ""
	if kind, _, _ := strings.Cut(err.Value, " "); err.Type.Kind() == reflect.String && (kind == "number" || kind == "bool") {
		remedy = ": quote it"
	}
	return fmt.Errorf("%s is %s and should be %s%s", path, is, want, remedy)
}

func jsonWords(value string) string {
	switch value {
	case "bool":
		return "true or false"
	case "array":
		return "a list"
	case "object":
		return "a mapping"
	case "string", "number":
		return "a " + value
	}
	return "the " + value // such as "number 1.5"
}

func typeWords(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "a mapping"
	default: // the only others are IDs
		return "a whole number"
	}
}

// plainKey needs no quotes in a path.
var plainKey = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]*$`)

// pathAt is the path of the value that ends, or the list or mapping that begins,
// at an offset of a JSON text: such as spec.containers[0].name.
func pathAt(text []byte, offset int64) string {
	// A step is into a list or a mapping; what its next value is called.
	type step struct {
		list    bool
		index   int
		key     string
		wantKey bool
	}
	var steps []step
	decoder := json.NewDecoder(bytes.NewReader(text))
	for {
		token, err := decoder.Token()
		if err != nil {
			return ""
		}
		last := len(steps) - 1
		if key, ok := token.(string); ok && last >= 0 && steps[last].wantKey {
			steps[last].key, steps[last].wantKey = key, false
			continue
		}
		if decoder.InputOffset() >= offset {
			break
		}
		if open, ok := token.(json.Delim); ok && (open == '{' || open == '[') {
			steps = append(steps, step{list: open == '[', wantKey: open == '{'})
			continue
		} else if ok {
			steps = steps[:last]
			last--
		}
		if last >= 0 { // a value has ended
			steps[last].index++
			steps[last].wantKey = !steps[last].list
		}
	}
	var path strings.Builder
	for _, s := range steps {
		switch {
		case s.list:
			fmt.Fprintf(&path, "[%d]", s.index)
		case plainKey.MatchString(s.key):
			path.WriteString("." + s.key)
		default:
			fmt.Fprintf(&path, "[%q]", s.key)
		}
	}
	return strings.TrimPrefix(path.String(), ".")
}
