package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// Slots are files full of zeros that become records when the disk takes nothing
// more, for small actions of people in a role that can act: their blocks, their
// inode and their name in the folder are there already. Lines are written over the
// zeros and each is made durable before the next one, so that at most the last can be
// torn; the end of the record cuts the rest off. (A file system that copies on write
// or compresses keeps no such promise.)
const (
	slotCount  = 16
	slotBytes  = 256 << 10
	slotSuffix = ".slot"
	// slotSpare of a slot is left for what cannot be known when it is taken.
	slotSpare = 32 << 10
)

// Refill makes the slots that are missing as long as the disk has room for more than
// them. It is called every few seconds.
func (j *Journal) Refill() error {
	if err := j.Ready(); err != nil {
		return nil // others say so
	}
	j.mu.Lock()
	missing := slotCount - len(j.slots)
	have := map[string]bool{}
	for _, name := range j.slots {
		have[name] = true
	}
	j.mu.Unlock()
	if missing == 0 || j.Check(2*headroom+int64(missing)*slotBytes) != nil {
		return nil
	}
	zeros := make([]byte, slotBytes)
	for i := range slotCount {
		name := filepath.Join(j.dir, fmt.Sprintf("%02d%s", i, slotSuffix))
		if have[name] {
			continue
		}
		if err := durable.Write(name, zeros); err != nil {
			return unavailable("setting records aside for when the disk is full", err)
		}
		j.mu.Lock()
		j.slots = append(j.slots, name)
		j.mu.Unlock()
	}
	return nil
}

// Slots returns how many small actions can be recorded when the disk takes nothing.
func (j *Journal) Slots() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.slots)
}

// CheckFor is Check for somebody, who may use what is kept for a full disk.
func (j *Journal) CheckFor(access Access, bytes int64) error {
	err := j.Check(bytes)
	if err != nil && access.BreakGlass && bytes+slotSpare <= slotBytes && j.Ready() == nil && j.Slots() > 0 && !errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// found takes a slot into the index, or removes what is none; j.mu is held.
func (j *Journal) found(n fs.DirEntry) {
	path := filepath.Join(j.dir, n.Name())
	if st, err := n.Info(); err == nil && st.Mode().IsRegular() && st.Size() == slotBytes && durable.CheckPrivate(path) == nil {
		j.slots = append(j.slots, path)
		return
	}
	_ = os.Remove(path)
}

// slot makes a slot the file of a record.
func (j *Journal) slot(access Access, id string, reserve int64) (*os.File, error) {
	if !access.BreakGlass || reserve+slotSpare > slotBytes {
		return nil, errNoSlot
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.slots) == 0 {
		return nil, errNoSlot
	}
	if _, err := os.Lstat(j.path(id)); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is a record of %s", id)
	}
	path := j.slots[len(j.slots)-1]
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	j.slots = j.slots[:len(j.slots)-1]
	if err = os.Rename(path, j.path(id)); err == nil {
		err = durable.SyncDir(j.dir)
	}
	if err != nil {
		f.Close()
		_ = os.Remove(j.path(id)) // without an intent it is no record
		return nil, err
	}
	return f, nil
}

var errNoSlot = errors.New("no slot")

// giveBack makes a record that nothing was done for a slot again; j.mu is held.
func (a *Action) giveBack() error {
	j, path := a.j, ""
	for i := range slotCount {
		path = filepath.Join(j.dir, fmt.Sprintf("%02d%s", i, slotSuffix))
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	err := wipe(a.file, 0)
	if err == nil {
		err = os.Rename(j.path(a.entry.ID), path)
	}
	if err == nil {
		err = durable.SyncDir(j.dir)
	}
	if err == nil {
		j.slots = append(j.slots, path)
	}
	return err
}

// wipe writes zeros over the rest of a slot.
func wipe(f *os.File, from int64) error {
	if _, err := f.WriteAt(make([]byte, slotBytes-from), from); err != nil {
		return err
	}
	return unix.Fdatasync(int(f.Fd()))
}

// appendSlot is append for a slot; a.mu is held.
func (a *Action) appendSlot(data []byte) error {
	if a.written+int64(len(data)) > slotBytes {
		return fault.New(fault.AuditUnavailable, "free space on the file system of the agent's state folder", "recording: what is kept for a full disk takes %d KiB", slotBytes>>10)
	}
	_, err := a.file.WriteAt(data, a.written)
	if err == nil {
		err = unix.Fdatasync(int(a.file.Fd()))
	}
	if err != nil {
		a.failed = unavailable("recording", err)
		return a.failed
	}
	a.written += int64(len(data))
	a.synced = a.written
	return nil
}

// torn reports whether a line of a slot that cannot be read was its last one, which
// was not acknowledged: of several pages any may be on disk.
func torn(rest *lineReader) bool {
	for {
		raw, err := rest.next()
		if err != nil {
			return true
		}
		if _, err := unseal(raw); err == nil {
			return false
		}
	}
}

func isSlot(name string) bool { return strings.HasSuffix(name, slotSuffix) }
