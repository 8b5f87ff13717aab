package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine is what the figures depend on.
type Machine struct {
	Kernel   string            `json:"kernel"`
	CPU      string            `json:"cpu"`
	CPUs     int               `json:"cpus"`
	Go       string            `json:"go"`
	Sluice   string            `json:"sluice"` // of the source, where the build has noted it
	Sysctls  map[string]string `json:"sysctls"`
	Versions map[string]string `json:"versions"` // of what is compared with
}

// sysctls that the figures depend on. Namespaces that the benchmark makes have
// the kernel's defaults for those that are the namespace's own.
var sysctls = []string{
	"kernel/randomize_va_space", "kernel/sched_autogroup_enabled", "kernel/unprivileged_bpf_disabled",
	"net/core/bpf_jit_enable", "net/core/bpf_jit_harden", "net/core/somaxconn", "net/netfilter/nf_conntrack_max",
	"net/ipv4/ip_local_port_range", "net/ipv4/tcp_congestion_control", "net/ipv4/tcp_fastopen", "net/ipv4/tcp_mem",
	"net/ipv4/tcp_syncookies", "net/ipv4/tcp_tw_reuse",
}

// otherWork is a note on a machine that is not idle, before anything is measured.
func otherWork(loadavg string, cpus int) (note string) {
	minute, _, _ := strings.Cut(loadavg, " ")
	if load, err := strconv.ParseFloat(minute, 64); err == nil && load > float64(cpus)/4 {
		note = fmt.Sprintf("not idle when this began: its load average was %s. Ratios bear that, absolute figures and p99 do not.", minute)
	}
	return note
}

func thisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), Sysctls: map[string]string{}, Versions: map[string]string{}}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = string(bytes.TrimRight(uts.Release[:], "\x00"))
	}
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" || s.Key == "vcs.modified" && s.Value == "true" {
				m.Sluice += s.Value
			}
		}
	}
	for _, name := range sysctls {
		if text, err := os.ReadFile("/proc/sys/" + name); err == nil {
			m.Sysctls[strings.ReplaceAll(name, "/", ".")] = strings.Join(strings.Fields(string(text)), " ")
		}
	}
	for name, flag := range map[string]string{"iptables-legacy": "--version", "iptables-nft": "--version", "nft": "--version", "haproxy": "-v", "wrk": "-v"} {
		out, _ := exec.Command(name, flag).CombinedOutput() // wrk -v ends with an error
		if line, _, _ := strings.Cut(string(out), "\n"); line != "" {
			m.Versions[name] = strings.TrimSpace(line)
		}
	}
	return m
}
