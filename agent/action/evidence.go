package action

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// Past returns the newest events of the log, in order, as they stand there: all that
// an earlier process may have left without an outcome, at least.
type Past func(ctx context.Context) iter.Seq2[[]byte, error]

// PastOf is the Past of a ledger: its two newest generations. An intent that is older
// has its outcome on record, since a process that could add so much after it could
// add that too.
func PastOf(l *ledger.Ledger) Past {
	return func(ctx context.Context) iter.Seq2[[]byte, error] {
		return func(yield func([]byte, error) bool) {
			st := l.State()
			if st.Refused != "" {
				yield(nil, fault.New(fault.AuditUnavailable, "", "%s", st.Refused))
				return
			}
			if st.Events == 0 {
				return
			}
			// On a full disk it may take long, and there are actions to settle.
			signed, cancel := context.WithTimeout(ctx, 3*time.Second)
			defer cancel()
			if err := l.SignedWithin(signed, st.Events-1); err != nil {
				yield(nil, fmt.Errorf("its newest events are not signed yet: %w", err))
				return
			}
			heads := l.Heads()
			for _, h := range heads[max(0, len(heads)-2):] {
				for raw, err := range l.Entries(ctx, h.Lineage, h.Generation, 0, h.Size) {
					if !yield(raw, err) || err != nil {
						return
					}
				}
			}
		}
	}
}

// Sealed keeps the record of an action, up to its last before-image, for the case
// that this node is lost, encrypted to others, and returns the SHA-256 of what it
// keeps in hexadecimal. It is called beside the effect, once all images are durable
// here; its answer goes into the event of the outcome. (*sealed.Store).Seal is one.
type Sealed func(id string, record io.Reader) (sha256 string, err error)

// sealPatience is how long an outcome waits for the sealed images.
const sealPatience = 5 * time.Second

// notApplied is the outcome of an intent that the process did not live to begin.
const notApplied = "not-applied"

// eventBytes is what the objects of one event take at most. The rest of an event is
// less than half of what audit.MaxEvent leaves beside it.
const eventBytes = 36 << 10

// intent is the event that an application stands on. No parameter of an action is
// secret: they are names and numbers.
func (e *Engine) intent(who trust.Identity, access journal.Access, plan *halliganv1.Plan) (audit.Event, error) {
	ev := audit.Event{Kind: audit.Intent, Actor: audit.ActorOf(who), Incident: plan.Incident, Reason: plan.Reason, Session: who.Session, Drill: who.Scope.Drill,
		Action: plan.Action, PlanID: plan.Id, PlanSHA256: plan.Sha256, Undoes: plan.Undoes, Alone: access.Alone, Via: plan.Via, Text: plan.Summary,
		ObjectCount: len(plan.Objects)}
	for _, a := range access.ApprovedBy {
		ev.ApprovedBy = append(ev.ApprovedBy, audit.Approval{Person: a.Person, Fingerprint: a.Fingerprint, Serial: a.Serial})
	}
	if plan.Parameters != nil {
		parameters, err := api.CanonicalJSON(plan.Parameters)
		if err != nil {
			return ev, err
		}
		ev.Parameters = parameters
	}
	left := eventBytes
	for _, o := range plan.Objects {
		object := planned(o, true)
		if left -= sizeOf(object); left < 0 && len(ev.Objects) > 0 {
			break
		}
		ev.Objects = append(ev.Objects, object)
	}
	return ev, nil
}

// maxChanges is how many lines of a diff an event has of one object.
const maxChanges = 12

// planned is what the log says of an object of a plan.
func planned(o *halliganv1.PlannedObject, changes bool) audit.Object {
	out := audit.Object{Key: o.Key, UID: o.Uid, RevisionBefore: o.Revision, Operation: o.Operation}
	if changes {
		for _, c := range o.Changes[:min(len(o.Changes), maxChanges)] {
			out.Changes = append(out.Changes, audit.Change{Path: c.Path, Before: c.Before, After: c.After})
		}
	}
	return out
}

// sizeOf is how many bytes an object takes in an event.
func sizeOf(o audit.Object) int {
	data, _ := json.Marshal(o) // strings and numbers always are JSON
	return len(data) + 1
}

