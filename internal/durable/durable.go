// Package durable writes files that survive a power cut, and is the one place
// that does: a file is written beside its final name, synced, renamed, and its
// folder synced, so that a reader sees the old content or the new one, never a
// part of it.
//
// Private material goes through here: folders are 0700 and files 0600, and laxer
// ones are refused. It must never remove what it did not write. It stands on
// floor 0.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Dir makes a private folder with all its parents, durable, or checks one that
// is there: owned by this process's user and open to nobody else.
func Dir(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		parent := filepath.Dir(path)
		if _, perr := os.Lstat(parent); errors.Is(perr, fs.ErrNotExist) {
			if err := Dir(parent); err != nil {
				return err
			}
		}
		if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return SyncDir(parent)
	}
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is not a folder", path)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o; others may look into it: chmod 700 it", path, st.Mode().Perm())
	}
	return nil
}

// CheckPrivate refuses a file that others than its owner may read or write.
func CheckPrivate(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o; others may read it: chmod 600 it", path, st.Mode().Perm())
	}
	return nil
}

// Write replaces the file's content atomically and durably.
func Write(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	if _, err = tmp.Write(data); err != nil {
		return err
	}
	if err = tmp.Sync(); err != nil {
		return err
	}
	if err = tmp.Close(); err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// SyncDir makes the names in a folder durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
