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
	"syscall"
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
	return owned(path, st)
}

// CheckPrivate refuses what is no plain file of this process's user, and what
// others may read or write. A link is no plain file. A credential that the
// service manager lends this process is private.
func CheckPrivate(path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a plain file", path)
	}
	if lent(path, st) {
		return nil
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o; others may read it: chmod 600 it", path, st.Mode().Perm())
	}
	return owned(path, st)
}

// lent reports whether a file is one of root's that systemd gave to this service
// alone (LoadCredential=, systemd.exec(5)). Where its user is not root, an access
// control list says so, and that shows as a group that may read.
func lent(path string, st fs.FileInfo) bool {
	s, ok := st.Sys().(*syscall.Stat_t)
	return ok && s.Uid == 0 && st.Mode().Perm()&^0o440 == 0 && filepath.IsAbs(path) && filepath.Dir(path) == os.Getenv("CREDENTIALS_DIRECTORY")
}

func owned(path string, st fs.FileInfo) error {
	if s, ok := st.Sys().(*syscall.Stat_t); ok && int(s.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, not to %d as this process: chown it", path, s.Uid, os.Geteuid())
	}
	return nil
}

// Write replaces the file's content atomically and durably, with mode 0600. A
// link of that name is replaced; what it points to stays as it is.
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
