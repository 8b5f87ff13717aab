package e2e

import "testing"

// TestNoConnectionIsLostOrEscapesWhileAnotherVersionComesAndGoes: the versions differ
// in what they say of themselves; tests/upgrade has versions whose maps differ.
func TestNoConnectionIsLostOrEscapesWhileAnotherVersionComesAndGoes(t *testing.T) {
	needNode(t)
	this, next := versionOf(t, *checkoutFlag), versionOf(t, *nextFlag)
	if this == next {
		t.Fatal("both checkouts are of version", this)
	}
	eachWay(t, func(t *testing.T, by way) {
		needSluiceBy(t, by)
		wantVersion(t, this)
		s := newSpace(t)
		s.run(plain("server"), meshed("client"))
		server := s.appURL("server")
		s.goesThrough("client", server, "out client")
		step(t, *nextFlag, "import")
		s.load("client", server, func() {
			step(t, *nextFlag, "upgrade"+string(by))
			wantVersion(t, next)
			s.run(meshed("meanwhile"))
			step(t, *checkoutFlag, "rollback"+string(by))
			wantVersion(t, this)
		})
		s.goesThrough("meanwhile", server, "out meanwhile")
	})
}
