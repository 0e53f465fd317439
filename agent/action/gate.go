package action

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Approvals verifies what other people signed about a plan. An implementation
// checks signatures, certificates, revocations and every fact of the statement;
// the engine counts.
type Approvals interface {
	// Verify returns who signed, for a plan that who is about to apply. One
	// token that does not hold is an error: fault.Refused or fault.Usage.
	Verify(tokens []string, plan *halliganv1.Plan, who trust.Identity) ([]Approved, error)
}

// Approved is one verified approval, as the record keeps it.
type Approved = journal.Approval

// request returns what the decision has to know of an action.
func (e *Engine) request(r *row) trust.Request {
	return trust.Request{Action: r.name, Rung: r.role, Mutates: r.effect == mutate, Node: e.node, Stale: !e.fresh()}
}

// authorize is the gate: no call gets past it without a row and the policy's
// leave.
func (e *Engine) authorize(who trust.Identity, name string) (*row, error) {
	r, err := rowOf(name)
	if err != nil {
		return nil, err
	}
	return r, e.policy().Decide(who, e.request(r))
}

// on returns the request for an object; without a name it is for all in the
// namespace.
func on(r trust.Request, kind *storage.Kind, namespace, name string) trust.Request {
	r.Resource, r.Namespace, r.Name = kind.Resource(), namespace, name
	return r
}

// verdict is what the policy says about a whole plan.
type verdict struct {
	approvals int
	alone     bool
	why       string
}

// decide asks the policy about every object of a plan. before is how many objects
// count beside these where a rule demands approvals from some number on.
func decide(policy *trust.Policy, who trust.Identity, request trust.Request, steps []*step, before int) (verdict, error) {
	v := verdict{alone: true}
	for _, s := range steps {
		r := on(request, s.kind, s.namespace, s.name)
		r.Deletes = s.op == opDelete
		if r.Deletes && s.kind.Resource() == "serviceaccounts" { // which takes all rights, like revoke
			r.Subject = serviceAccountPrefix + s.namespace + ":" + s.name
		}
		if err := policy.Decide(who, r); err != nil {
			if len(steps) > 1 && r.Action == deleteName {
				f := fault.Of(err)
				err = fault.New(f.Code, "narrow the selector (-l) or the namespace (-n)", "one of %d objects: %s", len(steps), f.Message)
			}
			return v, err
		}
		n, alone, why := policy.Approvals(who, r, before+len(steps))
		if n > 0 {
			v.alone = v.alone && alone
		}
		if n > v.approvals {
			v.approvals, v.why = n, why
			if fewer, _, _ := policy.Approvals(who, r, len(steps)); fewer < n {
				v.why = fmt.Sprintf("%s (with %d objects that %s changed within the hour)", why, before, who.Person)
			}
		}
	}
	v.alone = v.alone && v.approvals > 0
	return v, nil
}

// accessOf is what the record keeps of how somebody came in.
func accessOf(who trust.Identity) journal.Access {
	credential := []string{string(who.Kind)}
	if who.Fingerprint != "" {
		credential = append(credential, who.Fingerprint)
	}
	if who.Serial != "" {
		credential = append(credential, "serial "+who.Serial)
	}
	if who.Late {
		credential = append(credential, "past an edge of its validity")
	}
	return journal.Access{Door: string(who.Door), Source: who.Source, Credential: strings.Join(credential, ", "), Session: who.Session, Drill: who.Scope.Drill,
		BreakGlass: audit.Event{Actor: audit.ActorOf(who), Drill: who.Scope.Drill}.BreakGlass()}
}

