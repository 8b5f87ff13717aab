package cni

import (
	"debug/elf"
	"path/filepath"
	"strings"
	"testing"
)

// What is not in the program cannot happen in an ADD.
func TestThePluginCanNeitherRunProgramsNorAskTheAPIServer(t *testing.T) {
	file, err := elf.Open(filepath.Join(bin, pluginName))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	symbols, err := file.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	ours := false
	for _, s := range symbols {
		ours = ours || strings.HasPrefix(s.Name, "github.com/sluice-mesh/sluice/pkg/cni.")
		for _, never := range []string{"os.StartProcess", "os/exec.", "syscall.forkExec", "syscall.Exec", "net/http.", "k8s.io/"} {
			if strings.HasPrefix(s.Name, never) {
				t.Errorf("the plugin has %s", s.Name)
			}
		}
	}
	if !ours {
		t.Error("the symbols are not the plugin's")
	}
}
