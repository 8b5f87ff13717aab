package oracle

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
)

// lab has the sites in which configurations are tried, made when first needed.
type lab struct {
	t     testing.TB
	sites map[siteKey]*site
	used  map[string]int // listed differences, and how many probes had them
}

type siteKey struct {
	redirection
	families
}

func newLab(t testing.TB) *lab {
	return &lab{t: t, sites: map[siteKey]*site{}, used: map[string]int{}}
}

func (l *lab) site(r redirection, f families) *site {
	key := siteKey{r, f}
	if l.sites[key] == nil {
		s := newSite(l.t, r, f)
		l.sites[key] = s
	}
	return l.sites[key]
}

// request is one configuration to try.
type request struct {
	config
	iptables []redirection // the first is the oracle; the others must agree with it
	omit     string        // a rule that iptables is to lack
	slow     bool          // with the probes that wait for what does not come
}

// report is what differed.
type report struct {
	request
	probes      int
	differences []string
}

func (r report) String() string {
	text := strings.Join(r.differences, "\n")
	if n := len(r.differences); n > 12 {
		text = strings.Join(r.differences[:12], "\n") + fmt.Sprintf("\n... and %d more", n-12)
	}
	return fmt.Sprintf("configuration %s\n%s\nagain: go test -count=1 ./tests/oracle -run TestOneConfiguration -oracle.config='%s'", r.config, text, r.config)
}

// compare tries a configuration with iptables, with Sluice, and with both.
func (l *lab) compare(q request) (report, error) {
	all := probes(q.config, q.slow)
	out := report{request: q, probes: len(all)}
	var sites []*site
	for _, r := range q.iptables {
		sites = append(sites, l.site(r, q.Families))
	}
	sites = append(sites, l.site(sluice, q.Families))
	for _, r := range q.iptables {
		sites = append(sites, l.site(r.and(), q.Families))
	}
	results, err := tryAll(sites, q, all)
	if err != nil {
		return out, fmt.Errorf("configuration %s: %w", q.config, err)
	}
	normal := q.config
	if normal.Rules, err = q.Rules.Normalise(); err != nil {
		return out, err
	}
	for i, s := range sites[1:] {
		for _, p := range s.only(normal, all) {
			iptables, got := results[0][p], results[i+1][p]
			ok, want := l.judge(s, normal, p, iptables, got)
			if !ok {
				out.differences = append(out.differences, difference(s, p, iptables, want, got))
			}
		}
	}
	return out, nil
}

// judge compares with iptables what another site did: the other backend of
// iptables, or Sluice, with or without iptables below it.
func (l *lab) judge(s *site, c config, p probe, iptables, got outcome) (ok bool, want outcome) {
	if !s.sluice {
		return sameButPorts(iptables, got), iptables
	}
	ok, want, ids := judge(c, p, s.iptables != "", iptables, got)
	for _, id := range ids {
		l.used[id]++
	}
	return ok, want
}

// tryAll runs the probes in every site at once.
func tryAll(sites []*site, q request, all []probe) ([]map[probe]outcome, error) {
	results := make([]map[probe]outcome, len(sites))
	errs := make([]error, len(sites))
	var work sync.WaitGroup
	for i, s := range sites {
		work.Go(func() {
			if results[i], errs[i] = s.try(q.config, q.omit, s.only(q.config, all)); errs[i] != nil {
				errs[i] = fmt.Errorf("%s: %w", s, errs[i])
			}
		})
	}
	work.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return results, nil
}

// only are the probes that are run in this site: in TPROXY mode Sluice and Istio's rules
// get in each other's way where a machine's interface is rerouted (the difference
// "both-tproxy-rerouted").
func (s *site) only(c config, all []probe) (out []probe) {
	both := s.sluice && s.iptables != ""
	for _, p := range all {
		x := comparison{config: c, probe: p}
		if !both || !c.byTProxy() || !x.entersRerouted() {
			out = append(out, p)
		}
	}
	return out
}

func isLocal(a netip.Addr) bool {
	return a.IsLoopback() || a.IsUnspecified() || slices.Contains(own, a) || slices.Contains(inner, a) || a == lo[4]
}

// sameButPorts compares two backends of iptables. Which client finds its port
// taken is chance.
func sameButPorts(a, b outcome) bool {
	for _, o := range []*outcome{&a, &b} {
		o.ByPeer = strings.Replace(o.ByPeer, " other", " p", 1)
	}
	if a.First != nil && b.First != nil && !sameButPorts(*a.First, *b.First) {
		return false
	}
	a.First, b.First = nil, nil
	return a.equal(b)
}

func difference(s *site, p probe, iptables, want, got outcome) string {
	text := fmt.Sprintf("%s: %s\n  iptables %s\n  got      %s", s, p, iptables, got)
	if !want.equal(iptables) {
		text += fmt.Sprintf("\n  wanted   %s", want)
	}
	return text
}
