package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
)

// gc asks the plugin to collect what is not this one attachment.
func (n *node) gc(list *libcni.NetworkConfigList, container, ifname string) error {
	entry := n.entry()
	entry["name"], entry["cniVersion"] = list.Name, list.CNIVersion
	entry["cni.dev/valid-attachments"] = []map[string]string{{"containerID": container, "ifname": ifname}}
	text, err := json.Marshal(entry)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(n.t.Context(), filepath.Join(bin, pluginName))
	cmd.Env = append(cmd.Environ(), "CNI_COMMAND=GC", "CNI_PATH="+n.dir)
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// linkSet brings an interface of this thread's namespace up or down.
func linkSet(name string, up bool) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if up {
		return netlink.LinkSetUp(link)
	}
	return netlink.LinkSetDown(link)
}
