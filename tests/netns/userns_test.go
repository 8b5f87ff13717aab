package netns

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// podRoot is what root of a pod with a user namespace is on the machine.
const podRoot = 100000

// onePiece is how Kubernetes maps a pod's IDs.
var onePiece = syscall.SysProcIDMap{ContainerID: 0, HostID: podRoot, Size: 65536}

// userPod is a pod with a user namespace, in which a process lives or not.
type userPod struct {
	*kit.Pod
	inside *kit.Inside // nil: only the namespace is left
	server *kit.Sock   // port 80 of the far host
}

// outside is what an ID of the pod is on the machine.
func outside(id kit.ID) kit.ID { return kit.ID{UID: id.UID + podRoot, GID: id.GID + podRoot} }

// dial dials as somebody of the pod.
func (p *userPod) dial(t *testing.T, id kit.ID, to netip.AddrPort) *kit.Sock {
	t.Helper()
	var s *kit.Sock
	var err error
	if p.inside != nil {
		s, err = p.inside.Dial(id, to)
	} else {
		family := unix.AF_INET
		if to.Addr().Is6() {
			family = unix.AF_INET6
		}
		s, err = p.Dial(outside(id), family, to)
	}
	if err != nil {
		t.Fatalf("as %v to %v: %v", id, to, err)
	}
	return s
}

func (p *userPod) listen(id kit.ID, at string) *kit.Sock {
	if p.inside != nil {
		return p.inside.Listen(id, at)
	}
	return p.Listen(outside(id), at)
}

// inUserPods runs a test with both ways of finding out what the IDs are.
func inUserPods(t *testing.T, test func(t *testing.T, p *userPod)) {
	for name, lives := range map[string]bool{"a process lives": true, "only the namespace is left": false} {
		t.Run(name, func(t *testing.T) {
			pod, inside := kit.NewUserPod(t, onePiece)
			p := &userPod{Pod: pod, inside: inside, server: pod.Far.Listen(kit.Root, "[::]:80")}
			for _, id := range []kit.ID{kit.App, kit.Proxy} {
				kit.Exchange(t, p.dial(t, id, ap(kit.Far4, 80)), p.server.MustAccept(), 1<<12)
			}
			if !lives {
				inside.Kill()
				p.inside = nil
			}
			test(t, p)
		})
	}
}

func TestTheProxyOfAUserNamespaceIsTheOneWithItsIDThere(t *testing.T) {
	d := kit.Datapath(t)
	inUserPods(t, func(t *testing.T, p *userPod) {
		app := p.listen(kit.App, "[::]:8080")
		direct(t, p.Pod, families[0], app, 8080)
		if e := p.Enroll(d); !e.UserNS {
			t.Error("enrolment has not seen the user namespace")
		}

		// Who is 1337 on the machine is a stranger: nobody's listener.
		stranger := p.Listen(kit.Proxy, "[::]:15006")
		refused(t, p.Pod, families[0], 8080, "with a stranger's listener")
		untouched(t, stranger)
		stranger.Close()

		out, in := p.listen(kit.Proxy, "[::]:15001"), p.listen(kit.Proxy, "[::]:15006")
		captured := func(s *kit.Sock, f family, who string) {
			t.Helper()
			accepted := out.MustAccept()
			if got, err := accepted.OrigDst(f.level); err != nil || got != ap(f.far, 80) {
				t.Errorf("%s, %s: SO_ORIGINAL_DST is %v, %v", f.name, who, got, err)
			}
			kit.Exchange(t, s, accepted, 1<<16)
		}
		for _, f := range families[:2] {
			to := ap(f.far, 80)
			captured(p.dial(t, kit.App, to), f, "the app")
			captured(p.dial(t, kit.Root, to), f, "the pod's root")
			for _, id := range []kit.ID{kit.Proxy, kit.ProxyUID, kit.ProxyGID} {
				kit.Exchange(t, p.dial(t, id, to), p.server.MustAccept(), 1<<12)
			}
			s, err := p.Dial(kit.Proxy, f.socket, to)
			if err != nil {
				t.Fatal("as the machine's 1337:", err)
			}
			captured(s, f, "the machine's 1337")
			arrives(t, p.Pod, f, 8080, in)
			// O3: the proxy calls its own pod.
			kit.Exchange(t, p.dial(t, kit.Proxy, ap(f.pod, 8080)), in.MustAccept(), 100)
		}
		checkNothingReached(t, p.server)
		untouched(t, app)

		out.Close()
		if p.inside != nil {
			return // it keeps the listener open
		}
		if _, err := p.Dial(outside(kit.App), unix.AF_INET, ap(kit.Far4, 80)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("without a proxy the dial ends with %v, want ECONNREFUSED", err)
		}
	})
}

