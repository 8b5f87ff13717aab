package agent

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// processesAge is how old a list of processes may be: at the start many pods are
// looked for within a moment. Who uses one asks whether it is still the pod's.
const processesAge = time.Second

// processes are those of pods, by the pod's UID.
type processes struct {
	mu    sync.Mutex
	read  time.Time
	byPod map[string][]int
}

// of lists the processes whose cgroup names a pod.
func (p *processes) of(uids []string) []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.read) > processesAge {
		p.byPod, p.read = processesByPod(), time.Now()
	}
	var out []int
	for _, uid := range uids {
		out = append(out, p.byPod[uid]...)
	}
	return out
}

func processesByPod() map[string][]int {
	out := map[string][]int{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return out
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			for _, uid := range podsOf(pid) {
				out[uid] = append(out[uid], pid)
			}
		}
	}
	return out
}

// inPod says whether a process is in a cgroup of the pod's, in any hierarchy.
func inPod(pid int, uids []string) bool {
	return slices.ContainsFunc(podsOf(pid), func(uid string) bool { return slices.Contains(uids, uid) })
}

func podsOf(pid int) []string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil // it has ended
	}
	return podsNamed(string(text))
}

// podsNamed are the UIDs of the pods that the paths of /proc/PID/cgroup name: one,
// as a rule. Their directory is podUID by the cgroupfs driver, and a slice whose
// name ends in podUID, with underscores, by systemd's.
func podsNamed(cgroups string) []string {
	var out []string
	for line := range strings.Lines(cgroups) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		_, path, _ := strings.Cut(rest, ":")
		for part := range strings.SplitSeq(path, "/") {
			uid, named := strings.CutPrefix(part, "pod")
			if slice, ok := strings.CutSuffix(part, ".slice"); ok {
				at := strings.LastIndex(slice, "-pod")
				if named = at >= 0; named {
					uid = strings.ReplaceAll(slice[at+len("-pod"):], "_", "-")
				}
			}
			if named && uid != "" && !slices.Contains(out, uid) {
				out = append(out, uid)
			}
		}
	}
	return out
}
