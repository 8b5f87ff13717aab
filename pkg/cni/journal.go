package cni

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/sluice-mesh/sluice/pkg/agentapi"
)

const (
	// logTime is how long the daemon may take to take a log.
	logTime = 100 * time.Millisecond
	// maxLog is the size in bytes at which the log file becomes its own
	// predecessor: two of them at most.
	maxLog = 10 << 20
)

// journal collects one call's log lines, and gives them to the daemon at its
// end, or to a file. Nothing that can go wrong with them is an error.
type journal struct {
	*logrus.Entry
	config config
	text   *pages
}

// pages are written by a verb, and read when its time is over, whether or not it
// has come to its end.
type pages struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (p *pages) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(line)
}

func (p *pages) take() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String()
}

func newJournal(c config, fields logrus.Fields) *journal {
	text := new(pages)
	log := logrus.New()
	log.SetOutput(text)
	log.SetFormatter(&logrus.JSONFormatter{})
	return &journal{Entry: log.WithFields(fields), config: c, text: text}
}

func (j *journal) flush() {
	text := j.text.take()
	if text == "" {
		return
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	ctx, cancel := context.WithTimeout(context.Background(), logTime)
	defer cancel()
	if _, err := agentapi.Call(ctx, j.config.Socket, agentapi.Request{Verb: agentapi.Log, Lines: lines}, nil); err != nil {
		toFile(j.config.LogFile, text)
	}
}

// toFile appends to a file, as long as it is one: a full disk, a file system that
// cannot be written or a directory that is not there is somebody else's alarm.
func toFile(path, text string) {
	if path == "" {
		return
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil || !info.Mode().IsRegular(): // a FIFO would make us wait for its reader
		return
	case info.Size()+int64(len(text)) > maxLog:
		if os.Rename(path, path+".1") != nil {
			return // rather no line than a file without end
		}
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.WriteString(text)
}
