package install

import (
	"os"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	// addTime is how long an ADD may take, all waits included.
	addTime = 10 * time.Second
	// addPoll is how often it is looked for plugins that run. None are found twice
	// in a row before none are believed to run: a runtime that has read the old
	// configuration may be about to start one.
	addPoll = 500 * time.Millisecond
)

// Remove removes what an Installer that has ended has left in these directories:
// the entry, and the binary once no plugin runs any more.
func Remove(confDir, binDir string, log logrus.FieldLogger) error {
	i := &Installer{opts: Options{ConfDir: confDir, BinDir: binDir}, log: log}
	i.disk.removeLeftovers(confDir)
	if err := i.removeEntries(); err != nil {
		return err
	}
	i.AwaitIdle()
	return i.RemovePlugin()
}

// Entries are the files of a configuration directory that have an entry of
// Sluice's. What cannot be read has none.
func Entries(confDir string) (paths []string) {
	i := &Installer{opts: Options{ConfDir: confDir}}
	_ = i.eachWithEntry(isConf, func(c *confFile) error {
		paths = append(paths, filepath.Join(confDir, c.name))
		return nil
	})
	return paths
}

// AwaitIdle waits until no plugin runs that can be seen, at most as long as an ADD
// may take. It is for after Withdraw.
func (i *Installer) AwaitIdle() {
	plugin, err := os.Stat(i.binary())
	if err != nil {
		return // it is not there: nobody can run it
	}
	for none, until := 0, time.Now().Add(addTime); none < 2 && time.Now().Before(until); time.Sleep(addPoll) {
		none++
		if runs(plugin) {
			none = 0
		}
	}
}

// runs says whether a process that can be seen runs a program.
func runs(program os.FileInfo) bool {
	paths, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return false
	}
	for _, path := range paths {
		if running, err := os.Stat(path); err == nil && os.SameFile(running, program) {
			return true
		}
	}
	return false
}
