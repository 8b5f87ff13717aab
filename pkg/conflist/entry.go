package conflist

import (
	"bytes"
	"encoding/json"
	"reflect"
)

// AnnotationsCapability makes containerd and CRI-O hand all annotations of the
// pod to the plugin, so that it can judge one without the API server.
const AnnotationsCapability = "io.kubernetes.cri.pod-annotations"

// Entry is Sluice's part of a chain: what the plugin reads on stdin. Empty
// fields are left out.
type Entry struct {
	// Socket and StateFile are paths on the host: the daemon's socket, and the
	// file by which the plugin decides while the daemon does not answer.
	Socket    string
	StateFile string
	LogFile   string
	LogLevel  string
	// Extra are further keys, for options that this package need not know. The
	// keys above win over equal ones here.
	Extra map[string]any
	// Origin says what the installer replaced by the file that holds the entry.
	Origin *Origin
}

// Origin is what stood in place of the file that holds the entry. It is kept in
// the entry itself, so that the file can be put back with no other record.
type Origin struct {
	// Conf is the name of the .conf or .json that was converted.
	Conf string `json:"conf,omitempty"`
	// Link is where a symbolic link of that name pointed to.
	Link string `json:"link,omitempty"`
}

// entryJSON is the entry as it is written.
type entryJSON struct {
	Type         string          `json:"type"`
	Socket       string          `json:"socket,omitempty"`
	StateFile    string          `json:"stateFile,omitempty"`
	LogFile      string          `json:"logFile,omitempty"`
	LogLevel     string          `json:"logLevel,omitempty"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	Origin       *Origin         `json:"origin,omitempty"`
}

// MarshalJSON writes the type first, then the fields, then Extra by its keys.
func (e Entry) MarshalJSON() ([]byte, error) {
	own, err := marshal(entryJSON{
		Type: Type, Socket: e.Socket, StateFile: e.StateFile, LogFile: e.LogFile, LogLevel: e.LogLevel,
		Capabilities: map[string]bool{AnnotationsCapability: true},
		Origin:       e.Origin,
	})
	if err != nil {
		return nil, err
	}
	extra := make(map[string]any, len(e.Extra))
	for key, value := range e.Extra {
		if !ownKey(key) {
			extra[key] = value
		}
	}
	if len(extra) == 0 {
		return own, nil
	}
	more, err := marshal(extra)
	if err != nil {
		return nil, err
	}
	own[len(own)-1] = ',' // {own} and {more} become {own,more}
	return append(own, more[1:]...), nil
}

// ownKey tells the keys that Extra cannot set.
func ownKey(key string) bool {
	switch key {
	case "type", "socket", "stateFile", "logFile", "logLevel", "capabilities", "origin":
		return true
	}
	return false
}

// UnmarshalJSON reads what MarshalJSON writes.
func (e *Entry) UnmarshalJSON(data []byte) error {
	var own entryJSON
	if err := json.Unmarshal(data, &own); err != nil {
		return err
	}
	var all map[string]any
	if err := json.Unmarshal(data, &all); err != nil {
		return err
	}
	*e = Entry{Socket: own.Socket, StateFile: own.StateFile, LogFile: own.LogFile, LogLevel: own.LogLevel, Origin: own.Origin}
	for key, value := range all {
		if ownKey(key) {
			continue
		}
		if e.Extra == nil {
			e.Extra = map[string]any{}
		}
		e.Extra[key] = value
	}
	return nil
}

// Validate tells whether the entry can be written at all: what Extra holds may
// have no JSON form.
func (e Entry) Validate() error {
	_, err := json.Marshal(e)
	return err
}

// compact is the entry in one line. An Extra without a JSON form, which
// Validate reports, is left out.
func (e Entry) compact() []byte {
	text, err := e.MarshalJSON()
	if err != nil {
		e.Extra = nil
		text, _ = e.MarshalJSON() // strings and booleans always have a form
	}
	return text
}

// parseEntry reads an entry of Sluice that may be of another version or edited
// by hand: what does not fit is as good as absent, and will be written anew.
func parseEntry(data []byte) *Entry {
	e := &Entry{}
	if json.Unmarshal(data, e) != nil {
		*e = Entry{}
	}
	return e
}

// marshal is json.Marshal without its escapes for HTML.
func marshal(v any) ([]byte, error) {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

// sameJSON compares values: not the order of keys, nor white space.
func sameJSON(a, b []byte) bool {
	decode := func(text []byte) (value any) {
		decoder := json.NewDecoder(bytes.NewReader(text))
		decoder.UseNumber()
		_ = decoder.Decode(&value) // both are valid JSON
		return value
	}
	return reflect.DeepEqual(decode(a), decode(b))
}
