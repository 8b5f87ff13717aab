// Package conflist edits CNI network configuration: it finds, inserts, updates
// and removes the entry of Sluice's plugin in a chain. It is bytes in, bytes
// out: it knows no file. Whatever is not Sluice's stays as it was written, byte
// for byte, because the text is edited in place and never marshalled again.
//
// What is valid is decided by libcni, the library that the runtimes use.
package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/libcni"
)

// Type is the plugin's name in a chain, and the name of its binary.
const Type = "sluice-cni"

// ErrNoInlinedPlugins is wrapped by the error for a list without plugins of its
// own: since libcni 1.3 a runtime loads them from the folder that has the
// network's name, and older ones refuse the list.
var ErrNoInlinedPlugins = errors.New("it has no plugins")

// List is what a network configuration says.
type List struct {
	Name       string
	CNIVersion string
	Types      []string // of the plugins, in their order
	Ours       *Entry   // Sluice's entry, nil if there is none
}

// Others returns the types of the plugins that are not Sluice's.
func (l List) Others() []string {
	var others []string
	for _, t := range l.Types {
		if t != Type {
			others = append(others, t)
		}
	}
	return others
}

// Parse reads a network list (.conflist). The error is a sentence about the
// file without its name. With ErrNoInlinedPlugins the list has its name.
func Parse(data []byte) (List, error) {
	if err := checkObject(data); err != nil {
		return List{}, err
	}
	parsed, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return List{}, fmt.Errorf("it is no CNI network list: %w", err)
	}
	list := List{Name: parsed.Name, CNIVersion: parsed.CNIVersion}
	if len(parsed.Plugins) == 0 {
		return list, fmt.Errorf("it is no CNI network list with plugins of its own: %w", ErrNoInlinedPlugins)
	}
	for _, p := range parsed.Plugins {
		list.Types = append(list.Types, p.Network.Type)
		if p.Network.Type == Type {
			list.Ours = parseEntry(p.Bytes)
		}
	}
	return list, nil
}

// ParseConf reads the configuration of a single plugin (.conf and .json), which
// a runtime takes for a list of one.
func ParseConf(data []byte) (List, error) {
	if err := checkObject(data); err != nil {
		return List{}, err
	}
	parsed, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return List{}, fmt.Errorf("it is no CNI plugin configuration: %w", err)
	}
	conf := parsed.Network
	list := List{Name: conf.Name, CNIVersion: conf.CNIVersion, Types: []string{conf.Type}}
	if conf.Type == Type {
		list.Ours = parseEntry(data)
	}
	return list, nil
}

// checkObject says in which line JSON is broken. What follows may rely on the
// text being one valid object.
func checkObject(data []byte) error {
	if bytes.HasPrefix(data, []byte("\xef\xbb\xbf")) {
		return errors.New("it begins with a byte order mark, which no CNI runtime reads: save it without one")
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return errors.New("it is empty")
	}
	var object map[string]json.RawMessage
	err := json.Unmarshal(data, &object)
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		line := 1 + bytes.Count(data[:min(int(syntax.Offset), len(data))], []byte("\n"))
		return fmt.Errorf("it is no valid JSON: line %d: %w", line, err)
	case err != nil || object == nil:
		return errors.New("it is no JSON object")
	}
	return nil
}

// Insert puts Sluice's entry at the end of the list's chain. An entry that is
// there already keeps its place and gets e's contents; with nothing to change
// the bytes returned are those given. Any further copy is removed, also in the
// chains that Multus has copied into its delegates: a second call for the same
// pod would be of no use.
func Insert(list []byte, e Entry) ([]byte, error) {
	parsed, err := Parse(list)
	if err != nil {
		return nil, err
	}
	plugins, err := chain(list, len(parsed.Types))
	if err != nil {
		return nil, err
	}
	keep := -1
	for i, t := range parsed.Types {
		if t == Type {
			keep = i
		}
	}
	if keep < 0 {
		last := plugins[len(plugins)-1]
		edits := append(removals(list, span{}), edit{span{last.end, last.end}, appended(list, last, e)})
		return apply(list, edits), nil
	}

	if e.Origin == nil {
		e.Origin = parsed.Ours.Origin
	}
	edits := removals(list, plugins[keep])
	if !sameJSON(list[plugins[keep].start:plugins[keep].end], e.compact()) {
		text := styleOf(list, plugins[keep]).render(e)
		edits = append(edits, edit{plugins[keep], text})
	}
	return apply(list, edits), nil
}

// Remove takes every entry of Sluice out, at the top and in Multus's delegates.
// It takes any JSON object, and returns what it was given where there is
// nothing to remove. A chain of nothing but Sluice ends up empty.
func Remove(data []byte) ([]byte, error) {
	if err := checkObject(data); err != nil {
		return nil, err
	}
	return apply(data, removals(data, span{})), nil
}

// Contains says whether an entry of Sluice is anywhere in the text; false for
// what is not a JSON object.
func Contains(data []byte) bool {
	return checkObject(data) == nil && len(removals(data, span{})) > 0
}
