package install

import (
	"bytes"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/sluice-mesh/sluice/pkg/conflist"
)

// module is what the build information of every binary of Sluice names.
const module = "github.com/sluice-mesh/sluice"

// verified is what the binary and its source were when they last were equal, so
// that a look need not read both.
type verified struct{ source, installed os.FileInfo }

func (i *Installer) binary() string { return filepath.Join(i.opts.BinDir, conflist.Type) }

// ensureBinary copies the plugin if it is not there, or another, or not to be
// executed.
func (i *Installer) ensureBinary(now time.Time) error {
	source, err := os.Open(i.opts.Plugin)
	if err != nil {
		return fmt.Errorf("the plugin to install is not in this image: %w", err)
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		return fmt.Errorf("the plugin to install: %w", err)
	}
	installed, err := os.Lstat(i.binary())
	if err == nil && installed.Mode() == 0o755 {
		if sameFile(info, i.verified.source) && sameFile(installed, i.verified.installed) {
			return nil
		}
		if same, err := sameContent(i.opts.Plugin, i.binary()); err == nil && same {
			i.verified = verified{info, installed}
			return nil
		}
	}
	if wait := i.bin.missing(now); wait > 0 {
		return &waitError{contestedBinary(i.binary(), i.bin.losses), wait}
	}
	// The runtime runs as root whoever we are; the mode is all that counts.
	a := attributes{mode: 0o755, uid: -1, gid: -1}
	if err := i.disk.replace(i.binary(), a, func(w io.Writer) error {
		_, err := io.Copy(w, source)
		return err
	}, nil); err != nil {
		return err
	}
	i.bin.placed(now)
	i.log.WithField(fieldFile, i.binary()).Info("CNI plugin copied")
	return nil
}

// removeBinary removes the plugin if it is Sluice's, of whatever version.
func (i *Installer) removeBinary() error {
	info, err := os.Lstat(i.binary())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for the plugin: %w", advise(err))
	}
	if !info.Mode().IsRegular() || !i.isOurs() {
		i.log.WithField(fieldFile, i.binary()).Warn("binary is not Sluice's and stays")
		return nil
	}
	return i.disk.remove(i.binary())
}

// isOurs says whether the binary was built from Sluice, or is the very file that
// was to be installed.
func (i *Installer) isOurs() bool {
	if info, err := buildinfo.ReadFile(i.binary()); err == nil && info.Main.Path == module {
		return true
	}
	same, err := sameContent(i.opts.Plugin, i.binary())
	return err == nil && same
}

// sameContent compares two files.
func sameContent(a, b string) (bool, error) {
	var files [2]*os.File
	for n, path := range []string{a, b} {
		f, err := os.Open(path)
		if err != nil {
			return false, err
		}
		defer f.Close()
		files[n] = f
	}
	var buffers [2][64 << 10]byte
	for {
		m, errA := io.ReadFull(files[0], buffers[0][:])
		n, errB := io.ReadFull(files[1], buffers[1][:])
		if !bytes.Equal(buffers[0][:m], buffers[1][:n]) {
			return false, nil
		}
		if errA != nil || errB != nil { // both at the end, or one not readable
			return atEnd(errA) && atEnd(errB), nil
		}
	}
}

func atEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
