package oracle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// families is which addresses a pod has.
type families string

const (
	dualStack families = ""
	only4     families = "4"
	only6     families = "6"
)

// config is one thing to try: rules, in a pod of some kind. The interception
// mode is a field of the rules.
type config struct {
	Rules rules.Rules
	podKind
}

// podKind is what is not a rule.
type podKind struct {
	Families families         `json:"families,omitempty"`
	Inbound  datapath.Inbound `json:"inbound,omitempty"` // empty: sk_lookup
}

func defaults() config { return config{Rules: rules.Default()} }

// with is the default configuration, changed.
func with(change func(*rules.Rules)) config {
	c := defaults()
	change(&c.Rules)
	return c
}

// String is JSON that parseConfig reads: what differs from the default.
func (c config) String() string {
	was, is := fields(rules.Default()), fields(c.Rules)
	for name, value := range is {
		if bytes.Equal(value, was[name]) {
			delete(is, name)
		}
	}
	maps.Copy(is, fields(c.podKind))
	return asJSON(is)
}

func parseConfig(text string) (config, error) {
	c := defaults()
	var is map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &is); err != nil {
		return c, fmt.Errorf("read the configuration: %w", err)
	}
	merged, kind := fields(c.Rules), map[string]json.RawMessage{}
	for name, value := range is {
		if _, rule := merged[name]; rule {
			merged[name] = value
		} else {
			kind[name] = value
		}
	}
	c.Rules = rules.Rules{}
	return c, errors.Join(strictly(merged, &c.Rules), strictly(kind, &c.podKind))
}

func strictly(fields map[string]json.RawMessage, into any) error {
	d := json.NewDecoder(strings.NewReader(asJSON(fields)))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

func fields(v any) map[string]json.RawMessage {
	var out map[string]json.RawMessage
	if err := json.Unmarshal([]byte(asJSON(v)), &out); err != nil {
		panic(err) // it was made by json
	}
	return out
}

func asJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // for types that json cannot hold only
	}
	return string(text)
}
