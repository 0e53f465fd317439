package export

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"syscall"

	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
)

// Cursor remembers, for one format and one sink, the sequence number that each log
// goes on with. The zero value remembers nothing, and begins at the beginning.
type Cursor struct {
	path string
	lock *os.File
	file cursorFile
}

// cursorFile is the file of a cursor, which is private to its user.
type cursorFile struct {
	Version int    `json:"version"`
	Format  string `json:"format"`
	To      string `json:"to"`
	// Next is by ORIGIN/LINEAGE.
	Next map[string]uint64 `json:"next"`
}

const cursorVersion = 1

// OpenCursor reads the cursor of a file, or begins a new one. It refuses one that
// was made for something else, which would skip events, and one that another
// process uses.
func OpenCursor(path, format, to string) (*Cursor, error) {
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fault.New(fault.Usage, "name a file in a folder that you may write to", "cursor: %w", err)
	}
	c := &Cursor{path: path, lock: lock, file: cursorFile{Version: cursorVersion, Format: format, To: to, Next: map[string]uint64{}}}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fault.New(fault.Failed, "wait for it", "another export uses the cursor %s: %w", path, err)
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	read := cursorFile{Next: map[string]uint64{}}
	if err == nil {
		err = durable.CheckPrivate(path)
	}
	if err == nil {
		err = json.Unmarshal(data, &read)
	}
	switch {
	case err != nil:
		err = fault.New(fault.Failed, "see what is wrong with it, or remove it to send everything again", "cursor %s: %w", path, err)
	case read.Version != cursorVersion:
		err = fault.New(fault.Usage, "use the release that made it, or remove it to send everything again", "cursor %s is of version %d", path, read.Version)
	case read.Format != format || read.To != to:
		err = fault.New(fault.Usage, "give each format and receiver a cursor of its own", "cursor %s is for %s to %s", path, read.Format, read.To)
	}
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	c.file.Next = read.Next
	return c, nil
}

// Next is the number of the first event of a log that has not gone out.
func (c *Cursor) Next(l Log) uint64 { return c.file.Next[l.key()] }

func (c *Cursor) moveTo(l Log, seq uint64) {
	if c.file.Next == nil {
		c.file.Next = map[string]uint64{}
	}
	c.file.Next[l.key()] = seq
}

// Save makes the cursor durable.
func (c *Cursor) Save() error {
	if c.path == "" {
		return nil
	}
	data, err := json.MarshalIndent(c.file, "", "  ")
	if err != nil {
		return err
	}
	return durable.Write(c.path, append(data, '\n'))
}

// Close lets another process have it. What was not saved is forgotten.
func (c *Cursor) Close() error {
	if c.lock == nil {
		return nil
	}
	return c.lock.Close()
}
