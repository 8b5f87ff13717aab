package conflist

import (
	"bytes"
	"encoding/json"
	"strings"
)

// style is how a chain is laid out, so that an entry can be written alike.
type style struct {
	eol    string // "\n" or "\r\n"
	lines  bool   // a plugin has more than one line
	indent string // of the line on which a plugin ends
	unit   string // what a plugin's keys are indented by, beyond indent
}

// styleOf looks at a plugin's text.
func styleOf(text []byte, plugin span) style {
	s := style{eol: eolOf(text), unit: "  "}
	body := text[plugin.start:plugin.end]
	if !bytes.ContainsRune(body, '\n') {
		return s
	}
	s.lines = true
	if closing, ok := indentBefore(text, plugin.end-1); ok {
		s.indent = closing
	} else if opening, ok := indentBefore(text, plugin.start); ok {
		s.indent = opening
	}
	if strings.Contains(s.indent, "\t") {
		s.unit = "\t"
	}
	first := skipSpace(text, plugin.start+1)
	if keys, ok := indentBefore(text, first); ok && len(keys) > len(s.indent) && strings.HasPrefix(keys, s.indent) {
		s.unit = keys[len(s.indent):]
	}
	return s
}

// eolOf tells which line ends a text has.
func eolOf(text []byte) string {
	if i := bytes.IndexByte(text, '\n'); i > 0 && text[i-1] == '\r' {
		return "\r\n"
	}
	return "\n"
}

// indentBefore returns the white space between the start of the line and at; it
// is not ok if something else stands there, or if this is the first line.
func indentBefore(text []byte, at int) (string, bool) {
	start := at
	for start > 0 && (text[start-1] == ' ' || text[start-1] == '\t') {
		start--
	}
	return string(text[start:at]), start > 0 && text[start-1] == '\n'
}

// render writes the entry in the style.
func (s style) render(e Entry) []byte {
	if !s.lines {
		return e.compact()
	}
	var out bytes.Buffer
	_ = json.Indent(&out, e.compact(), s.indent, s.unit) // it is valid JSON
	return bytes.ReplaceAll(out.Bytes(), []byte("\n"), []byte(s.eol))
}

// appended is what to write after the last plugin of a chain: the comma, the
// white space that stands before the last plugin too, and the entry.
func appended(text []byte, last span, e Entry) []byte {
	s := styleOf(text, last)
	separator := ""
	if indent, ok := indentBefore(text, last.start); ok {
		separator = s.eol + indent
	} else if s.lines || text[last.start-1] == ' ' {
		separator = " "
	}
	return append([]byte(","+separator), s.render(e)...)
}
