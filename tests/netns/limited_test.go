package netns

import (
	"strings"
	"testing"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
	"github.com/sluice-mesh/sluice/tests/kit"
)

// As on Linux 5.15 and 5.16: what needs to know where a packet came in is refused in
// a sentence, and the pod is left as it was; everything else works without.
func TestWithoutIngressIfindexWhatNeedsItIsRefused(t *testing.T) {
	d := kit.OwnDatapath(t, datapath.Options{Limit: func(f *datapath.Features) { f.IngressIfindex = false }})
	for name, tt := range map[string]struct {
		change func(*rules.Rules)
		says   string
	}{
		"excludeInterfaces":          {func(r *rules.Rules) { r.ExcludeInterfaces = []string{"eth0"} }, "enroll without excludeInterfaces"},
		"reroute-virtual-interfaces": {func(r *rules.Rules) { r.RerouteInterfaces = []string{"eth0"} }, "cannot be rerouted"},
		"TPROXY":                     {func(r *rules.Rules) { r.Mode = rules.TProxy }, "use mode REDIRECT"},
	} {
		t.Run(name, func(t *testing.T) {
			p := kit.NewPod(t)
			app := p.Listen(kit.App, "[::]:8080")
			before := waysOf(t, p)
			pod := datapath.Pod{Rules: rules.Default()}
			tt.change(&pod.Rules)
			_, err := d.Enroll(p.NetNS, pod)
			if err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "5.17") {
				t.Errorf("enrolment ends with %v, want a sentence with %q and the kernel that can", err, tt.says)
			}
			if after := waysOf(t, p); after != before {
				t.Errorf("the refusal leaves\n%s\nwhere there was\n%s", after, before)
			}
			for _, f := range families {
				direct(t, p, f, app, 8080)
			}
		})
	}
	t.Run("nothing of these", func(t *testing.T) {
		for _, f := range families {
			p := kit.NewPod(t)
			app := p.Listen(kit.App, "[::]:8080")
			direct(t, p, f, app, 8080)
			p.Enroll(d)
			l := p.Listen(kit.Proxy, "[::]:15006")
			arrives(t, p, f, 8080, l)
			own, err := p.Dial(kit.App, f.socket, ap(f.pod, 8080))
			if err != nil {
				t.Fatalf("%s: the app calls itself: %v", f.name, err)
			}
			kit.Exchange(t, own, app.MustAccept(), 1000)
		}
	})
}
