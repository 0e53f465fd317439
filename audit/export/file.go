package export

import (
	"bytes"
	"errors"
	"io"
	"os"
	"syscall"

	"github.com/halligan-io/halligan/internal/fault"
)

// File is a sink that appends lines to a private file.
type File struct {
	path string
	f    *os.File
	b    bytes.Buffer
}

// OpenFile opens a file to append to. A line at its end that a crash has left
// unfinished is cut when again says that a cursor goes on with this file: the
// event goes out again whole.
func OpenFile(path string, again bool) (*File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fault.New(fault.Usage, "name a file that you may write to", "%w", err)
	}
	s := &File{path: path, f: f}
	if again {
		if err := s.cutTorn(); err != nil {
			_ = f.Close()
			return nil, err
		}
	}
	return s, nil
}

// maxRecord bounds a record, in bytes: an OCSF event holds its entry, whose bytes
// may each become an escape of six, and some of its fields beside it.
const maxRecord = 2 << 20

func (s *File) cutTorn() error {
	size, err := s.f.Seek(0, io.SeekEnd)
	if err != nil || size == 0 {
		return err
	}
	tail := make([]byte, min(size, maxRecord))
	if _, err := s.f.ReadAt(tail, size-int64(len(tail))); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	whole := int64(bytes.LastIndexByte(tail, '\n') + 1)
	if whole == 0 && size > int64(len(tail)) {
		return fault.New(fault.Usage, "name a file that holds nothing but exported events", "%s has no line end in its last %d bytes", s.path, len(tail))
	}
	return s.f.Truncate(size - int64(len(tail)) + whole)
}

// Name is the file's.
func (s *File) Name() string { return "file:" + s.path }

// Write takes a line, which Commit makes durable.
func (s *File) Write(record []byte) error {
	s.b.Write(record)
	s.b.WriteByte('\n')
	if s.b.Len() < 1<<20 {
		return nil
	}
	return s.flush()
}

func (s *File) flush() error {
	_, err := s.f.Write(s.b.Bytes())
	s.b.Reset()
	return err
}

// Commit writes and syncs.
func (s *File) Commit() error {
	if err := s.flush(); err != nil {
		return err
	}
	return s.f.Sync()
}

// Close closes the file. What was not committed is lost.
func (s *File) Close() error { return s.f.Close() }
