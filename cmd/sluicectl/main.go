// Command sluicectl runs Sluice on one machine: see "sluicectl --help".
package main

import (
	"os"

	"github.com/sluice-mesh/sluice/pkg/ctl"
)

func main() {
	os.Exit(ctl.Run(ctl.Env{Out: os.Stdout, Err: os.Stderr}, os.Args[1:]))
}
