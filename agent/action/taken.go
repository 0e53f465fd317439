package action

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/halligan-io/halligan/agent/journal"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/fault"
)

// Take verifies what somebody brought as the evidence of an action of another node,
// and opens it; see sealed.Store.Take.
type Take func(*halliganv1.SealedEvidence) (*sealed.Taken, error)

// records are what an undo works from: the journal, or what was taken.
type records interface {
	Read(id string) (*journal.Record, error)
	Value(id string, ref journal.ImageRef) ([]byte, error)
}

// taken is an action of another node of the cluster, as its log and its sealed
// before-images have it. It lives as long as the plan that is made of it.
type taken struct {
	server string
	entry  journal.Entry
	record *journal.Record
	// values are the stored bytes, by key.
	values map[string][]byte
	// met says that this agent knew the log's key before.
	met bool
	// told is how many objects the events that were brought tell of.
	told int
}

func newTaken(t *sealed.Taken) (*taken, error) {
	plan, actor := t.Plan, t.Intent.Actor
	access := journal.Access{Door: actor.Door, Source: actor.Source, Credential: actor.Credential, Alone: t.Intent.Alone}
	for _, a := range t.Intent.ApprovedBy {
		access.ApprovedBy = append(access.ApprovedBy, journal.Approval{Person: a.Person, Fingerprint: a.Fingerprint, Serial: a.Serial})
	}
	out := &taken{server: t.Server(), met: t.Met, values: map[string][]byte{}, told: len(t.Objects),
		record: &journal.Record{Plan: plan, Access: access, Result: t.Outcome.Outcome, Error: t.Outcome.Error},
		entry: journal.Entry{ID: plan.Id, Action: plan.Action, Actor: actor.Person, Reason: plan.Reason, Incident: plan.Incident, Summary: plan.Summary, Undoes: plan.Undoes,
			Time: t.Intent.Time, Result: t.Outcome.Outcome, Objects: len(plan.Objects), Access: access}}
	index := map[string]int{}
	for i, o := range plan.Objects {
		index[o.Key] = i
	}
	for _, raw := range t.Images {
		var img journal.Image
		if err := json.Unmarshal(raw, &img); err != nil {
			return nil, err
		}
		if i, ok := index[img.Key]; !ok || i != img.Index {
			return nil, errors.New("a before-image is of no object of the plan")
		}
		if img.Value != nil && string(sum256(img.Value)) != string(img.ValueSHA256) {
			return nil, errors.New("a before-image does not have its hash")
		}
		ref := journal.ImageRef{Image: img, Size: len(img.Value)}
		ref.Value, out.values[img.Key] = nil, img.Value
		out.record.Images = append(out.record.Images, ref)
	}
	for _, o := range t.Objects {
		i, ok := index[o.Key]
		if !ok {
			return nil, errors.New("the log tells of an object that is not in the plan")
		}
		n := journal.Note{Index: i, Revision: o.RevisionAfter, Outcome: o.Outcome, Error: o.Error}
		switch n.Outcome {
		case outcomeUnverified:
			n.Outcome = journal.Applied // it was written
			fallthrough
		case journal.Applied:
			out.entry.Applied++
		}
		n.Settled = t.Outcome.Settled && plan.Objects[i].Operation == string(opDelete)
		out.record.Notes = append(out.record.Notes, n)
	}
	return out, nil
}

// size is how many bytes it holds; nil holds none.
func (t *taken) size() (n int) {
	if t != nil {
		for _, value := range t.values {
			n += len(value)
		}
	}
	return n
}

func (t *taken) Read(string) (*journal.Record, error) { return t.record, nil }

func (t *taken) Value(_ string, ref journal.ImageRef) ([]byte, error) {
	value, ok := t.values[ref.Key]
	if !ok {
		return nil, fault.New(fault.NotFound, "recover it with the offline key: halligan audit recover", "what was sealed of %s has no before-image of %s", t.entry.ID, ref.Key)
	}
	return value, nil
}

// find returns the action that is to be taken back, and what its record is read
// from: this node's journal, or the evidence that came with the request where the
// journal does not have it.
func (p *planner) find(id string) (journal.Entry, records, error) {
	e := p.engine
	entry, err := e.journal.Find(id)
	if p.evidence == nil || !fault.Is(err, fault.NotFound) {
		return entry, e.journal, err
	}
	if e.opens == nil {
		return entry, nil, fault.New(fault.Refused, "give the agent a bundle (trust.bundle in its configuration)", "this agent takes back no action of another node")
	}
	verified, err := e.opens(p.evidence)
	if err != nil {
		return entry, nil, err
	}
	if id == "" || !strings.HasPrefix(verified.Plan.Id, id) {
		return entry, nil, fault.New(fault.Usage, "bring the evidence of that action", "the evidence is of %s, not of %.64q", verified.Plan.Id, id)
	}
	t, err := newTaken(verified)
	if err != nil {
		return entry, nil, fault.New(fault.Refused, "recover it with the offline key: halligan audit recover", "what %s sealed of %s cannot be used: %w", verified.Server(), verified.Plan.Id, err)
	}
	if by := verified.Intent.Actor.Person; by != verified.Plan.Actor {
		return entry, nil, fault.New(fault.Refused, "report this", "the log says that %s did it, and the plan %s", by, verified.Plan.Actor)
	}
	p.lost = t
	if t.entry.Result == resultUnknown {
		t.entry.Result = "" // nobody found out what became of it
	}
	return t.entry, t, nil
}

// tellLost warns of what an agent cannot know about another's action.
func (p *planner) tellLost() {
	t := p.lost
	if t == nil {
		return
	}
	p.warn("%s was done on %s: what it changed is taken from its sealed before-images, as its log proves; that nobody took it back since is not proven", t.entry.ID, t.server)
	if n := len(t.record.Plan.Objects); t.told < n {
		p.warn("left alone: %d of %d objects of which no event was brought", n-t.told, n)
	}
}

// onceMore decides about an undo of an undo whose own origin is not known here.
func (p *planner) onceMore(entry journal.Entry) (err error) {
	p.request.Again, err = p.engine.again(entry)
	if fault.Is(err, fault.NotFound) {
		return p.addAuthority(fmt.Sprintf("taking back %s, which took back an action that this node has no record of,", entry.ID))
	}
	if err != nil || p.request.Again == "" {
		return err
	}
	// What added authority does so once more.
	for entry.Undoes != "" {
		if entry, err = p.engine.journal.Find(entry.Undoes); err != nil {
			return err
		}
	}
	record, err := p.engine.journal.Read(entry.ID)
	if err == nil && record.Plan.AddsAuthority {
		err = p.addAuthority(fmt.Sprintf("doing %s once more, which added it,", entry.ID))
	}
	return err
}
