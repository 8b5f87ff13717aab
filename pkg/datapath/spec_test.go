package datapath

import (
	"testing"

	"github.com/cilium/ebpf"
)

// Maps are made from one object's definitions, and used by the programs of all.
func TestEveryObjectDefinesTheSameMaps(t *testing.T) {
	d := &Datapath{}
	d.opts.complete()
	specs, err := d.mapSpecs()
	if err != nil {
		t.Fatal(err)
	}
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){
		"connect": loadConnect, "names": loadNames, "sockops": loadSockops, "sockopt": loadSockopt,
		"udp": loadUdp, "inbound": loadInbound, "tc": loadTc, "reroute": loadReroute,
	} {
		object, err := load()
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, m := range object.Maps {
			if m.Name[0] == '.' {
				continue // .rodata is each object's own
			}
			seen++
			s := specs[m.Name]
			if s == nil {
				t.Errorf("%s uses the map %s, which is never made", name, m.Name)
				continue
			}
			if s.Type != m.Type || s.KeySize != m.KeySize || s.ValueSize != m.ValueSize || s.MaxEntries != m.MaxEntries || s.Flags != m.Flags {
				t.Errorf("%s has %v, and what is made is %v", name, m, s)
			}
		}
		if seen == 0 {
			t.Errorf("%s has no maps", name)
		}
	}
}
