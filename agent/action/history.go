package action

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/agent/journal"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var historyRow = row{
	name:    "history",
	summary: "Show what was done from this node, newest first",
	role:    trust.Observer, effect: read, timeout: 30 * time.Second,
	parameters: []*halliganv1.Parameter{
		{Name: "action", Type: "string", Positional: true, Placeholder: "ACTION-ID", Description: "one action with its whole plan"},
		{Name: "limit", Type: "int", Placeholder: "N", Description: "how many at most (default 50)"},
	},
	examples: []string{"history", "history 20261123-114502-k3xq7mab"},
}

const (
	defaultHistory = 50
	maxHistory     = 1000
)

// History sends recorded actions, newest first.
func (e *Engine) History(ctx context.Context, who trust.Identity, req *halliganv1.HistoryRequest, send func(*halliganv1.HistoryEntry) error) error {
	r, err := e.authorize(who, historyRow.name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	if req.Limit < 0 || req.Limit > maxHistory {
		return fault.New(fault.Usage, "give a number up to 1000", "a limit of %d cannot be meant", req.Limit)
	}
	if err := e.journal.Ready(); err != nil {
		return err // that nothing was done would be a lie
	}
	if req.ActionId != "" {
		entry, err := e.journal.Find(req.ActionId)
		if err != nil {
			return err
		}
		record, err := e.journal.Read(entry.ID)
		if err != nil {
			return err
		}
		if !mayRecall(who, entry.Actor) {
			return fault.New(fault.Refused, "ask somebody with the whole role", "the credential of %s is narrowed, and action %s was %s's", who.Person, entry.ID, entry.Actor)
		}
		out := e.historyEntry(entry)
		out.Plan = record.Plan
		out.Results = objectResults(record)
		return send(out)
	}
	limit := req.Limit
	if limit == 0 {
		limit = defaultHistory
	}
	for _, entry := range e.journal.Entries() {
		if !mayRecall(who, entry.Actor) {
			continue
		}
		if limit--; limit < 0 || ctx.Err() != nil {
			return ctx.Err()
		}
		if err := send(e.historyEntry(entry)); err != nil {
			return err
		}
	}
	return nil
}

// mayRecall reports whether somebody may see or stop what an actor does: that is
// about objects of every namespace, so that a narrowed credential is for one's own
// only.
func mayRecall(who trust.Identity, actor string) bool {
	return actor == who.Person || len(who.Scope.Namespaces) == 0 && !who.Scope.Drill
}

func (e *Engine) historyEntry(j journal.Entry) *halliganv1.HistoryEntry {
	result := j.Result
	if result == "" {
		result = "unfinished"
	}
	var approvedBy []string
	for _, a := range j.ApprovedBy {
		approvedBy = append(approvedBy, a.Person)
	}
	return &halliganv1.HistoryEntry{
		ApprovedBy: approvedBy, Alone: j.Alone, Door: j.Door, Source: j.Source, Credential: j.Credential,
		ActionId: j.ID, Action: j.Action, Actor: j.Actor, Reason: j.Reason, Incident: j.Incident, Time: timestamppb.New(j.Time),
		Summary: j.Summary, Result: result, Objects: int64(j.Objects), Applied: int64(j.Applied), Undoes: j.Undoes, UndoneBy: e.journal.UndoneBy(j.ID),
	}
}

func objectResults(r *journal.Record) []*halliganv1.ObjectResult {
	out := make([]*halliganv1.ObjectResult, 0, len(r.Notes))
	for _, n := range r.Notes {
		o := r.Plan.Objects[n.Index]
		out = append(out, &halliganv1.ObjectResult{Key: o.Key, Uid: o.Uid, RevisionBefore: o.Revision, RevisionAfter: n.Revision, Outcome: n.Outcome, Error: n.Error})
	}
	return out
}