// outcomes are the events of what became of an action: its objects in the event of
// the outcome as far as they fit, the others before it. Of those that the intent
// listed, which are the first, the diff is on record already.
func outcomes(plan *halliganv1.Plan, listed int, last audit.Event, result func(i int) (outcome string, revision int64, problem string)) []audit.Event {
	last.Kind, last.Action, last.PlanID, last.PlanSHA256, last.Undoes, last.Via = audit.Outcome, plan.Action, plan.Id, plan.Sha256, plan.Undoes, plan.Via
	last.Incident, last.ObjectCount = plan.Incident, len(plan.Objects)
	more := audit.Event{Kind: audit.Objects, Action: plan.Action, PlanID: plan.Id, PlanSHA256: plan.Sha256, Incident: plan.Incident, ObjectCount: len(plan.Objects), Settled: last.Settled}
	var events []audit.Event
	into, left := &last, eventBytes
	for i, o := range plan.Objects {
		object := planned(o, i >= listed)
		object.Outcome, object.RevisionAfter, object.Error = result(i)
		size := sizeOf(object)
		if left < size && len(into.Objects) > 0 {
			events = append(events, more)
			into, left = &events[len(events)-1], eventBytes
		}
		into.Objects, left = append(into.Objects, object), left-size
	}
	return append(events, last)
}

// owing is the log, of which the engine keeps what it did not take of outcomes.
type owing struct {
	audit.Log
	engine *Engine
}

func (o owing) Append(ctx context.Context, ev audit.Event) (audit.Receipt, error) {
	r, err := o.Log.Append(ctx, ev)
	if err != nil && ev.Kind != audit.Intent {
		o.engine.owe(ev)
	}
	return r, err
}

func (o owing) Reserve(ev audit.Event) (audit.Room, error) {
	room, err := o.Log.Reserve(ev)
	if err != nil {
		return nil, err
	}
	return owingRoom{room, o.engine}, nil
}

type owingRoom struct {
	audit.Room
	engine *Engine
}

func (o owingRoom) Append(ctx context.Context, ev audit.Event) (audit.Receipt, error) {
	r, err := o.Room.Append(ctx, ev)
	if err != nil {
		o.engine.owe(ev)
	}
	return r, err
}

// maxOwed bounds the outcomes that wait for the log. While it takes nothing no
// action begins, so that there are no more than actions were under way; one that
// does not fit is found out by the next process.
const maxOwed = 4096

func (e *Engine) owe(ev audit.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.owed) < maxOwed {
		e.owed = append(e.owed, ev)
	}
}

// pay records what is owed to the log.
func (e *Engine) pay(ctx context.Context) error {
	for {
		e.mu.Lock()
		if len(e.owed) == 0 {
			e.mu.Unlock()
			return nil
		}
		ev := e.owed[0]
		e.mu.Unlock()
		if _, err := e.audit.Append(ctx, ev); err != nil {
			return err
		}
		e.mu.Lock()
		e.owed = e.owed[1:] // only Recover calls this
		e.mu.Unlock()
	}
}

// oweSettled owes the log what was found out of an action afterwards. Without an
// intent the action is of a time before there was a log.
func (e *Engine) oweSettled(r *journal.Record, actor *audit.Actor) {
	if r.Intent == "" {
		return
	}
	events := settledOutcome(r, actor)
	events[len(events)-1].Images = e.sealSettled(r)
	for _, ev := range events {
		e.owe(ev)
	}
}

// sealSettled keeps the record of an action that was settled afterwards elsewhere:
// if that was done before, nobody knows the hash. It returns "" where it cannot.
func (e *Engine) sealSettled(r *journal.Record) string {
	if e.sealed == nil || r.Applied == 0 {
		return ""
	}
	record, err := e.journal.Settled(r.Plan.Id)
	if err == nil {
		defer record.Close()
		var sum string
		if sum, err = e.sealed(r.Plan.Id, record); err == nil {
			return sum
		}
	}
	e.log.Error().Str("action", r.Plan.Id).Err(err).Msg("before-images could not be kept elsewhere")
	return ""
}

// settledOutcome are the events of an outcome that was found out afterwards.
func settledOutcome(r *journal.Record, actor *audit.Actor) []audit.Event {
	notes := map[int]journal.Note{}
	for _, n := range r.Notes {
		notes[n.Index] = n
	}
	last := audit.Event{Outcome: r.Result, Text: r.Error}
	events := outcomes(r.Plan, len(r.Plan.Objects), last, func(i int) (string, int64, string) {
		n, ok := notes[i]
		if !ok {
			return outcomeSkipped, 0, ""
		}
		return n.Outcome, n.Revision, n.Error
	})
	for i := range events {
		ev := &events[i]
		ev.Of, ev.Session, ev.Drill, ev.Actor, ev.Settled = r.Intent, r.Session, r.Drill, actor, true
	}
	return events
}