// Enrolment goes by who bound a listener: known by post_bind, or, of one that was
// bound where no program saw it, by the process that has it open.
func TestListenersOfAUserNamespaceFromBeforeEnrolment(t *testing.T) {
	d := kit.Datapath(t)
	for name, id := range map[string]kit.ID{"the pod's 1337": outside(kit.Proxy), "the machine's 1337": kit.Proxy} {
		for _, seen := range []bool{false, true} {
			t.Run(name+", its bind seen "+strconv.FormatBool(seen), func(t *testing.T) {
				pod, _ := kit.NewUserPod(t, onePiece)
				app := pod.Listen(kit.App, "0.0.0.0:8080")
				direct(t, pod, families[0], app, 8080)
				var l *kit.Sock
				listen := func() { l = pod.Listen(id, "0.0.0.0:15006") }
				if seen {
					listen()
				} else {
					kit.Outside(t, listen)
				}
				pod.Hold(id, l)
				e := pod.Enroll(d)
				if id == kit.Proxy {
					if e.Listeners != 0 {
						t.Errorf("%d listeners are the proxy's, want none", e.Listeners)
					}
					refused(t, pod, families[0], 8080, "with a stranger's listener")
					return
				}
				if e.Listeners != 1 {
					t.Errorf("%d listeners are the proxy's, want 1", e.Listeners)
				}
				// Not asked for SO_ORIGINAL_DST: unseen, it meets no program.
				client, err := pod.Far.Dial(kit.Root, unix.AF_INET, ap(kit.Pod4, 8080))
				if err != nil {
					t.Fatal(err)
				}
				kit.Exchange(t, client, l.MustAccept(), 1<<12)
				untouched(t, app)
			})
		}
	}
}

func TestOwnerGroupsAndReadinessInAUserNamespace(t *testing.T) {
	d := kit.Datapath(t)
	inUserPods(t, func(t *testing.T, p *userPod) {
		p.Enroll(d, proxyReady, func(pod *datapath.Pod) { pod.Rules.ExcludeOwnerGroups = []uint32{2000} })
		to := ap(kit.Far4, 80)
		exempt, app := kit.ID{UID: 1000, GID: 2000}, kit.App
		p.Listen(kit.Proxy, "[::]:15001").Close() // the machine's 1337 is nobody here
		wantCapture(t, d, p.Pod, datapath.CaptureWaiting, "with a stranger's listener")
		kit.Exchange(t, p.dial(t, app, to), p.server.MustAccept(), 100)
		out := p.listen(kit.Proxy, "[::]:15001")
		wantCapture(t, d, p.Pod, datapath.CaptureReady, "with the proxy's")
		kit.Exchange(t, p.dial(t, exempt, to), p.server.MustAccept(), 100)
		kit.Exchange(t, p.dial(t, app, to), out.MustAccept(), 100)
		s, err := p.Dial(exempt, unix.AF_INET, to)
		if err != nil {
			t.Fatal(err)
		}
		kit.Exchange(t, s, out.MustAccept(), 100) // the machine's group 2000 is another one
	})
}

