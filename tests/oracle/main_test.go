// Package oracle asks Istio's own iptables rules: the same probes are run in
// namespaces with those rules, with Sluice, and with both at once, and what
// became of each is compared. Whatever differs must be listed, with the outcome
// to expect, in listed_test.go, and for people in docs/compatibility.md.
//
//	make oracle N=200          the table, and 200 random configurations
//	make oracle N=1 SEED=17    that one again
//	go test ./tests/oracle -run TestOneConfiguration -oracle.config='{"dns":true}'
package oracle

import (
	"flag"
	"testing"
	"time"

	"github.com/sluice-mesh/sluice/tests/kit"
)

var (
	oneConfig = flag.String("oracle.config", "", "run this configuration: the fields of rules.Rules that are not the default, as JSON")
	randomN   = flag.Int("oracle.n", 10, "how many random configurations to draw")
	firstSeed = flag.Uint64("oracle.seed", uint64(time.Now().UnixNano()%1e9), "seed of the first random configuration; the next one has the next number")
	forRule   = flag.String("oracle.rule", "", "with TestOneRule: run the configuration in which this rule shows")
	istio     = flag.String("oracle.istio", "", "Istio's own istio-iptables, built from tests/istio")
	mutate    = flag.Bool("oracle.mutate", false, "take each rule out of Sluice's own sources too, and demand that it is noticed (minutes)")
)

func TestMain(m *testing.M) { kit.Main(m) }
