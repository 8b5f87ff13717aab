package netns

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// No kernel closes the Unix sockets of others, and it says so as it does of TCP's
// where CONFIG_INET_DIAG_DESTROY is not set.
func TestAKernelThatClosesNoConnectionsIsNamedAndSoIsTheConnection(t *testing.T) {
	n, _ := newForTest(t)
	c := Connection{
		Local: netip.MustParseAddrPort("[fd99::2]:40000"), Remote: netip.MustParseAddrPort("[fd99::1]:80"),
		family: unix.AF_UNIX,
	}
	err := n.Reset(c)
	if err == nil {
		t.Skip("this kernel does not know Unix sockets by sock_diag")
	}
	if !errors.Is(err, ErrNoReset) {
		t.Errorf("the error is not ErrNoReset: %v", err)
	}
	for _, word := range []string{"[fd99::2]:40000 - [fd99::1]:80", "this kernel cannot close", "CONFIG_INET_DIAG_DESTROY"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not name %s", err, word)
		}
	}
}

func TestAConnectionThatIsClosedAlreadyIsNoErrorToClose(t *testing.T) {
	n, _ := newForTest(t)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := n.Reset(Connection{family: family}); err != nil {
			t.Error(err)
		}
	}
}