// Two pods with the same rules and other IDs have rule sets of their own.
func TestRuleSetsAreNotSharedAcrossUserNamespaces(t *testing.T) {
	d, opts := ownDatapath(t)
	other := syscall.SysProcIDMap{ContainerID: 0, HostID: 200000, Size: 65536}
	for i, ids := range []syscall.SysProcIDMap{onePiece, onePiece, other} {
		p, _ := kit.NewUserPod(t, ids)
		p.Enroll(d)
		if n, want := stateOf(t, opts.Dir).Entries["maps/rule_sets"], []int{1, 1, 2}[i]; n != want {
			t.Errorf("after %d pods there are %d rule sets, want %d", i+1, n, want)
		}
	}
	infos, err := d.Rules()
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	for _, r := range infos {
		if r.Kind == "proxy-uid" {
			shown[r.Match] = true
		}
	}
	if len(shown) != 2 || !shown["101337"] || !shown["201337"] {
		t.Errorf("the proxies' UIDs are %v, want the machine's", shown)
	}
}

func TestIDsThatAreUnknownAreRefused(t *testing.T) {
	d, opts := ownDatapath(t)
	for _, tt := range []struct {
		name    string
		ids     []syscall.SysProcIDMap
		dead    bool
		change  func(*rules.Rules)
		sayings string
	}{
		{"a UID that is not mapped", []syscall.SysProcIDMap{onePiece}, false, func(r *rules.Rules) { r.ProxyUIDs = []uint32{65536} }, "UID 65536 does not exist"},
		{"a GID that is not mapped", []syscall.SysProcIDMap{onePiece}, false, func(r *rules.Rules) { r.ProxyGIDs = []uint32{70000} }, "GID 70000 does not exist"},
		{"an owner group that is not mapped", []syscall.SysProcIDMap{onePiece}, false, func(r *rules.Rules) { r.ExcludeOwnerGroups = []uint32{70000} }, "GID 70000 does not exist"},
		{"a UID that is not mapped, by the owner", []syscall.SysProcIDMap{onePiece}, true, func(r *rules.Rules) { r.ProxyUIDs = []uint32{65536} }, "UID 65536 does not exist"},
		{"a small map", []syscall.SysProcIDMap{{ContainerID: 0, HostID: podRoot, Size: 1337}}, false, func(*rules.Rules) {}, "UID 1337 does not exist"},
		{"no map at all", nil, false, func(*rules.Rules) {}, "IDs of its user namespace are unknown"},
		{"no map at all, and dead", nil, true, func(*rules.Rules) {}, "IDs of its user namespace are unknown"},
		{"the machine's IDs, and dead", []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}, true, func(*rules.Rules) {}, "IDs of its user namespace are unknown"},
		{"a user's own IDs, and dead", []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1}, {ContainerID: 1, HostID: podRoot, Size: 65536}}, true, func(*rules.Rules) {}, "IDs of its user namespace are unknown"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, inside := kit.NewUserPod(t, tt.ids...)
			if tt.dead {
				inside.Kill()
			}
			before := stateOf(t, opts.Dir)
			pod := datapath.Pod{Rules: rules.Default()}
			tt.change(&pod.Rules)
			_, err := d.Enroll(p.NetNS, pod)
			if err == nil || !strings.Contains(err.Error(), tt.sayings) {
				t.Errorf("enroll: %v, want it to say %q", err, tt.sayings)
			}
			if after := stateOf(t, opts.Dir); after.Entries["maps/pods"] != before.Entries["maps/pods"] {
				t.Error("it is enrolled all the same")
			}
		})
	}
}

// Whoever lives in it, several pieces are translated one by one.
func TestIDsOfSeveralPieces(t *testing.T) {
	p, _ := kit.NewUserPod(t, syscall.SysProcIDMap{ContainerID: 0, HostID: 1000, Size: 1}, syscall.SysProcIDMap{ContainerID: 1, HostID: podRoot, Size: 65536})
	ids, err := p.IDs()
	if err != nil {
		t.Fatal(err)
	}
	for in, want := range map[uint32]uint32{0: 1000, 1: podRoot, 1337: podRoot + 1336} {
		if got, err := ids.UID(in); err != nil || got != want {
			t.Errorf("UID %d is %d, %v; want %d", in, got, err, want)
		}
	}
	if _, err := ids.GID(65537); err == nil {
		t.Error("GID 65537 is not mapped, and has a number")
	}
	if plain, err := kit.NewPod(t).IDs(); err != nil || plain.Own() {
		t.Errorf("a namespace of the machine's own users: %v, %v", plain, err)
	}
}
