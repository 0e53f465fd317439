package sealed

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"filippo.io/age"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// maxEvents bounds the events of one action: a request to an agent has at most
// 1 MiB, and an event of many objects some 36 KiB.
const maxEvents = 64

// Taken is an action of another agent of the cluster, verified.
type Taken struct {
	*Record
	// Intent says who did it and when, Outcome what came of it; Objects are what
	// became of each object, from the outcome and the events that belong to it.
	Intent, Outcome audit.Event
	Objects         []audit.Object
	// Met says that this agent knew the log's key before: bastions had brought it
	// the node's statement while that was there. Else all of it stands on the host
	// authority alone.
	Met bool
}

// Take verifies the evidence of an action and opens it with this agent's own key.
// All of this holds then, whoever brought it: the host authority of the bundle in
// force vouched, when the log's key was stated, for a node of this very cluster, and
// nothing of that is revoked; the log that this key signs has the intent of the
// action, by whom, and its outcome; the outcome has the hash of the sealed file; and
// what is in that is the plan that the intent has the hash of, with images of its
// objects. Whether it was taken back since nobody can prove that way. Errors are
// fault.Refused or fault.Unauthenticated.
func (s *Store) Take(e *halliganv1.SealedEvidence) (*Taken, error) {
	b := s.o.Bundle()
	if b == nil {
		return nil, fault.New(fault.Refused, "give the agent a bundle (trust.bundle in its configuration)", "without a bundle this agent knows no other")
	}
	st, err := logkey.Verify(e.GetIdentity(), b, s.o.Now())
	if err != nil {
		return nil, err
	}
	t, err := s.take(e, st, b)
	if err != nil {
		return nil, fault.New(fault.Refused, "fetch it anew from a bastion (halligan audit fetch), and verify that (halligan audit verify)", "the evidence of an action of %s does not hold: %w", st.Server, err)
	}
	return t, nil
}

func (s *Store) take(e *halliganv1.SealedEvidence, st logkey.Statement, b *bundle.Bundle) (*Taken, error) {
	if cluster := clusterOf(s.o.Server); clusterOf(st.Server) != cluster {
		return nil, fmt.Errorf("it is of another cluster than %s", cluster)
	}
	t := &Taken{Met: s.met(st)}
	outcomes, err := t.events(e, st.Server, evidence.Trust{Bundle: b, Now: s.o.Now()})
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(e.GetSealed())
	if named := hex.EncodeToString(sum[:]); !slices.ContainsFunc(outcomes, func(ev audit.Event) bool { return ev.Images == named }) {
		return nil, errors.New("no event of the log has the hash of the sealed file")
	}
	if t.Record, err = read(bytes.NewReader(e.GetSealed()), maxTaken, []age.Identity{s.key}); err != nil {
		return nil, fmt.Errorf("the sealed file cannot be opened: %w", err)
	}
	return t, t.fits(st.Server)
}

// events verifies the events and sorts them: one intent, and what belongs to it.
func (t *Taken) events(e *halliganv1.SealedEvidence, server string, trust evidence.Trust) (outcomes []audit.Event, err error) {
	if n := len(e.GetEvents()); n < 2 || n > maxEvents {
		return nil, fmt.Errorf("%d events are not an intent and its outcome", n)
	}
	of := ""
	for _, proven := range e.GetEvents() {
		p, err := evidence.VerifyProof(trust, [][]byte{e.GetIdentity()}, proven.GetProof(), proven.GetEvent())
		if err != nil {
			return nil, errors.New(fault.Of(err).Message)
		}
		ev := p.Event
		origin, lineage, _, err := logkey.ParseTree(p.Tree)
		switch {
		case err != nil:
			return nil, err
		case origin != server:
			return nil, fmt.Errorf("an event of it is from the log of %s", origin)
		case of != "" && of != lineage:
			return nil, errors.New("its events are of two logs")
		case ev.Kind == audit.Intent && t.Intent.ID != "":
			return nil, errors.New("it has two intents")
		case ev.Kind == audit.Intent:
			t.Intent = ev
		case ev.Kind == audit.Outcome || ev.Kind == audit.Objects:
			outcomes = append(outcomes, ev)
		default:
			return nil, fmt.Errorf("an event of kind %.20q has no place in it", ev.Kind)
		}
		of = lineage
	}
	if t.Intent.ID == "" || t.Intent.Actor == nil || t.Intent.PlanID == "" {
		return nil, errors.New("it has no intent of an action")
	}
	slices.SortFunc(outcomes, func(a, b audit.Event) int { return int(int64(a.Seq) - int64(b.Seq)) })
	for _, ev := range outcomes {
		if ev.Of != t.Intent.ID || ev.PlanID != t.Intent.PlanID || ev.Seq <= t.Intent.Seq {
			return nil, errors.New("its events do not belong together")
		}
		if ev.Kind == audit.Outcome {
			t.Outcome = ev // the last one counts: what was unknown at first was found out
		}
	}
	if t.Outcome.ID == "" {
		return nil, errors.New("it does not tell what came of the action")
	}
	for _, ev := range outcomes {
		if ev.Settled == t.Outcome.Settled {
			t.Objects = append(t.Objects, ev.Objects...)
		}
	}
	return outcomes, nil
}

// fits demands that what was sealed is what the log tells of.
func (t *Taken) fits(server string) error {
	plan := t.Plan
	hash, err := api.PlanSHA256(plan)
	switch {
	case err != nil:
		return err
	case hash != t.Intent.PlanSHA256 || plan.Sha256 != hash || plan.Id != t.Intent.PlanID:
		return errors.New("what is sealed is another plan than that of the intent")
	case plan.Actor != t.Intent.Actor.Person:
		return errors.New("what is sealed was done by somebody else")
	case t.Server() != server:
		return errors.New("what is sealed was planned on another node")
	}
	return nil
}
