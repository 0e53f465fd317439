// Package export hands the events of verified logs to other systems: as lines of
// JSON, as OCSF events, or as RFC 5424 messages, to a file or to a receiver over
// TLS. A cursor remembers by index what has gone out.
//
// It must never change what an event means, send what its source has not verified,
// skip an event without saying so, or move the cursor over what the other side may
// not have. After an orderly stop nothing goes out twice; after a crash, what the
// cursor had not reached goes out again. It stands on floor 2.
package export

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// Log is one lineage of one daemon's log, over all of its generations.
type Log struct{ Origin, Lineage string }

func (l Log) key() string { return l.Origin + "/" + l.Lineage }

// Entry is one event of a verified log, and its bytes as the log has them.
type Entry struct {
	Log   Log
	Event audit.Event
	Raw   []byte
}

// Sink takes records, one event each.
type Sink interface {
	// Name tells this sink from others, for the cursor.
	Name() string
	Write(record []byte) error
	// Commit returns when the other side has all that was written.
	Commit() error
}

// Format is one way to write an event.
type Format struct {
	Name, About string
	Encode      func(Entry) ([]byte, error)
}

// Formats are those that there are.
var Formats = []Format{
	{"jsonl", "the events as the log has them, one line of JSON each", jsonLine},
	{"ocsf", "OCSF " + OCSFVersion + " events, one line of JSON each", OCSF},
	{"rfc5424", "syslog messages with structured data", Syslog},
}

// FormatOf returns the format of a name.
func FormatOf(name string) (Format, error) {
	var names []string
	for _, f := range Formats {
		if f.Name == name {
			return f, nil
		}
		names = append(names, f.Name)
	}
	return Format{}, fault.New(fault.Usage, "use one of "+strings.Join(names, ", "), "there is no format %q", neutral.LineMax(name, 40))
}

// batch is how many events go out before the cursor moves: what a crash sends
// again at most.
const batch = 5000

// Gap is a stretch of a log that was pruned before it could go out.
type Gap struct {
	Log         Log
	From, Until uint64 // sequence numbers; Until is the first that is there again
}

// Result is what one run did.
type Result struct {
	Sent int
	Gaps []Gap
}

// Run sends everything that the cursor has not passed, and moves it. The entries of
// one log come in order of their sequence numbers; a number that is not there was
// pruned. When the context ends, Run finishes what it has begun, and says
// fault.Cancelled.
func Run(ctx context.Context, entries iter.Seq2[Entry, error], format Format, sink Sink, cursor *Cursor) (Result, error) {
	var r Result
	pending := 0
	commit := func() error {
		if pending == 0 {
			return nil
		}
		if err := sink.Commit(); err != nil {
			return err
		}
		r.Sent += pending
		pending = 0
		return cursor.Save()
	}
	last := map[Log]uint64{} // the number that came last
	for e, err := range entries {
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return r, errors.Join(err, commit())
		}
		seq := e.Event.Seq
		if before, seen := last[e.Log]; seen && seq <= before {
			return r, errors.Join(fmt.Errorf("%s: event %d came after %d", e.Log.key(), seq, before), commit())
		}
		last[e.Log] = seq
		next := cursor.Next(e.Log)
		if seq < next {
			continue
		}
		if seq > next {
			r.Gaps = append(r.Gaps, Gap{e.Log, next, seq})
		}
		record, err := format.Encode(e)
		if err != nil {
			return r, errors.Join(fmt.Errorf("%s: event %d: %w", e.Log.key(), seq, err), commit())
		}
		if err := sink.Write(record); err != nil {
			// What this batch had is not committed, and goes out again.
			return r, err
		}
		cursor.moveTo(e.Log, seq+1)
		if pending++; pending == batch {
			if err := commit(); err != nil {
				return r, err
			}
		}
	}
	err := commit()
	if ctx.Err() != nil {
		return r, stopped(err)
	}
	return r, err
}

func stopped(err error) error {
	if err != nil {
		return err
	}
	return fault.New(fault.Cancelled, "run it again to go on from there", "stopped; the cursor has all that went out")
}

// jsonLine keeps every field as it is: only what acts on a terminal is escaped, in
// JSON's own way.
func jsonLine(e Entry) ([]byte, error) {
	var b bytes.Buffer
	if err := json.Compact(&b, e.Raw); err != nil {
		return nil, err
	}
	return neutral.JSON(b.Bytes()), nil
}

// Writer is a Sink of lines, such as standard output.
type Writer struct{ W io.Writer }

// Name of what has none.
func (Writer) Name() string { return "-" }

// Write writes a line.
func (w Writer) Write(record []byte) error {
	_, err := w.W.Write(append(record, '\n'))
	return err
}

// Commit has nothing to wait for.
func (Writer) Commit() error { return nil }
