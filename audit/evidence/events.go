package evidence

import (
	"context"
	"io"
	"iter"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Entry is an event that holds, and where it is.
type Entry struct {
	audit.Event
	// Raw is the entry, byte for byte.
	Raw []byte
	// Log is whose it is; Generation and Index are its place in the log's trees.
	Log        *Log
	Generation uint64
	Index      int64
}

// Filter says which events are wanted: those for which all holds that is set.
type Filter struct {
	// Person, Incident, Action and Session are compared whole, without regard to
	// case; Object is part of a key, and Origin NODE, NODE.CLUSTER or NAME.bastion:
	// also what others keep of that daemon.
	Person, Incident, Action, Session, Object, Origin string
	Kinds                                             []audit.Kind
	// Since is the earliest time, Until the first that is too late.
	Since, Until time.Time
}

// origins reports whether the filter wants what is of a daemon.
func (f Filter) origins(origin string) bool {
	node, _, _ := trust.CutServer(origin)
	return f.Origin == "" || f.Origin == origin || f.Origin == node
}

// about is what the filter asks of an event itself. An event that another log keeps
// for a daemon is asked in its place.
func (f Filter) about(e *audit.Event) bool {
	if e.Kind == audit.Held || e.Kind == audit.Adopted {
		if inner, err := Decode([]byte(e.Payload)); err == nil && inner.Payload == "" {
			return f.about(&inner)
		}
	}
	person := ""
	if e.Actor != nil {
		person = e.Actor.Person
	}
	same := func(want, is string) bool { return want == "" || strings.EqualFold(want, is) }
	session := same(f.Session, e.Session) || e.Chunk != nil && same(f.Session, e.Chunk.Session)
	approved := slices.ContainsFunc(e.ApprovedBy, func(a audit.Approval) bool { return same(f.Person, a.Person) })
	return f.origins(e.Origin) && (same(f.Person, person) || approved) && same(f.Incident, e.Incident) && same(f.Action, e.Action) && session &&
		(f.Object == "" || slices.ContainsFunc(e.Objects, func(o audit.Object) bool { return strings.Contains(o.Key, f.Object) }))
}

// Choice chooses events as they come, in order: what belongs to an intent that was
// chosen, such as its outcome, is so too. It is used by one goroutine at a time.
type Choice struct {
	Filter
	intents map[string]bool
}

// Choose returns the choice that a filter makes.
func (f Filter) Choose() *Choice { return &Choice{f, map[string]bool{}} }

// Wants reports whether the event is one of them.
func (c *Choice) Wants(e *audit.Event) bool {
	wanted := c.about(e)
	if c.Person+c.Incident+c.Action+c.Session+c.Object != "" {
		if wanted && e.Kind == audit.Intent {
			c.intents[e.ID] = true
		}
		wanted = wanted || e.Of != "" && c.intents[e.Of]
	}
	return wanted && (c.Since.IsZero() || !e.Time.Before(c.Since)) && (c.Until.IsZero() || e.Time.Before(c.Until)) &&
		(len(c.Kinds) == 0 || slices.Contains(c.Kinds, e.Kind))
}

// Events yields what the filter wants of the events that hold, in the order of
// their times, those of one log in their own. What belongs to an intent that is
// wanted is so too. It comes after Verify, and ends with the first error.
func (e *Evidence) Events(ctx context.Context, f Filter) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		type source struct {
			next func() (Entry, error, bool)
			head Entry
		}
		var sources []*source
		for _, h := range e.held {
			next, stop := iter.Pull2(h.events(ctx, 0))
			defer stop()
			sources = append(sources, &source{next: next})
		}
		advance := func(s *source) (ok bool, err error) {
			s.head, err, ok = s.next()
			return ok, err
		}
		live := sources[:0]
		for _, s := range sources {
			ok, err := advance(s)
			if err != nil {
				yield(Entry{}, err)
				return
			}
			if ok {
				live = append(live, s)
			}
		}
		choice := f.Choose()
		for len(live) > 0 {
			first := slices.MinFunc(live, func(x, y *source) int { return x.head.Time.Compare(y.head.Time) })
			if entry := first.head; choice.Wants(&entry.Event) && !yield(entry, nil) {
				return
			}
			ok, err := advance(first)
			if err != nil {
				yield(Entry{}, err)
				return
			}
			if !ok {
				live = slices.DeleteFunc(live, func(s *source) bool { return s == first })
			}
		}
	}
}

