package datapath

import (
	"errors"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/rules"
)

func TestAKernelWithoutIngressIfindexHasNoTProxyMode(t *testing.T) {
	for _, has := range []bool{false, true} {
		f := &Datapath{probed: func() Features { return Features{IngressIfindex: has} }}
		if err := f.allow(rules.Redirect); err != nil {
			t.Errorf("ingress_ifindex: %v: REDIRECT is refused: %v", has, err)
		}
		if err := f.allow(rules.TProxy); errors.Is(err, ErrNoTProxy) == has {
			t.Errorf("ingress_ifindex: %v: TPROXY: %v", has, err)
		}
	}
}
