package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ReadSysctl reads a net.* sysctl of the namespace; name is below /proc/sys/net.
func (n *NetNS) ReadSysctl(name string) (string, error) {
	var text []byte
	err := n.Do(func() (err error) {
		// /proc/sys/net shows the namespace of the thread that opens it.
		text, err = os.ReadFile(filepath.Join("/proc/sys/net", name))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read a sysctl of %s: %w", n.path, err)
	}
	return strings.TrimSpace(string(text)), nil
}

// WriteSysctl sets a net.* sysctl of the namespace.
func (n *NetNS) WriteSysctl(name, value string) error {
	err := n.Do(func() error {
		return os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0)
	})
	if err != nil {
		return fmt.Errorf("write a sysctl of %s: %w", n.path, err)
	}
	return nil
}
