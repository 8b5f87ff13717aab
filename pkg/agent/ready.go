package agent

import (
	"maps"
	"slices"
	"strings"
	"sync"
)

// readiness is why the daemon is not ready, and what a person should know though
// it is.
type readiness struct {
	mu     sync.Mutex
	blocks map[string]string
	notes  map[string]string
}

func newReadiness(blocks ...string) *readiness {
	r := &readiness{blocks: map[string]string{}, notes: map[string]string{}}
	for _, b := range blocks {
		r.blocks[b] = "not there yet"
	}
	return r
}

// block says why a part keeps the daemon from being ready; empty: it does not.
// It says whether that is new.
func (r *readiness) block(part, why string) bool { return r.set(r.blocks, part, why) }

// note is the same for what does not keep it from being ready.
func (r *readiness) note(part, why string) bool { return r.set(r.notes, part, why) }

func (r *readiness) set(where map[string]string, part, why string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	changed := where[part] != why
	if why == "" {
		delete(where, part)
	} else {
		where[part] = why
	}
	return changed
}

// text is for /readyz: a line for each thing to say.
func (r *readiness) text() (ready bool, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out strings.Builder
	ready = len(r.blocks) == 0
	if ready {
		out.WriteString("ready\n")
	} else {
		out.WriteString("not ready\n")
	}
	for _, lines := range []map[string]string{r.blocks, r.notes} {
		for _, part := range slices.Sorted(maps.Keys(lines)) {
			out.WriteString(part + ": " + lines[part] + "\n")
		}
	}
	return ready, out.String()
}