// leave returns by whose leave a plan is applied, which goes on record with it.
// Without the approvals that it needs that is fault.AwaitingApproval, and the
// plan goes on waiting.
func (e *Engine) leave(policy *trust.Policy, who trust.Identity, v verdict, plan *halliganv1.Plan, req *halliganv1.ApplyRequest) (journal.Access, error) {
	access, need := accessOf(who), int(plan.ApprovalsNeeded)
	switch {
	case need == 0:
		return access, nil
	case req.Alone && len(req.Approvals) > 0:
		return access, fault.New(fault.Usage, "leave one of them out", "with approvals nobody is alone")
	case req.Alone:
		if most := policy.AloneCaps().ObjectsPerAction; len(plan.Objects) > most {
			return access, fault.New(fault.Refused, e.ask(plan), "alone one person changes at most %d objects in one action; this one has %d", most, len(plan.Objects))
		}
		if !plan.AloneAllowed {
			return access, fault.New(fault.Refused, e.ask(plan), "policy lets nobody do this alone: %s", plan.ApprovalReason)
		}
		if v.approvals > 0 && !v.alone { // automation that has the name of the person who planned it
			return access, fault.New(fault.Refused, e.ask(plan), "with this credential nobody goes alone: %s", plan.ApprovalReason)
		}
		access.Alone = true
		return access, nil
	case len(req.Approvals) == 0:
		return access, e.awaiting(plan, 0)
	case e.approvals == nil:
		return access, fault.New(fault.Refused, "give the agent a bundle (trust.bundle in its configuration)", "without a bundle this agent knows nobody who could approve")
	}
	approved, err := e.approvals.Verify(req.Approvals, proto.CloneOf(plan), who)
	if err != nil {
		return access, err
	}
	for _, a := range approved {
		// Whatever the verifier counts: another person, another key, and each
		// of them once.
		twice := slices.ContainsFunc(access.ApprovedBy, func(b Approved) bool { return a.Person == b.Person || a.Fingerprint == b.Fingerprint })
		if !twice && a.Person != "" && a.Fingerprint != "" && a.Person != who.Person && a.Fingerprint != who.Fingerprint {
			access.ApprovedBy = append(access.ApprovedBy, a)
		}
	}
	if len(access.ApprovedBy) < need {
		return access, e.awaiting(plan, len(access.ApprovedBy))
	}
	access.Nonce = plan.Nonce
	return access, nil
}

func (e *Engine) awaiting(plan *halliganv1.Plan, have int) error {
	return fault.New(fault.AwaitingApproval, e.ask(plan), "%s needs %d %s by other people and has %d: %s", plan.Action,
		plan.ApprovalsNeeded, plural(int(plan.ApprovalsNeeded), "approval"), have, plan.ApprovalReason)
}

// ask says what to send to an approver, and what to do with the answer.
func (e *Engine) ask(plan *halliganv1.Plan) string {
	next := fmt.Sprintf("an approver runs: halligan approve --node %s %s; then run: halligan apply %s --approval FILE", e.node, plan.Id, plan.Id)
	if plan.AloneAllowed {
		next += ", or --alone"
	}
	return next
}

func plural(n int, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}

// tellAlone raises the alarm of an action that one person takes without the
// approvals that it needs.
func (e *Engine) tellAlone(who trust.Identity, plan *halliganv1.Plan) {
	e.alarm(alarm.Of(alarm.Alone, who, fmt.Sprintf("%s, %d %s, alone although %s: %s (reason: %s; action %s)", plan.Summary, len(plan.Objects),
		plural(len(plan.Objects), "object"), plan.ApprovalReason, plan.Action, plan.Reason, plan.Id)))
}

// ShowPlan returns a plan that waits to be applied, to whoever made it and to
// approvers. To all others it is as if there were none.
func (e *Engine) ShowPlan(_ context.Context, who trust.Identity, id string) (*halliganv1.Plan, error) {
	request, policy := trust.Request{Action: trust.ActionShowPlan, Rung: trust.Observer, Node: e.node}, e.policy()
	if err := policy.Decide(who, request); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	i := slices.IndexFunc(e.plans, func(p *prepared) bool {
		return p.plan.Id == id && (p.plan.Actor == who.Person || who.Role == trust.Approver)
	})
	if i < 0 {
		if entry, err := e.journal.Find(id); err == nil && entry.ID == id && (entry.Actor == who.Person || who.Role == trust.Approver) {
			return nil, fault.New(fault.Stale, "see: halligan history "+id, "plan %s was applied already", id)
		}
		return nil, fault.New(fault.NotFound, "ask whoever sent it: it may be applied, too old, or on another node; an agent that was restarted forgets it", "no plan %.64q waits here for %s", id, who.Person)
	}
	p := e.plans[i]
	if now := e.now(); now.After(p.plan.Expires.AsTime()) {
		return nil, fault.New(fault.Stale, "plan again", "plan %s expired at %s", id, p.plan.Expires.AsTime().Format(stamp))
	}
	for _, s := range p.steps {
		if err := policy.Decide(who, on(request, s.kind, s.namespace, s.name)); err != nil {
			return nil, err
		}
	}
	return proto.CloneOf(p.plan), nil
}

// newNonce returns 128 random bits in hexadecimal.
func newNonce() string {
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand
	return hex.EncodeToString(random[:])
}
