package demo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/datapath"
)

// bpftool runs bpftool, which knows nothing of Sluice, and decodes its answer.
func (n *node) bpftool(ctx context.Context, into any, args ...string) error {
	var out []byte
	var err error
	// What others make or remove while it is listing can make it stumble.
	poll(ctx, patience, func() bool {
		out, err = exec.CommandContext(ctx, n.cfg.Tools.BPFTool, append([]string{"-j"}, args...)...).Output()
		return err == nil
	})
	if err != nil {
		return fmt.Errorf("bpftool %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("bpftool %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// dump shows that the pinned maps can be read with bpftool alone.
func (n *node) dump(ctx context.Context) error {
	pin := filepath.Join(n.datapath(), datapath.Layout, "maps", "pods")
	n.step("bpftool map dump pinned %s", pin)
	text, err := exec.CommandContext(ctx, n.cfg.Tools.BPFTool, "map", "dump", "pinned", pin).CombinedOutput()
	if err != nil {
		return fmt.Errorf("bpftool map dump pinned %s: %w: %s", pin, err, text)
	}
	n.tell(message{Note: compact(string(text))})
	var entries []struct {
		Formatted struct {
			Key   uint64 `json:"key"`
			Value struct {
				OutPort int `json:"out_port"`
				InPort  int `json:"in_port"`
			} `json:"value"`
		} `json:"formatted"`
	}
	if err := n.bpftool(ctx, &entries, "map", "dump", "pinned", pin); err != nil {
		return err
	}
	var got []string
	for _, e := range entries {
		got = append(got, fmt.Sprintf("cookie %d: ports %d and %d", e.Formatted.Key, e.Formatted.Value.OutPort, e.Formatted.Value.InPort))
	}
	n.equal("the map pods, read by bpftool", fmt.Sprintf("cookie %d: ports 15001 and 15006", n.web.ns.Cookie()), cmp.Or(strings.Join(got, "; "), "nothing"))
	return nil
}

// compact writes each array of bytes on one line.
func compact(text string) string {
	byteArray := regexp.MustCompile(`\[[0-9\s,]+\]`)
	return byteArray.ReplaceAllStringFunc(text, func(array string) string {
		return strings.Join(strings.Fields(array), "")
	})
}

// holdings are the kernel objects of one datapath, by ID. IDs are not used again
// for a long time, so that other programs that come and go do not matter.
type holdings struct {
	Maps, Programs, Links map[int]bool
}

func (h holdings) String() string {
	return fmt.Sprintf("%d links, %d programs, %d maps", len(h.Links), len(h.Programs), len(h.Maps))
}

// holdings finds this datapath's maps by their pins, its programs by the maps
// they use, and its links by their programs.
func (n *node) holdings(ctx context.Context) (holdings, error) {
	h := holdings{map[int]bool{}, map[int]bool{}, map[int]bool{}}
	pins, err := filepath.Glob(filepath.Join(n.datapath(), "*", "maps", "*"))
	if err != nil {
		return h, err
	}
	for _, pin := range pins {
		if info, err := os.Stat(pin); err == nil && info.IsDir() {
			continue // says which shape the maps have
		}
		var m struct{ ID int }
		if err := n.bpftool(ctx, &m, "map", "show", "pinned", pin); err != nil {
			return h, err
		}
		h.Maps[m.ID] = true
	}
	var programs []struct {
		ID     int
		MapIDs []int `json:"map_ids"`
	}
	var links []struct {
		ID     int
		ProgID int `json:"prog_id"`
	}
	if err := errors.Join(n.bpftool(ctx, &programs, "prog", "show"), n.bpftool(ctx, &links, "link", "show")); err != nil {
		return h, err
	}
	used := map[int]bool{} // also by a program alone, without a pin
	for _, p := range programs {
		if slices.ContainsFunc(p.MapIDs, func(id int) bool { return h.Maps[id] }) {
			h.Programs[p.ID] = true
			for _, id := range p.MapIDs {
				used[id] = true
			}
		}
	}
	maps.Copy(h.Maps, used)
	for _, l := range links {
		if h.Programs[l.ProgID] {
			h.Links[l.ID] = true
		}
	}
	return h, nil
}

// remaining is what still exists of h.
func (n *node) remaining(ctx context.Context, h holdings) (holdings, error) {
	var all [3][]struct{ ID int }
	err := errors.Join(n.bpftool(ctx, &all[0], "map", "show"), n.bpftool(ctx, &all[1], "prog", "show"), n.bpftool(ctx, &all[2], "link", "show"))
	left := holdings{map[int]bool{}, map[int]bool{}, map[int]bool{}}
	for i, kind := range []struct{ was, is map[int]bool }{{h.Maps, left.Maps}, {h.Programs, left.Programs}, {h.Links, left.Links}} {
		for _, object := range all[i] {
			if kind.was[object.ID] {
				kind.is[object.ID] = true
			}
		}
	}
	return left, err
}

// pins counts the files below Sluice's directory, which counts as well. (The
// kernel puts two of its own into every bpffs.)
func (n *node) pins() int {
	count := 0
	_ = filepath.WalkDir(n.datapath(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && (!d.IsDir() || path == n.datapath()) {
			count++
		}
		return nil
	})
	return count
}

// down takes Sluice down and looks for what is left of it. The kernel frees
// programs a moment after their last user.
func (n *node) down(ctx context.Context) error {
	had, err := n.holdings(ctx)
	if err != nil {
		return err
	}
	n.step("sluicectl down: of %s and %d pins, nothing must be left", had, n.pins())
	if n.cfg.Break != BreakDown {
		if _, err := datapath.Down(n.datapath()); err != nil {
			return err
		}
	}
	left, pins := had, 0
	poll(ctx, patience, func() bool {
		if left, err = n.remaining(ctx, had); err != nil {
			return true
		}
		pins = n.pins()
		return len(left.Maps)+len(left.Programs)+len(left.Links)+pins == 0
	})
	if err != nil {
		return err
	}
	if len(had.Maps)*len(had.Programs)*len(had.Links) == 0 {
		n.equal("after down", "links, programs and maps were found before", had.String())
	}
	n.equal("after down, found by bpftool", "0 links, 0 programs, 0 maps, 0 pins", fmt.Sprintf("%s, %d pins", left, pins))
	return nil
}

func (n *node) after(ctx context.Context) error {
	n.step("Without Sluice again, with the proxy still running")
	n.both(ctx, ", after", directly)
	return nil
}
