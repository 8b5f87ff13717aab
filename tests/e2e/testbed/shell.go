package testbed

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Kubeconfig is the path of the administrator's.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.pki, "admin.kubeconfig") }

// AddCommand puts a program on the PATH of Shell.
func (c *Cluster) AddCommand(name, program string) error {
	return os.Symlink(program, filepath.Join(c.path("bin"), name))
}

// addKubectl makes kubectl a command of Shell.
func (c *Cluster) addKubectl() error {
	script := fmt.Sprintf("#!/bin/sh\nexec %s kubectl \"$@\"\n", c.kubernetes)
	return os.WriteFile(filepath.Join(c.path("bin"), "kubectl"), []byte(script), 0o755)
}

// Shell runs a script as the cluster's administrator would at a terminal of its node,
// in a directory and with more variables, NAME=VALUE. A command that fails, and a
// variable that is not set, end it. It returns what the script printed, errors too.
func (c *Cluster) Shell(ctx context.Context, dir, script string, variables ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "bash", "-e", "-u", "-x", "-o", "pipefail", "-c", script)
	cmd.Dir = dir
	cmd.Env = append([]string{
		"PATH=" + c.path("bin") + ":/usr/sbin:/usr/bin:/sbin:/bin", "KUBECONFIG=" + c.Kubeconfig(), "HOME=" + c.path("home"),
	}, variables...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}
