package agent

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// processesOf lists the processes whose cgroup names a pod.
func processesOf(uids []string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && inPod(pid, uids) {
			out = append(out, pid)
		}
	}
	return out
}

// inPod says whether a process is in a cgroup of the pod's, in any hierarchy.
func inPod(pid int, uids []string) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && namesPod(string(text), uids)
}

// namesPod looks for the pod's directory in the paths of /proc/PID/cgroup: podUID
// by the cgroupfs driver, and a slice whose name ends in podUID with underscores
// by systemd's.
func namesPod(cgroups string, uids []string) bool {
	for line := range strings.Lines(cgroups) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		_, path, _ := strings.Cut(rest, ":")
		for part := range strings.SplitSeq(path, "/") {
			for _, uid := range uids {
				if uid == "" {
					continue
				}
				if part == "pod"+uid || strings.HasSuffix(part, "-pod"+strings.ReplaceAll(uid, "-", "_")+".slice") {
					return true
				}
			}
		}
	}
	return false
}
