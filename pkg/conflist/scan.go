package conflist

import (
	"encoding/json"
	"fmt"
	"slices"
)

// The functions of this file walk over text that is known to be valid JSON, and
// remember where things stand in it. encoding/json forgets that.

// span is a piece of the text.
type span struct{ start, end int }

// member is a key and where its value stands.
type member struct {
	key   string
	value span
}

// edit replaces a piece of the text.
type edit struct {
	span
	text []byte
}

// apply makes edits, which do not overlap.
func apply(text []byte, edits []edit) []byte {
	slices.SortStableFunc(edits, func(a, b edit) int { return a.start - b.start })
	out := make([]byte, 0, len(text)+1024)
	at := 0
	for _, e := range edits {
		out = append(out, text[at:e.start]...)
		out = append(out, e.text...)
		at = e.end
	}
	return append(out, text[at:]...)
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

func skipSpace(text []byte, at int) int {
	for at < len(text) && isSpace(text[at]) {
		at++
	}
	return at
}

// skipString returns the end of the string that begins at at.
func skipString(text []byte, at int) int {
	for at++; text[at] != '"'; at++ {
		if text[at] == '\\' {
			at++
		}
	}
	return at + 1
}

// skipValue returns the end of the value that begins at at.
func skipValue(text []byte, at int) int {
	depth := 0
	for at < len(text) {
		switch c := text[at]; {
		case c == '"':
			at = skipString(text, at)
		case c == '{' || c == '[':
			depth++
			at++
		case c == '}' || c == ']':
			depth--
			at++
		case depth > 0:
			at++
			continue
		default: // a number, true, false or null
			for at < len(text) && !isSpace(text[at]) && text[at] != ',' && text[at] != '}' && text[at] != ']' {
				at++
			}
		}
		if depth == 0 {
			break
		}
	}
	return at
}

// root is the document's value, without the white space around it.
func root(text []byte) span {
	start := skipSpace(text, 0)
	return span{start, skipValue(text, start)}
}

// members lists an object's keys.
func members(text []byte, object span) []member {
	var all []member
	at := skipSpace(text, object.start+1)
	for text[at] != '}' {
		keyEnd := skipString(text, at)
		var key string
		_ = json.Unmarshal(text[at:keyEnd], &key) // it is a valid string
		start := skipSpace(text, skipSpace(text, keyEnd)+1)
		end := skipValue(text, start)
		all = append(all, member{key, span{start, end}})
		if at = skipSpace(text, end); text[at] == ',' {
			at = skipSpace(text, at+1)
		}
	}
	return all
}

// elements lists an array's values.
func elements(text []byte, array span) []span {
	var all []span
	at := skipSpace(text, array.start+1)
	for text[at] != ']' {
		end := skipValue(text, at)
		all = append(all, span{at, end})
		if at = skipSpace(text, end); text[at] == ',' {
			at = skipSpace(text, at+1)
		}
	}
	return all
}

// find returns an object's value of a key: the last, as encoding/json takes it.
func find(text []byte, object span, key string) (span, bool) {
	found, ok := span{}, false
	for _, m := range members(text, object) {
		if m.key == key {
			found, ok = m.value, true
		}
	}
	return found, ok
}

// chain returns where a list's plugins stand.
func chain(list []byte, want int) ([]span, error) {
	array, ok := find(list, root(list), "plugins")
	if !ok || list[array.start] != '[' {
		return nil, fmt.Errorf("it is no CNI network list: %w", ErrNoInlinedPlugins)
	}
	plugins := elements(list, array)
	if len(plugins) != want || want == 0 {
		return nil, fmt.Errorf("its plugins cannot be told apart: %d stand in the text, libcni sees %d", len(plugins), want)
	}
	return plugins, nil
}

// removals returns the edits that take Sluice's entries out of every chain,
// save the one that stands at keep.
func removals(text []byte, keep span) []edit {
	var edits []edit
	walk(text, root(text), "", 0, keep, &edits)
	return edits
}

// maxDepth is how deep below the root an entry is looked for. Multus's copy is
// at delegates/N/plugins/M; more depth only costs time.
const maxDepth = 16

// walk looks at a value and what is in it. Entries are elements of arrays that
// are named plugins (a chain) or delegates (Multus's own list).
func walk(text []byte, value span, key string, depth int, keep span, edits *[]edit) {
	if depth > maxDepth {
		return
	}
	switch text[value.start] {
	case '{':
		for _, m := range members(text, value) {
			walk(text, m.value, m.key, depth+1, keep, edits)
		}
	case '[':
		all := elements(text, value)
		ours := make([]bool, len(all))
		for i, element := range all {
			if (key == "plugins" || key == "delegates") && isOurs(text, element) {
				ours[i] = element != keep
				continue
			}
			walk(text, element, "", depth+1, keep, edits)
		}
		*edits = append(*edits, cuts(value, all, ours)...)
	}
}

// isOurs says whether a value is an entry of Sluice.
func isOurs(text []byte, value span) bool {
	if text[value.start] != '{' {
		return false
	}
	var plugin struct {
		Type string `json:"type"`
	}
	return json.Unmarshal(text[value.start:value.end], &plugin) == nil && plugin.Type == Type
}

// cuts removes the marked elements of an array, each with the comma and the
// white space before it, or after it where none is left before.
func cuts(array span, all []span, remove []bool) []edit {
	if !slices.Contains(remove, false) {
		if len(all) == 0 {
			return nil
		}
		return []edit{{span: span{array.start + 1, array.end - 1}}}
	}
	var edits []edit
	for i := 0; i < len(all); i++ {
		if !remove[i] {
			continue
		}
		first := i
		for i+1 < len(all) && remove[i+1] {
			i++
		}
		if first > 0 {
			edits = append(edits, edit{span: span{all[first-1].end, all[i].end}})
		} else {
			edits = append(edits, edit{span: span{all[0].start, all[i+1].start}})
		}
	}
	return edits
}
