package netns

import (
	"testing"

	"github.com/sluice-mesh/sluice/tests/kit"
)

func TestMain(m *testing.M) { kit.Main(m) }
