package cni

import (
	"bytes"
	"context"
	"os"
	"strings"
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
	text   *bytes.Buffer
}

func newJournal(c config, fields logrus.Fields) *journal {
	text := new(bytes.Buffer)
	log := logrus.New()
	log.SetOutput(text)
	log.SetFormatter(&logrus.JSONFormatter{})
	return &journal{Entry: log.WithFields(fields), config: c, text: text}
}

func (j *journal) setPod(pod agentapi.Pod) {
	j.Entry = j.WithField("pod", pod.Namespace+"/"+pod.Name)
}

func (j *journal) flush() {
	if j.text.Len() == 0 {
		return
	}
	lines := strings.Split(strings.TrimSuffix(j.text.String(), "\n"), "\n")
	ctx, cancel := context.WithTimeout(context.Background(), logTime)
	defer cancel()
	if _, err := agentapi.Call(ctx, j.config.Socket, agentapi.Request{Verb: agentapi.Log, Lines: lines}, nil); err == nil {
		return
	}
	j.toFile()
}

func (j *journal) toFile() {
	path := j.config.LogFile
	if path == "" {
		return
	}
	if info, err := os.Stat(path); err == nil && info.Size()+int64(j.text.Len()) > maxLog {
		if os.Rename(path, path+".1") != nil {
			return // rather no line than a file without end
		}
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.Write(j.text.Bytes()) // a full disk is somebody else's alarm
}
