// Package audit is the evidence: what was asked, tried and done on this daemon, in
// a transparency log that nobody can rewrite unnoticed. Below it, audit/ledger
// keeps the log, audit/mirror the copies of others' logs that a bastion witnesses,
// audit/cast recordings of sessions, audit/sealed encrypted before-images,
// audit/evidence reads all of it offline, audit/export hands events to other
// systems and audit/report tells an incident's story.
//
// Do is the one gate of every effect: the intent is durable, then the effect
// happens, then its outcome is recorded. Whatever changes a cluster asks for the
// Permit that only Do makes.
//
// It must never stand in the way of a read, hold the value of a secret, need the
// network to record, or let an effect begin whose intent may be lost. It stands on
// floor 2.
package audit

import (
	"context"
	"fmt"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Log takes events. *ledger.Ledger is one. Its methods may be called concurrently.
type Log interface {
	// Append returns when the event is durable: in the log itself, or, where that
	// can take none, held by two bastions. Else the error is
	// fault.AuditUnavailable, and the event may not be relied on: it is in the
	// log or it is not. It fills in Version, ID, Seq, Time, Uptime, Boot and
	// Origin, and shortens what does not fit.
	Append(ctx context.Context, e Event) (Receipt, error)
	// Note records without waiting: reads, sessions, refusals. It never blocks.
	// What has no room is counted, and the count recorded when there is.
	Note(e Event)
	// Reserve sets room aside for the outcome of an intent that is about to be
	// appended, so that it can be recorded whatever happens to the disk, or says
	// why there is none for this actor.
	Reserve(e Event) (Room, error)
	// Hash returns a keyed hash of a secret value, by which equal values of one
	// log can be told to be equal and nothing else.
	Hash(secret []byte) string
	// State tells how the log is.
	State() State
}

// Room is set aside for one outcome.
type Room interface {
	// Append is that of the log, into the room.
	Append(ctx context.Context, e Event) (Receipt, error)
	// Release gives back what was not used. It may be called twice.
	Release()
}

// Receipt says where an event is.
type Receipt struct {
	ID  string
	Seq uint64
	// Where is local, or held where only bastions have it.
	Where string
	// Signed says that a signed checkpoint covers it already; else one will
	// within a second.
	Signed bool
}

// Where an event can be.
const (
	Local  = "local"
	Remote = "held"
)

// State is how a log is.
type State struct {
	// Events is how many there are, Signed how many a signed checkpoint covers,
	// and Witnessed how many each witness has countersigned, by its name.
	Events, Signed uint64
	Witnessed      map[string]uint64
	// Origin, and VKey to verify the generation that is written now.
	Origin, VKey string
	// Generation counts from 1; Bytes is what all of them take on disk.
	Generation int
	Bytes      int64
	// Reserve is how many events of break-glass roles still fit when the disk
	// takes nothing, at 2 KiB each.
	Reserve int
	// Problem says why the log does not grow as it should; empty: it does. Refused
	// says why nothing at all can be recorded, so that nothing may be changed.
	Problem, Refused string
	// Lost is how many events had no room that nobody waited for.
	Lost uint64
}

// Permit lets something be changed. Only Do makes one that is valid, and it is so
// only while the effect runs.
type Permit struct{ op *operation }

type operation struct {
	id   string
	over chan struct{}
}

// Check returns nil while the permit is valid.
func (p Permit) Check() error {
	if p.op == nil {
		return fault.New(fault.AuditUnavailable, "report it: this is a bug", "nothing may be changed outside of what is recorded")
	}
	select {
	case <-p.op.over:
		return fault.New(fault.AuditUnavailable, "report it: this is a bug", "the intent %s is over", p.op.id)
	default:
		return nil
	}
}

// Intent is the ID of the event that it stands on.
func (p Permit) Intent() string {
	if p.op == nil {
		return ""
	}
	return p.op.id
}

// Do records the intent, runs the effect and records its outcome, which the effect
// returns as events: one of kind Outcome, and before it any of kind Objects. Where
// the intent cannot be made durable the effect does not run, and the error says why
// (fault.AuditUnavailable). An outcome that could not be recorded is an error too,
// after the effect: it is then found out and recorded later. A panic of the effect
// is recorded as an outcome that is not known, and goes on.
func Do(ctx context.Context, log Log, intent Event, effect func(ctx context.Context, p Permit) []Event) (Receipt, error) {
	intent.Kind = Intent
	room, err := log.Reserve(intent)
	if err != nil {
		return Receipt{}, err
	}
	defer room.Release()
	receipt, err := log.Append(ctx, intent)
	if err != nil {
		return receipt, err
	}
	op := &operation{id: receipt.ID, over: make(chan struct{})}
	// What was done is recorded although the caller has gone.
	ctx = context.WithoutCancel(ctx)
	finish := func(outcomes []Event) (err error) {
		close(op.over)
		for _, e := range outcomes {
			e.Of, e.Session, e.Drill = receipt.ID, intent.Session, intent.Drill
			if e.Actor == nil {
				e.Actor = intent.Actor
			}
			if e.Kind == "" {
				e.Kind = Outcome
			}
			add := log.Append
			if e.Kind == Outcome {
				add = room.Append
			}
			if _, failed := add(ctx, e); failed != nil {
				err = failed
			}
		}
		return err
	}
	returned := false
	defer func() {
		if !returned {
			_ = finish([]Event{{Kind: Outcome, Action: intent.Action, PlanID: intent.PlanID, Outcome: "unknown", ErrorCode: string(fault.Unknown), Error: "the effect panicked"}})
		}
	}()
	outcomes := effect(ctx, Permit{op})
	returned = true
	return receipt, finish(outcomes)
}

// ActorOf is who an identity is.
func ActorOf(who trust.Identity) *Actor {
	return &Actor{Person: who.Person, Role: role(who), Credential: string(who.Kind), Fingerprint: who.Fingerprint, Serial: who.Serial, CA: who.CA,
		Door: string(who.Door), Source: who.Source, Late: who.Late}
}

func role(who trust.Identity) string {
	if who.Role == trust.None {
		return ""
	}
	return who.Role.String()
}

// BreakGlass reports whether an event may use the reserve that is kept for when the
// disk takes nothing: what people in a role that can act do, not what automation,
// drills and bastions do, and no reads.
func (e Event) BreakGlass() bool {
	if e.Drill || e.Actor == nil || e.Kind == Read {
		return false
	}
	switch e.Actor.Credential {
	case string(trust.Person), string(trust.Local), string(trust.Sealed):
		return e.Actor.Role == trust.Responder.String() || e.Actor.Role == trust.Commander.String()
	}
	return false
}

// NewID returns an identifier that sorts by time.
func NewID(at time.Time, random [8]byte) string {
	return fmt.Sprintf("%s-%x", at.UTC().Format("20060102T150405.000"), random)
}
