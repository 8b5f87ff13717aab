package datapath

import "testing"

// TestUnitOfSaysWhatIsCounted: only a reason that a program counts for each packet,
// call or listener has another unit than connections.
func TestUnitOfSaysWhatIsCounted(t *testing.T) {
	others := map[string]string{
		"guard-no-verdict": "SYNs", "guard-other-interface": "SYNs",
		"guard-loopback": "packets", "refused-rerouted": "packets",
		"refused-no-record":     "calls",
		"listener-not-mappable": "listeners", "listener-slots-full": "listeners",
	}
	for r := range Reason(len(reasonNames)) {
		want, ok := others[ReasonName(r)]
		if !ok {
			want = "connections"
		}
		if got := UnitOf(r); got != want {
			t.Errorf("%s counts %s, want %s", ReasonName(r), got, want)
		}
		delete(others, ReasonName(r))
	}
	for name := range others {
		t.Errorf("%s is no reason", name)
	}
}
