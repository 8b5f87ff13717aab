// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"
)

// file is a file of the image; root owns it.
type file struct {
	Data []byte
	Mode int64
}

// tarOf makes a tar of files by path, their directories before them, in the
// order of their names.
func tarOf(files map[string]file, when time.Time) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	made := map[string]bool{".": true}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := addDirs(w, path.Dir(name), made, when); err != nil {
			return nil, err
		}
		if err := addFile(w, name, files[name], when); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}

func addDirs(w *tar.Writer, dir string, made map[string]bool, when time.Time) error {
	if made[dir] {
		return nil
	}
	if err := addDirs(w, path.Dir(dir), made, when); err != nil {
		return err
	}
	made[dir] = true
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: when})
}

func addFile(w *tar.Writer, name string, f file, when time.Time) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(f.Data)), Mode: f.Mode, ModTime: when}); err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	_, err := w.Write(f.Data)
	return err
}

// archive makes one tar of all that is below dir.
func archive(dir, to string, when time.Time) error {
	files := map[string]file{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(dir, name)
		files[filepath.ToSlash(relative)] = file{data, 0o644}
		return err
	})
	if err != nil {
		return fmt.Errorf("read the layout: %w", err)
	}
	data, err := tarOf(files, when)
	return errors.Join(err, os.WriteFile(to, data, 0o644))
}
