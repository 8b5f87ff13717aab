// Package keep keeps enrolled pods current: it watches their namespaces and
// refreshes what the datapath knows of them. It enrols and un-enrols nobody.
package keep

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/datapath"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// The names of the log's fields.
const (
	fieldPod    = "pod"
	fieldCookie = "cookie"
	fieldWhich  = "which"
	fieldCount  = "count"
)

const (
	pollPods   = time.Second           // for pods that come and go
	pollAlive  = 5 * time.Second       // for namespaces that nobody else holds any more
	retryBusy  = 50 * time.Millisecond // of a namespace that changed while it was read
	retryError = 5 * time.Second       // of a refresh that failed otherwise
	shown      = 8                     // changes of a kind that are logged one by one
)

// Keeper watches the pods of a datapath.
type Keeper struct {
	datapath *datapath.Datapath
	log      logrus.FieldLogger
	find     func() map[uint64]string // the paths of the living namespaces
	pods     map[uint64]*pod
	sought   map[uint64]bool // pods whose namespace was not to be found
	looked   time.Time       // when the namespaces were listed
	refresh  sync.Mutex      // one after the other: the datapath has one lock
}

// pod is one that is watched.
type pod struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// New makes a Keeper of an open datapath, which it does not close.
func New(d *datapath.Datapath, log logrus.FieldLogger) *Keeper {
	return &Keeper{datapath: d, log: log, find: netns.ByCookie, pods: map[uint64]*pod{}, sought: map[uint64]bool{}}
}

// Run keeps every enrolled pod current until ctx is done, which is no error, or
// the datapath is taken down. A pod that is enrolled later is watched within two
// seconds, if a process or a name (ip netns) leads to its namespace. For each there
// is a goroutine and a netlink socket in its namespace, and so the namespace lives
// until Run sees that the pod is not enrolled any more, up to a second, or that
// nobody else holds the namespace, up to six. (A socket elsewhere could hear of it by
// NETLINK_LISTEN_ALL_NSID, with CAP_NET_BROADCAST, and would hear of all others too.)
func (k *Keeper) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer k.wait()
	defer cancel()
	tick := time.NewTicker(pollPods)
	defer tick.Stop()
	for {
		if err := k.datapath.StillUp(); err != nil {
			return err
		}
		if err := k.look(ctx); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (k *Keeper) wait() {
	for _, p := range k.pods {
		<-p.done
	}
}

// look begins to watch new pods, and leaves those that are gone.
func (k *Keeper) look(ctx context.Context) error {
	cookies, err := k.datapath.Cookies()
	if err != nil {
		return err
	}
	enrolled, fresh := map[uint64]bool{}, false
	for _, cookie := range cookies {
		enrolled[cookie] = true
		fresh = fresh || k.pods[cookie] == nil && !k.sought[cookie]
	}
	for cookie, p := range k.pods {
		if !enrolled[cookie] {
			p.cancel()
		}
		select {
		case <-p.done: // if it failed, it begins anew
			delete(k.pods, cookie)
		default:
		}
	}
	if !fresh && time.Since(k.looked) < pollAlive {
		return nil
	}
	paths := k.find()
	k.looked = time.Now()
	for cookie, p := range k.pods {
		if _, alive := paths[cookie]; !alive {
			k.log.WithField(fieldCookie, cookie).Info("namespace gone")
			p.cancel()
		}
	}
	clear(k.sought)
	for _, cookie := range cookies {
		path, alive := paths[cookie]
		if !alive {
			k.sought[cookie] = true
		} else if k.pods[cookie] == nil {
			k.begin(ctx, cookie, path)
		}
	}
	return nil
}

func (k *Keeper) begin(ctx context.Context, cookie uint64, path string) {
	ns, err := netns.Open(path)
	if err != nil {
		return // it ended meanwhile
	}
	if ns.Cookie() != cookie { // the path leads elsewhere by now
		ns.Close()
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &pod{cancel: cancel, done: make(chan struct{})}
	k.pods[cookie] = p
	go func() {
		defer close(p.done)
		defer cancel()
		defer ns.Close()
		k.watch(ctx, ns)
	}()
}

// watch refreshes a pod whenever its namespace changes, until ctx is done or the
// pod is not enrolled any more.
func (k *Keeper) watch(ctx context.Context, ns *netns.NetNS) {
	log := k.log.WithField(fieldCookie, ns.Cookie())
	changes, err := ns.Subscribe()
	if err != nil {
		log.WithError(err).Error("namespace cannot be watched")
		return
	}
	defer changes.Close()
	said := ""
	for ctx.Err() == nil {
		k.refresh.Lock()
		done, err := k.datapath.Refresh(ns)
		k.refresh.Unlock()
		k.report(log, done)
		retry := time.Duration(0)
		switch {
		case errors.Is(err, datapath.ErrNotEnrolled):
			return
		case errors.Is(err, netns.ErrChanging):
			retry = retryBusy
		case err != nil:
			retry = retryError
			if said != err.Error() { // once, not every few seconds
				said = err.Error()
				log.WithField(fieldPod, done.Pod).WithError(err).Error("pod not current")
			}
		case said != "":
			said = ""
			log.WithField(fieldPod, done.Pod).Info("pod current again")
		}
		if err := k.await(ctx, changes, retry); err != nil {
			log.WithError(err).Error("namespace cannot be watched")
			return
		}
	}
}

// await waits for a change, or until it is time to try again.
func (k *Keeper) await(ctx context.Context, changes *netns.Changes, retry time.Duration) error {
	if retry > 0 {
		limited, cancel := context.WithTimeout(ctx, retry)
		defer cancel()
		ctx = limited
	}
	err := changes.Wait(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// report logs what changed; of many changes of a kind just their number.
func (k *Keeper) report(log logrus.FieldLogger, done datapath.Refreshed) {
	log = log.WithField(fieldPod, done.Pod)
	counts := map[string]int{}
	for _, c := range done.Changes {
		counts[c.What]++
	}
	for _, c := range done.Changes {
		switch n := counts[c.What]; {
		case n > shown:
			log.WithField(fieldCount, n).Info(c.What)
			counts[c.What] = 0
		case n > 0:
			log.WithField(fieldWhich, c.Which).Info(c.What)
		}
	}
}