// Logs returns the logs of which events can be read. It comes after Verify.
func (e *Evidence) Logs() (logs []*Log) {
	for _, h := range e.held {
		logs = append(logs, h.Log)
	}
	return logs
}

// Of yields what holds of one log, from the event with the number seq on, or from
// the first after it.
func (e *Evidence) Of(ctx context.Context, log *Log, seq uint64) iter.Seq2[Entry, error] {
	for _, h := range e.held {
		if h.Log == log {
			return h.events(ctx, seq)
		}
	}
	return func(func(Entry, error) bool) {}
}

// events yields what holds of a log from an event on.
func (h *held) events(ctx context.Context, seq uint64) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		for i := range h.trees {
			t := &h.trees[i]
			index := from(seq, t.FirstSeq, t.good)
			for raw, err := range t.EntriesUnder(ctx, t.at.Tree, index, t.good) {
				var event audit.Event
				if err == nil {
					event, err = Decode(raw)
				}
				if err != nil {
					yield(Entry{}, fault.New(fault.Failed, "verify it again: halligan audit verify", "%s: %w", h.folder.file(logsFolder, h.name(t)), err))
					return
				}
				if !yield(Entry{Event: event, Raw: raw, Log: h.Log, Generation: t.Number, Index: index}, nil) {
					return
				}
				index++
			}
			if t.good < t.at.N {
				return // what follows a hole is no story
			}
		}
	}
}

// from returns the index of an event in a tree of that size, or the nearest to it.
func from(seq, first uint64, size int64) int64 {
	if seq <= first {
		return 0
	}
	return int64(min(seq-first, uint64(size))) // #nosec G115 -- a size is not negative
}

// Find returns the event with the ID.
func (e *Evidence) Find(ctx context.Context, id string) (Entry, error) {
	for entry, err := range e.Events(ctx, Filter{}) {
		if err != nil {
			return Entry{}, err
		}
		if entry.ID == id {
			return entry, nil
		}
	}
	return Entry{}, fault.New(fault.NotFound, "list them with halligan audit show", "no event has the ID %.80q", id)
}

// Recording returns the bytes of a recording that the log vouches for, and where
// its file is. The error is fault.NotFound where it is not here.
func (e *Evidence) Recording(ctx context.Context, session string) (data io.ReadCloser, log *Log, err error) {
	if !sessionForm.MatchString(session) {
		return nil, nil, fault.New(fault.Usage, "list them with halligan audit show --kind recording", "a session cannot be called %.140q", session)
	}
	var pieces []vouched
	var of *held
	for entry, err := range e.Events(ctx, Filter{Kinds: []audit.Kind{audit.Recording}, Session: session}) {
		if err != nil {
			return nil, nil, err
		}
		if entry.Chunk != nil && entry.Chunk.Session == session {
			if i := slices.IndexFunc(e.held, func(h *held) bool { return h.Log == entry.Log }); of == nil || of == e.held[i] {
				of = e.held[i]
				pieces = append(pieces, vouched{*entry.Chunk, of, entry.Seq})
			}
		}
	}
	if of == nil {
		return nil, nil, fault.New(fault.NotFound, "list sessions with halligan audit show --kind session", "no recording of a session %s is on record", session)
	}
	name := path.Join(castsFolder, session+castSuffix)
	file, err := openPlain(of.folder.fs, name)
	if os.IsNotExist(err) {
		return nil, of.Log, fault.New(fault.NotFound, "fetch it: halligan audit replay "+session, "the recording %s of %s is not here", session, of.Origin)
	}
	if err != nil {
		return nil, of.Log, err
	}
	bad, covered, _ := compareCast(file, pieces)
	_ = file.Close()
	if bad != nil {
		return nil, of.Log, fault.New(fault.Failed, "verify all of it: halligan audit verify", "%s: bytes from %d on are not what event %d recorded", of.folder.file(name), bad.Offset, bad.seq)
	}
	if file, err = openPlain(of.folder.fs, name); err != nil {
		return nil, of.Log, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(file, covered), file}, of.Log, nil
}
