package conflist

import (
	"bytes"
	"errors"
	"fmt"
)

// indentation of a converted plugin within its list.
const nested = "    "

// Convert makes a list of one plugin's configuration and of Sluice's entry,
// which libcni's ConfListFromConf would read alike. The plugin's own text is in
// it unchanged but for indentation, and e.Origin, which must name the file,
// tells Restore that it can be taken out again.
func Convert(conf []byte, e Entry) ([]byte, error) {
	parsed, err := ParseConf(conf)
	if err != nil {
		return nil, err
	}
	if parsed.Ours != nil {
		return nil, errors.New("it holds nothing but Sluice, which needs a plugin before it")
	}
	if e.Origin == nil || e.Origin.Conf == "" {
		return nil, errors.New("the entry does not name the file that is converted")
	}
	// A copy in Multus's delegates goes, as in Insert. Restore cannot bring it
	// back, and need not.
	conf = apply(conf, removals(conf, span{}))
	body := root(conf)
	eol := eolOf(conf)

	var out bytes.Buffer
	line := func(indent, text string) { out.WriteString(indent + text + eol) }
	out.Write(conf[:body.start])
	line("", "{")
	if parsed.CNIVersion != "" {
		line("  ", `"cniVersion": `+quote(parsed.CNIVersion)+`,`)
	}
	line("  ", `"name": `+quote(parsed.Name)+`,`)
	line("  ", `"plugins": [`)
	line(nested, indented(string(conf[body.start:body.end]))+`,`)
	line(nested, string(style{eol: eol, lines: true, indent: nested, unit: "  "}.render(e)))
	line("  ", `]`)
	out.WriteString("}")
	out.Write(conf[body.end:])

	if _, err := Parse(out.Bytes()); err != nil {
		return nil, fmt.Errorf("as a list it would not be valid: %w", err)
	}
	return out.Bytes(), nil
}

// Restore undoes Convert: it returns the plugin's configuration. It is not ok if
// the list was not converted, or if somebody has since added something that a
// single plugin's configuration cannot say; then Remove serves.
func Restore(list []byte) (conf []byte, ok bool) {
	parsed, err := Parse(list)
	if err != nil || len(parsed.Types) != 2 || parsed.Types[1] != Type || parsed.Types[0] == Type {
		return nil, false
	}
	if parsed.Ours.Origin == nil || parsed.Ours.Origin.Conf == "" {
		return nil, false
	}
	for _, m := range members(list, root(list)) {
		if m.key != "cniVersion" && m.key != "name" && m.key != "plugins" {
			return nil, false
		}
	}
	plugins, err := chain(list, 2)
	if err != nil {
		return nil, false
	}
	body := list[plugins[0].start:plugins[0].end]
	inner, err := ParseConf(body)
	if err != nil || inner.Name != parsed.Name || inner.CNIVersion != parsed.CNIVersion {
		return nil, false
	}
	around := root(list)
	conf = append(conf, list[:around.start]...)
	conf = append(conf, outdented(body)...)
	return append(conf, list[around.end:]...), true
}

// indented moves every line but the first to the right. JSON strings hold no
// line ends, so only white space between tokens changes.
func indented(text string) string {
	return string(bytes.ReplaceAll([]byte(text), []byte("\n"), []byte("\n"+nested)))
}

// outdented undoes indented, unless the text was laid out anew since.
func outdented(text []byte) []byte {
	if bytes.Count(text, []byte("\n")) != bytes.Count(text, []byte("\n"+nested)) {
		return text
	}
	return bytes.ReplaceAll(text, []byte("\n"+nested), []byte("\n"))
}

func quote(s string) string {
	text, _ := marshal(s) // a string always has a form
	return string(text)
}