// actorOf is who did an action, as far as its record tells.
func actorOf(r *journal.Record) *audit.Actor {
	credential, _, _ := strings.Cut(r.Credential, ",")
	return &audit.Actor{Person: r.Plan.Actor, Role: r.Plan.Role, Credential: credential, Door: r.Door, Source: r.Source}
}

// closeIntents looks for intents of earlier processes without an outcome, and owes
// the log what became of each: what the action's record says, or that it never
// began. Of the actions that were settled before, those have none there whose intent
// only bastions keep.
func (e *Engine) closeIntents(ctx context.Context, settled []string) error {
	if err := e.journal.Ready(); err != nil {
		return err // that an action never began would be a lie
	}
	open, order, final := map[string]audit.Event{}, []string(nil), map[string]bool{}
	for _, id := range slices.Concat(e.journal.Unfinished(), settled) {
		final[id] = false
	}
	for raw, err := range e.past(ctx) {
		if err != nil {
			return fmt.Errorf("reading the log: %w", err)
		}
		switch ev, ok := intentOrOutcome(raw); {
		case !ok:
		case ev.Kind == audit.Intent:
			open[ev.ID], order = ev, append(order, ev.ID)
		case ev.Outcome != resultUnknown || ev.Settled: // else it is settled yet
			delete(open, ev.Of)
			if _, unfinished := final[ev.PlanID]; unfinished && ev.Action != trust.ActionStop {
				final[ev.PlanID] = true // the process ended between the two
			}
		}
	}
	for _, id := range order {
		if ev, left := open[id]; left {
			if err := e.closeIntent(ev); err != nil {
				return err
			}
		}
	}
	for _, id := range settled {
		record, err := e.journal.Read(id)
		if err != nil {
			return err
		}
		if !final[id] && !slices.Contains(order, record.Intent) {
			e.oweSettled(record, actorOf(record))
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed, e.told, e.final = true, nil, final
	return nil
}

// intentOrOutcome decodes an event if it is one of these. One that other daemons held
// counts from when it was taken over.
func intentOrOutcome(raw []byte) (audit.Event, bool) {
	var ev audit.Event
	if !bytes.Contains(raw, []byte(`"kind":"intent"`)) && !bytes.Contains(raw, []byte(`"kind":"outcome"`)) && !bytes.Contains(raw, []byte(`"kind":"adopted"`)) ||
		json.Unmarshal(raw, &ev) != nil {
		return ev, false
	}
	if ev.Kind == audit.Adopted {
		raw = []byte(ev.Payload)
		if ev = (audit.Event{}); json.Unmarshal(raw, &ev) != nil {
			return ev, false
		}
	}
	return ev, ev.Kind == audit.Intent || ev.Kind == audit.Outcome
}

func (e *Engine) closeIntent(intent audit.Event) error {
	e.mu.Lock()
	told := e.told[intent.PlanID]
	e.mu.Unlock()
	if told {
		return nil
	}
	out := audit.Event{Kind: audit.Outcome, Of: intent.ID, Actor: intent.Actor, Incident: intent.Incident, Session: intent.Session, Drill: intent.Drill, Action: intent.Action,
		PlanID: intent.PlanID, PlanSHA256: intent.PlanSHA256, Undoes: intent.Undoes, Settled: true}
	record, err := e.journal.Read(intent.PlanID)
	switch {
	case intent.Action == trust.ActionStop: // of the action that has the record
		out.Outcome, out.ErrorCode, out.Text = resultUnknown, string(fault.Unknown), "the agent ended while it stopped the action"
	case errors.Is(err, fs.ErrNotExist) && e.now().Sub(intent.Time) < e.journal.Keeps():
		out.Outcome, out.Text = notApplied, "the agent ended before it began"
	case err != nil:
		out.Outcome, out.ErrorCode, out.Error = resultUnknown, string(fault.CodeOf(err)), neutral.LineMax(fault.Of(err).Message, maxShown)
	case record.Intent != intent.ID: // it was applied with another intent
		out.Outcome, out.Text = notApplied, "what could not be recorded was not begun"
	case record.Result == "":
		return nil // settleOne tells when it knows
	default:
		e.oweSettled(record, intent.Actor)
		return nil
	}
	e.owe(out)
	return nil
}
