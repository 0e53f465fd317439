// Package cast records what people see in their sessions, as asciicast v2
// (docs.asciinema.org), which stock players play, and reads it again. Recorder is
// for a daemon; the digest of each piece of a recording goes into the log while it
// is written, so that nobody can change one later unnoticed.
//
// A recording must never hold what was revealed of a secret, make a session wait
// for a disk or for the log, or lock out somebody who may have to rescue a
// cluster: where one cannot be written, responders and commanders go on without,
// which is on record, and nobody else does. Text of a recording is as hostile as
// whoever was recorded; only Lines makes it safe for a terminal. It stands on
// floor 2.
package cast

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"path/filepath"
	"regexp"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
)

// What Event.Outcome says in events of kind Recording that have no Chunk, and
// Unrecorded in those of kind Session, too. Target names the recording.
const (
	// Unrecorded: from here on there is no recording, and Error says why.
	Unrecorded = "unrecorded"
	// Recorded: from here on there is one again.
	Recorded = "recorded"
	// Removed: the recording was the oldest one, and had to make room. Its file is
	// gone for good, which is no fault of whoever keeps the log.
	Removed = "removed"
	// Settled: a process ended while it wrote the recording, and the one after it
	// cut a torn last line. The chunk of the whole file follows.
	Settled = "settled"
)

// suffix of the files' names.
const suffix = ".cast"

// names are those of trust.NewSession.
var names = regexp.MustCompile(`^[0-9]{8}-[0-9]{6}-[0-9a-f]{10}$`)

// Valid reports whether a recording can have the name, which is then safe as part
// of a file's.
func Valid(name string) bool { return names.MatchString(name) }

// File returns the path of a recording in the folder recordings of a daemon's
// evidence, or of a copy of it.
func File(dir, name string) (string, error) {
	if !Valid(name) {
		return "", fault.New(fault.Usage, "halligan audit show lists them", "%.60q names no recording", name)
	}
	return filepath.Join(dir, name+suffix), nil
}

// Header is the first line of a recording.
type Header struct {
	Version int `json:"version"`
	// Width and Height of the terminal, in characters. What was written to no
	// terminal has those of one that it can be played in.
	Width  int `json:"width"`
	Height int `json:"height"`
	// Timestamp is when it began, in seconds since 1970.
	Timestamp int64             `json:"timestamp,omitempty"`
	Command   string            `json:"command,omitempty"`
	Title     string            `json:"title,omitempty"`
	Env       map[string]string `json:"env,omitempty"`
}

// Kinds of events in a recording.
const (
	Output = "o"
	Input  = "i"
	Resize = "r" // COLUMNSxROWS
	Marker = "m" // a line that is run
)

// Event is one line of a recording but the first.
type Event struct {
	// At is the time since it began.
	At   time.Duration
	Kind string
	Text string
}

// maxLine bounds a line of a recording in bytes. Those of Session are shorter.
const maxLine = 1 << 20

// ErrTorn is the error for a recording that ends within a line, as one does whose
// machine lost power. What came before is good.
var ErrTorn = errors.New("the recording ends within a line")

// Read returns the header of a recording, and its events as they are read. An
// error is the last of them.
func Read(r io.Reader) (Header, iter.Seq2[Event, error], error) {
	lines := bufio.NewReaderSize(r, 64<<10)
	text, err := line(lines)
	if err == io.EOF {
		err = ErrTorn
	}
	var h Header
	if err == nil {
		h, err = header(text)
	}
	if err != nil {
		return h, nil, fmt.Errorf("reading a recording's header: %w", err)
	}
	return h, func(yield func(Event, error) bool) {
		for n := 2; ; n++ {
			var e Event
			text, err := line(lines)
			if err == io.EOF {
				return
			}
			if err == nil {
				e, err = event(text)
			}
			if err != nil {
				yield(Event{}, fmt.Errorf("line %d: %w", n, err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}, nil
}

// line returns the next line without its end; it is good until the next.
func line(r *bufio.Reader) ([]byte, error) {
	var long []byte
	for {
		part, err := r.ReadSlice('\n')
		switch {
		case err == nil && long == nil:
			return part[:len(part)-1], nil
		case len(long)+len(part) > maxLine:
			return nil, fmt.Errorf("a line has more than %d bytes", maxLine)
		case err == nil:
			return append(long, part[:len(part)-1]...), nil
		case err == io.EOF && len(long)+len(part) > 0:
			return nil, ErrTorn
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
		long = append(long, part...)
	}
}

func header(text []byte) (h Header, err error) {
	if err = json.Unmarshal(text, &h); err == nil && h.Version != 2 {
		err = fmt.Errorf("it is version %d of the format, not 2", h.Version)
	}
	return h, err
}

func event(text []byte) (Event, error) {
	var e Event
	var at float64
	fields := []any{&at, &e.Kind, &e.Text}
	if err := json.Unmarshal(text, &fields); err != nil {
		return Event{}, err
	}
	if len(fields) != 3 || at < 0 || at > (365*24*time.Hour).Seconds() {
		return Event{}, errors.New("it is no event of a recording")
	}
	e.At = time.Duration(at * float64(time.Second))
	return e, nil
}

// encode appends an event as a line, by a buffer of the caller's.
func encode(to *bytes.Buffer, at time.Duration, kind, text string) {
	fmt.Fprintf(to, "[%.6f, %q, ", at.Seconds(), kind)
	e := json.NewEncoder(to)
	e.SetEscapeHTML(false)
	_ = e.Encode(text) // a text always can be; it ends with a line feed
	to.Truncate(to.Len() - 1)
	to.WriteString("]\n")
}
