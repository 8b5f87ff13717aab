package bench

import (
	"errors"
	"time"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/rules"
)

// setups measures how long one pod's redirection takes to write, in namespaces
// that are ready and empty, as a runtime hands them to a CNI plugin: Enroll in
// this process, beside one iptables-restore of the same rules.
func (b *stage) setups() (workload, func() error, error) {
	w := workload{name: "enroll", unit: "us", rounds: b.opts.rounds() / 3}
	sites := map[string]*site{}
	closeAll := func() error {
		var errs error
		for _, s := range sites {
			errs = errors.Join(errs, s.Close())
		}
		return errs
	}
	for _, name := range []string{legacy, nft, sluice, sluiceNoTC} {
		if b.backends[name] == nil {
			continue
		}
		s, err := newSite()
		if err != nil {
			return w, nil, errors.Join(err, closeAll())
		}
		sites[name] = s
		w.backends = append(w.backends, name)
	}
	w.slice = func(name string) (map[string][]float64, error) {
		switch name {
		case legacy:
			return timeRestore(sites[name], "legacy")
		case nft:
			return timeRestore(sites[name], "nft")
		}
		return b.timeEnroll(sites[name], name == sluiceNoTC)
	}
	return w, closeAll, nil
}

func timeRestore(s *site, kind string) (map[string][]float64, error) {
	command, err := restoreCommand(kind)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	err = restore(s.pod, command)
	return single([]float64{float64(time.Since(start))}), err
}

func (b *stage) timeEnroll(s *site, noGuard bool) (map[string][]float64, error) {
	var out []float64
	for range 3 {
		start := time.Now()
		_, err := b.node.datapath.Enroll(s.pod, datapath.Pod{Rules: rules.Default(), NoGuard: noGuard})
		out = append(out, float64(time.Since(start)))
		if err != nil {
			return nil, err
		}
		if _, err := b.node.datapath.Unenroll(s.pod.Cookie(), s.pod); err != nil {
			return nil, err
		}
	}
	return single(out), nil
}
