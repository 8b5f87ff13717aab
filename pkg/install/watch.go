package install

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/sirupsen/logrus"
)

// watch waits for changes in directories, of which some may not exist yet. It
// says that something changed, not what: looking is cheap, and an event that is
// lost or misread costs nothing.
type watch struct {
	log     logrus.FieldLogger
	time    timing
	open    func() (*fsnotify.Watcher, error)
	watcher *fsnotify.Watcher // nil if the kernel has none left
	blind   bool              // something is not watched: poll
	warned  bool
}

func (w *watch) close() {
	if w.watcher != nil {
		_ = w.watcher.Close()
	}
}

// follow watches the directories, and for one that is missing the nearest one
// above it. To watch what is watched already changes nothing, unless the path
// leads elsewhere now.
func (w *watch) follow(dirs ...string) {
	w.blind = false
	if w.watcher == nil {
		var err error
		if w.watcher, err = w.open(); err != nil {
			w.watcher = nil
			w.cannot(err)
			return
		}
	}
	wanted := map[string]bool{}
	for _, dir := range dirs {
		// Once more after a directory above it was found: something may have
		// been made in between, and nobody would tell.
		for at, before := w.nearest(dir), ""; ; before, at = at, w.nearest(dir) {
			wanted[at] = true
			if at == dir || at == before {
				break
			}
		}
	}
	for _, path := range w.watcher.WatchList() {
		if !wanted[path] {
			_ = w.watcher.Remove(path)
		}
	}
}

// nearest watches a directory, or the nearest one above it that exists.
func (w *watch) nearest(dir string) string {
	for {
		err := w.watcher.Add(dir)
		if err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir || !errors.Is(err, os.ErrNotExist) {
			w.cannot(err)
			return dir
		}
		dir = parent
	}
}

// cannot has wait poll, and says so once.
func (w *watch) cannot(err error) {
	w.blind = true
	if !w.warned {
		w.warned = true
		w.log.WithError(err).WithField(fieldRetry, w.time.poll).Warn(
			"CNI directories cannot be watched and are polled: raise fs.inotify.max_user_instances and max_user_watches on the node")
	}
}

// wait returns at an event, after the time given, or when ctx ends.
func (w *watch) wait(ctx context.Context, limit time.Duration) {
	if w.blind {
		limit = min(limit, w.time.poll)
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	var events chan fsnotify.Event
	var errs chan error
	if w.watcher != nil {
		events, errs = w.watcher.Events, w.watcher.Errors
	}
	burst := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-events:
		case err := <-errs: // events were lost: look
			w.log.WithError(err).Debug("CNI directories: events lost")
		}
		if !burst { // what follows within moments is for the same look
			burst = true
			timer.Reset(w.time.burst)
		}
	}
}
