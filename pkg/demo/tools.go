package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// toolDirs are searched after the PATH, which often lacks them for users who
// became root by su.
var toolDirs = [...]string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin"}

// pluginDirs are where packages and administrators put CNI plugins.
var pluginDirs = [...]string{"/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni", "/usr/local/lib/cni"}

// findTools completes what is given with what is found. Everything that is
// missing is named at once.
func findTools(ctx context.Context, given Tools) (Tools, error) {
	var errs [3]error
	given.HAProxy, errs[0] = findHAProxy(ctx, given.HAProxy)
	given.BPFTool, errs[1] = findBPFTool(ctx)
	given.CNI, errs[2] = findPlugins(given.CNI)
	if err := errors.Join(errs[:]...); err != nil {
		return Tools{}, fmt.Errorf("%w\n\"make demo\", or hack/deps.sh demo, installs everything that the demo needs", err)
	}
	return given, nil
}

// candidates are the places of a program, the most usual first.
func candidates(name string) []string {
	var out []string
	if path, err := exec.LookPath(name); err == nil {
		out = append(out, path)
	}
	for _, dir := range toolDirs {
		out = append(out, filepath.Join(dir, name))
	}
	return out
}

func findHAProxy(ctx context.Context, given string) (string, error) {
	try := candidates("haproxy")
	if given != "" {
		try = []string{given}
	}
	for _, path := range try {
		features, err := exec.CommandContext(ctx, path, "-vv").Output()
		if err != nil || !bytes.Contains(features, []byte("HAProxy version")) {
			continue
		}
		if !bytes.Contains(features, []byte("+NETFILTER")) {
			return "", fmt.Errorf("%s was built without NETFILTER and so never asks for the original destination: use your distribution's HAProxy", path)
		}
		return path, nil
	}
	if given != "" {
		return "", fmt.Errorf("%s does not run as HAProxy does", given)
	}
	return "", errors.New("HAProxy, the demo's proxy, is not installed: apt-get install haproxy")
}

// haproxyVersion is the program's own first words, such as "HAProxy 2.6.12".
func haproxyVersion(ctx context.Context, path string) string {
	text, err := exec.CommandContext(ctx, path, "-v").Output()
	words := strings.Fields(string(text)) // HAProxy version 2.6.12-1+deb12u4 2026/...
	if err != nil || len(words) < 3 {
		return "HAProxy"
	}
	number, _, _ := strings.Cut(words[2], "-")
	return "HAProxy " + number
}

// findBPFTool takes the first that runs: Ubuntu's is a wrapper that does not
// where the running kernel has no package of its own; any version will do.
func findBPFTool(ctx context.Context) (string, error) {
	wrapped, _ := filepath.Glob("/usr/lib/linux-tools*/*/bpftool")
	for _, path := range append(candidates("bpftool"), wrapped...) {
		if exec.CommandContext(ctx, path, "version").Run() == nil {
			return path, nil
		}
	}
	return "", errors.New("bpftool, with which the demo looks behind Sluice, is not installed: apt-get install bpftool (on Ubuntu before 24.10: linux-tools-common linux-tools-generic)")
}

func findPlugins(given string) (string, error) {
	var try []string
	switch {
	case given != "":
		try = filepath.SplitList(given)
	default:
		try = append(filepath.SplitList(os.Getenv("CNI_PATH")), pluginDirs[:]...)
	}
	var searched []string
	for _, dir := range try {
		if missing := missingPlugins(dir); len(missing) == 0 {
			return filepath.Abs(dir)
		}
		searched = append(searched, dir)
	}
	return "", fmt.Errorf("the CNI plugins %s are not all in any of %s: apt-get install containernetworking-plugins, or name their directory with --cni-path",
		strings.Join(plugins[:], ", "), strings.Join(searched, ", "))
}

func missingPlugins(dir string) []string {
	var missing []string
	for _, name := range plugins {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.IsDir() || st.Mode()&0o111 == 0 {
			missing = append(missing, name)
		}
	}
	return missing
}
