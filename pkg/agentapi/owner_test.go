package agentapi

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"
)

func TestOneDaemonOwnsTheNode(t *testing.T) {
	dir := t.TempDir()
	if _, owned, err := OwnerOf(dir); owned || err != nil {
		t.Fatal("nobody has come yet:", owned, err)
	}
	first, err := Own(t.Context(), dir, "/bpffs", func(Owner) { t.Error("nobody has it") })
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if o, owned, err := OwnerOf(dir); !owned || err != nil || o.PID != os.Getpid() || o.BPFFS != "/bpffs" {
		t.Errorf("the owner is %+v, %v, %v", o, owned, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var said Owner
	if _, err := Own(ctx, dir, "", func(o Owner) { said = o; cancel() }); !errors.Is(err, context.Canceled) {
		t.Error("the second ends with", err)
	}
	if said.PID != os.Getpid() {
		t.Errorf("the holder is %v", said)
	}
	if err := first.Sign(""); err != nil {
		t.Fatal(err)
	}
	if o, owned, err := OwnerOf(dir); !owned || err != nil || o.BPFFS != "" {
		t.Errorf("the owner is %+v, %v, %v", o, owned, err)
	}
	first.Close()
	if _, owned, err := OwnerOf(dir); owned || err != nil {
		t.Fatal("it is free:", owned, err)
	}
	again, err := Own(t.Context(), dir, "", func(Owner) { t.Error("it is free") })
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

// Two that wait while the file is removed must not both come to own the node.
func TestARemovedLockOwnsNothing(t *testing.T) {
	dir := t.TempDir()
	first, err := Own(t.Context(), dir, "", func(Owner) {})
	if err != nil {
		t.Fatal(err)
	}
	owned := make(chan *Lock)
	waits := make(chan struct{}, 1)
	for range 2 {
		go func() {
			l, err := Own(t.Context(), dir, "", func(Owner) {
				select {
				case waits <- struct{}{}:
				default:
				}
			})
			if err != nil {
				return
			}
			owned <- l
		}()
	}
	<-waits
	if err := first.Remove(); err != nil {
		t.Fatal(err)
	}
	first.Close()
	second := <-owned
	select {
	case <-owned:
		t.Error("the node has two owners")
	case <-time.After(5 * ownerPoll):
	}
	second.Close()
	(<-owned).Close()
}
