package ledger

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
)

// Of equal events that nobody waits for, burstFree within burstTime are recorded as
// they come, and those after them as one with a Count.
const (
	burstFree = 20
	burstTime = 10 * time.Second
	maxBursts = 1024
)

// burstKey is what makes two events equal: who did what to what, and with which
// result. Else somebody could hide one question behind twenty others.
type burstKey struct {
	kind                                                     audit.Kind
	action, person, fingerprint, door, target, outcome, code string
	drill                                                    bool
	// asked is the SHA-256 of the parameters and the plan.
	asked [sha256.Size]byte
}

type burst struct {
	until time.Time
	seen  int
	// last stands for those that were not recorded one by one.
	last  audit.Event
	count int
}

// Note is audit.Log's.
func (l *Ledger) Note(e audit.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := burstKey{kind: e.Kind, action: e.Action, target: e.Target, outcome: e.Outcome, code: e.ErrorCode, drill: e.Drill, asked: sha256.Sum256(append([]byte(e.PlanID+"\x00"), e.Parameters...))}
	if e.Actor != nil {
		key.person, key.fingerprint, key.door = e.Actor.Person, e.Actor.Fingerprint, e.Actor.Door
	}
	switch e.Kind {
	case audit.Start, audit.Stop, audit.Intent, audit.Objects, audit.Outcome, audit.Secret, audit.Recording, audit.Held:
		l.jot(e) // no two are alike
		return
	}
	now := time.Now()
	b := l.bursts[key]
	if b == nil || now.After(b.until) {
		if len(l.bursts) >= maxBursts || b != nil {
			l.settleBursts(now)
		}
		if len(l.bursts) >= maxBursts {
			l.settleBursts(time.Time{})
		}
		b = &burst{until: now.Add(burstTime)}
		l.bursts[key] = b
	}
	if b.seen++; b.seen > burstFree {
		if b.last, b.count = e, b.count+max(1, e.Count); b.count == 1 {
			wake(l.keepWake) // to settle it in time
		}
		return
	}
	l.jot(e)
}

// settleBursts records what is held back of bursts that are over at a time, zero:
// of all, and returns when the next one is. mu is held.
func (l *Ledger) settleBursts(now time.Time) (next time.Duration) {
	for key, b := range l.bursts {
		if !now.IsZero() && !now.After(b.until) {
			if d := b.until.Sub(now) + time.Millisecond; b.count > 0 && (next == 0 || d < next) {
				next = d
			}
			continue
		}
		if b.count > 0 {
			if b.count > 1 {
				b.last.Count = b.count
			}
			l.jot(b.last)
		}
		delete(l.bursts, key)
	}
	return next
}

// jot records an event that nobody waits for. mu is held.
func (l *Ledger) jot(e audit.Event) {
	var err error
	first := l.unwritten == nil
	if !first && l.unwritten.bytes > maxUnwritten {
		err = errFull
	} else {
		_, err = l.put(&e, noted)
	}
	switch {
	case err != nil:
		l.lost += uint64(max(1, e.Count))
	case l.closed:
		wake(l.commitWake)
	case first:
		time.AfterFunc(gather, func() { wake(l.commitWake) })
	}
}

// held is an event that is outside of this machine until the log takes it.
type held struct {
	event    audit.Event
	data     []byte
	receipts []string
	// with is the batch in which it is being adopted.
	with *batch
}

const (
	maxHeld = 1024
	// maxHeldBytes bounds an event that is held, since it becomes a text within
	// another event, whose quotes are escaped.
	maxHeldBytes = 20 << 10
)

// elsewhere keeps an event outside of this machine, since the log cannot take it.
func (l *Ledger) elsewhere(ctx context.Context, e audit.Event, cause error) (audit.Receipt, error) {
	l.mu.Lock()
	full := len(l.held) >= maxHeld
	if l.o.Hold == nil || l.closed || full {
		defer l.mu.Unlock()
		return audit.Receipt{}, l.refusal(cause)
	}
	l.stamp(&e)
	l.last = e.Time
	e.Seq = 0
	l.broadcast()
	l.mu.Unlock()
	data, err := fit(e, maxHeldBytes)
	if err != nil {
		return audit.Receipt{}, fault.New(fault.AuditUnavailable, "", "what is done cannot be recorded: %w", err)
	}
	receipts, err := l.o.Hold.Hold(ctx, e.ID, data)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		return audit.Receipt{}, l.refusal(fmt.Errorf("%w; and no two bastions keep it: %w", cause, err))
	}
	l.held = append(l.held, held{event: e, data: data, receipts: receipts})
	wake(l.keepWake)
	return audit.Receipt{ID: e.ID, Where: audit.Remote}, nil
}

// adopt records what was held elsewhere. mu is held.
func (l *Ledger) adopt() {
	kept := l.held[:0]
	for _, h := range l.held {
		if h.with != nil {
			select {
			case <-h.with.done:
				if h.with.err == nil {
					continue
				}
				h.with = nil
			default:
			}
		}
		if h.with == nil {
			e := audit.Event{Kind: audit.Adopted, Actor: h.event.Actor, Incident: h.event.Incident, Session: h.event.Session, Of: h.event.Of, Action: h.event.Action, Drill: h.event.Drill,
				Payload: string(h.data), Receipts: h.receipts}
			var err error
			if h.with, err = l.put(&e, usual); err != nil {
				h.with = nil
				if !errors.Is(err, errFull) && !errors.Is(err, errStuck) && l.refused == "" && !l.closed {
					l.o.Log.Error().Err(err).Str("id", h.event.ID).Msg("an event that bastions hold cannot be adopted")
					continue
				}
			}
			wake(l.commitWake)
		}
		kept = append(kept, h)
	}
	clear(l.held[len(kept):])
	l.held = kept
}

// ends reports whether the tree ends with an event. A Seam is not in the tree as it
// was in the spool.
func (g *generation) ends(data []byte) bool {
	var e struct {
		ID   string
		Kind audit.Kind
	}
	return json.Unmarshal(data, &e) == nil && (e.Kind == audit.Seam || string(g.tail) == string(data))
}
