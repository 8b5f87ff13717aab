package bench

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/sluice-mesh/sluice/pkg/iptables"
	"github.com/sluice-mesh/sluice/pkg/netns"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// packages are where Debian and Ubuntu have what is run here.
var packages = map[string]string{
	"iptables-legacy-restore": "iptables", "iptables-nft-restore": "iptables", "iptables-restore-translate": "iptables",
	"iptables-legacy-save": "iptables", "iptables-nft-save": "iptables",
	"nft": "nftables", "haproxy": "haproxy", "wrk": "wrk",
}

func find(command string) (string, error) {
	path, err := exec.LookPath(command)
	if err != nil {
		return "", fmt.Errorf("%s is not installed (Debian, Ubuntu: apt-get install %s)", command, packages[command])
	}
	return path, nil
}

// runIn runs a command in a namespace with a text on its standard input, and
// returns its standard output.
func runIn(ns *netns.NetNS, input string, command string, args ...string) (string, error) {
	path, err := find(command)
	if err != nil {
		return "", err
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(input)
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := ns.Do(cmd.Start); err != nil { // a child is in the namespace of its parent's thread
		return "", fmt.Errorf("run %s: %w", command, err)
	}
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", command, err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

// istioText is what Istio's CNI plugin writes with these rules, for IPv4 or IPv6.
func istioText(r rules.Rules, v6 bool) (string, error) {
	normal, err := r.Normalise()
	if err != nil {
		return "", err
	}
	return iptables.Lean(iptables.Istio(normal, v6, "")), nil
}

// restoreBy loads Istio's rules by an iptables-restore.
func restoreBy(command string) func(*node, *netns.NetNS, rules.Rules) error {
	return func(n *node, ns *netns.NetNS, r rules.Rules) error {
		text, err := istioText(r, false)
		if err == nil {
			_, err = runIn(ns, text, command)
		}
		if err != nil || !n.ipv6 {
			return err
		}
		if text, err = istioText(r, true); err != nil {
			return err
		}
		_, err = runIn(ns, text, strings.Replace(command, "ip", "ip6", 1))
		return err
	}
}

// loadNft loads the same rules in nftables' own language, as iptables' translator
// writes them. It translates a text once: what is measured is loading it.
func loadNft(n *node, ns *netns.NetNS, r rules.Rules) error {
	text, err := istioText(r, false)
	if err != nil {
		return err
	}
	translated, done := n.translated.Load(text)
	if !done {
		if translated, err = translate(ns, text); err != nil {
			return err
		}
		n.translated.Store(text, translated)
	}
	_, err = runIn(ns, translated.(string), "nft", "-f", "-")
	return err
}

func translate(ns *netns.NetNS, text string) (string, error) {
	out, err := runIn(ns, text, "iptables-restore-translate", "-f", "/dev/stdin")
	if err != nil {
		return "", err
	}
	// What it cannot translate it writes as a comment.
	if strings.Contains(out, "# -t ") {
		return "", errors.New("iptables-restore-translate left a rule out")
	}
	return out, nil
}

// saveRules writes what the kernel holds of a backend's rules into a directory,
// as the firewall's own command prints it.
func (b *backend) saveRules(dir string) error {
	command, args := "", []string{}
	switch {
	case b.iptables:
		command = b.name + "-save"
	case b.role == rival:
		command, args = "nft", []string{"list", "ruleset"}
	default:
		return nil
	}
	text, err := runIn(b.site.pod, "", command, args...)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "rules-"+b.name+".txt")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
