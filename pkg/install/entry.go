package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

// ciliumBackup is what Cilium appends to the names of files that it puts aside,
// and takes off again when it goes.
const ciliumBackup = ".cilium_bak"

func content(data []byte) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	}
}

// ensureEntry puts the entry into the chosen file, unless it is there or was
// overwritten too often. It returns the path of the file that has it.
func (i *Installer) ensureEntry(c *confFile, now time.Time) (string, error) {
	entry := i.opts.Entry
	entry.Origin = nil
	if c.link != "" && c.list.Ours == nil {
		entry.Origin = &conflist.Origin{Link: c.link}
	}
	if len(c.list.Others()) == 0 {
		return "", fmt.Errorf("%s holds nothing but Sluice, which needs a plugin before it: remove the file", c.path)
	}
	if isSingle(c.name) {
		return i.convert(c, entry, now)
	}
	edited, err := conflist.Insert(c.data, entry)
	if err != nil {
		return "", fmt.Errorf("%s: %w", c.path, err)
	}
	if bytes.Equal(edited, c.data) {
		return c.path, nil
	}
	if c.list.Ours == nil {
		if wait := i.conf.missing(now); wait > 0 {
			return "", &waitError{contestedConf(c.path, c.list, i.conf.losses), wait}
		}
	}
	// A link is replaced by a file: the runtime watches this directory, not the
	// one it points to, and that file may be a package's.
	if err := i.disk.replace(c.path, attributesOf(c.info), content(edited), c.unchanged); err != nil {
		return "", err
	}
	i.conf.placed(now)
	i.log.WithField(fieldFile, c.path).WithField(fieldNetwork, c.list.Name).Info("CNI configuration edited")
	return c.path, nil
}

// convert makes a .conflist of a .conf, which has no room for a second plugin,
// and removes the .conf, which would come first.
func (i *Installer) convert(c *confFile, entry conflist.Entry, now time.Time) (string, error) {
	name := strings.TrimSuffix(c.name, filepath.Ext(c.name)) + ".conflist"
	path := filepath.Join(i.opts.ConfDir, name)
	if err := i.mayConvertTo(path, c.name); err != nil {
		return "", err
	}
	if wait := i.conf.missing(now); wait > 0 {
		return "", &waitError{contestedConf(c.path, c.list, i.conf.losses), wait}
	}
	entry.Origin = &conflist.Origin{Conf: c.name, Link: c.link}
	edited, err := conflist.Convert(c.data, entry)
	if err != nil {
		return "", fmt.Errorf("%s: %w", c.path, err)
	}
	if err := i.disk.replace(path, attributesOf(c.info), content(edited), c.unchanged); err != nil {
		return "", err
	}
	if err := c.unchanged(); err != nil {
		return "", fmt.Errorf("%s: %w", c.path, err)
	}
	if err := i.disk.remove(c.path); err != nil {
		return "", err
	}
	i.conf.placed(now)
	i.log.WithField(fieldFile, path).WithField(fieldNetwork, c.list.Name).Info("CNI configuration converted to a list")
	return path, nil
}

// mayConvertTo refuses to overwrite a file that is not an earlier conversion of
// the same one.
func (i *Installer) mayConvertTo(path, from string) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read CNI configuration: %w", advise(err))
	}
	list, err := conflist.Parse(data)
	if err == nil && list.Ours != nil && list.Ours.Origin != nil && list.Ours.Origin.Conf == from {
		return nil
	}
	return fmt.Errorf("the runtime uses %s, which Sluice would convert to %s, and somebody else's file has that name: remove one of them",
		from, path)
}

// cleanOthers takes the entry out of files that the runtime does not use, or no
// longer: there it would outlive an uninstall of the other CNI, or come twice.
func (i *Installer) cleanOthers(chosen string) error {
	return i.eachWithEntry(isConf, func(c *confFile) error {
		if c.path == chosen {
			return nil
		}
		return i.takeOut(c, chosen)
	})
}

// removeEntries takes the entry out everywhere.
func (i *Installer) removeEntries() error {
	backup := func(name string) bool {
		return isConf(name) || isConf(strings.TrimSuffix(name, ciliumBackup))
	}
	return i.eachWithEntry(backup, func(c *confFile) error { return i.takeOut(c, "") })
}

// eachWithEntry calls f with every file of the directory that has an entry of
// Sluice. Symbolic links are left out: Sluice writes no entry through one.
func (i *Installer) eachWithEntry(name func(string) bool, f func(*confFile) error) error {
	entries, err := os.ReadDir(i.opts.ConfDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for CNI configurations: %w", advise(err))
	}
	var errs []error
	for _, entry := range entries {
		if !entry.Type().IsRegular() || !name(entry.Name()) {
			continue
		}
		c, err := readConf(i.opts.ConfDir, entry.Name())
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if conflist.Contains(c.data) {
			_ = c.parse() // of what is no list, the entries are removed all the same
			errs = append(errs, f(c))
		}
	}
	return errors.Join(errs...)
}

// takeOut gives a file back as it was before Sluice came. Nothing that sorts
// before keepFirst is brought back, or the runtime would use that.
func (i *Installer) takeOut(c *confFile, keepFirst string) error {
	origin := conflist.Origin{}
	if c.list.Ours != nil && c.list.Ours.Origin != nil {
		origin = *c.list.Ours.Origin
	}
	i.log.WithField(fieldFile, c.path).Info("CNI configuration freed of the entry")
	single := filepath.Join(i.opts.ConfDir, filepath.Base(origin.Conf))
	if conf, ok := conflist.Restore(c.data); ok && isList(c.name) && isSingle(single) && single > keepFirst {
		return i.restoreConf(c, single, origin.Link, conf)
	}
	rest, err := conflist.Remove(c.data)
	if err != nil {
		return fmt.Errorf("%s: %w", c.path, err)
	}
	if isList(c.name) && len(c.list.Types) > 0 && len(c.list.Others()) == 0 {
		return i.disk.remove(c.path) // nothing but Sluice was in it
	}
	return i.putBack(c, c.path, origin.Link, rest)
}

// restoreConf undoes convert. Where somebody has written the .conf anew, that
// is the one to keep.
func (i *Installer) restoreConf(c *confFile, single, link string, conf []byte) error {
	_, err := os.Lstat(single)
	if errors.Is(err, os.ErrNotExist) {
		err = i.putBack(c, single, link, conf)
	}
	if err != nil {
		return err
	}
	return i.disk.remove(c.path)
}

// putBack writes a file, or makes it the link that it was if what it points to
// still says the same.
func (i *Installer) putBack(c *confFile, path, link string, data []byte) error {
	if link != "" {
		target := link
		if !filepath.IsAbs(target) {
			target = filepath.Join(i.opts.ConfDir, target)
		}
		if linked, err := os.ReadFile(target); err == nil && bytes.Equal(linked, data) {
			return i.disk.link(link, path)
		}
	}
	return i.disk.replace(path, attributesOf(c.info), content(data), c.unchanged)
}
