package cli

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/cmd/internal/evidence"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// roamer is the agent of a line that names no node. Each agent keeps its own
// plans and records, so what this one does not know is sought at the others of
// its cluster, and once it is found, the line goes on there.
type roamer struct {
	*agent

	mu sync.Mutex // guards silent
	// silent are the nodes that could not be asked.
	silent []string
}

// ShowPlan finds the agent that has the plan.
func (r *roamer) ShowPlan(ctx context.Context, in *halliganv1.ShowPlanRequest, opts ...grpc.CallOption) (plan *halliganv1.Plan, err error) {
	return seek(ctx, r, func(ctx context.Context, a *agent) (*halliganv1.Plan, error) { return a.ShowPlan(ctx, in, opts...) })
}

// Undo finds the agent that has the record. Where none has it, the action may be one
// of a node that is gone: this agent gets what bastions keep of it then.
func (r *roamer) Undo(ctx context.Context, in *halliganv1.UndoRequest, opts ...grpc.CallOption) (*halliganv1.Plan, error) {
	plan, err := seek(ctx, r, func(ctx context.Context, a *agent) (*halliganv1.Plan, error) { return a.Undo(ctx, in, opts...) })
	if err == nil || api.FromStatus(err).Code != fault.NotFound {
		return plan, err
	}
	lost, lerr := r.lost(ctx)
	if lerr != nil {
		return nil, err
	}
	node, proof, lerr := lost.Evidence(ctx, in.GetActionId())
	switch {
	case fault.Is(lerr, fault.NotFound) && node == "":
		return nil, err
	case lerr != nil:
		return nil, lerr
	}
	if by := r.undoneBy(ctx, in.GetActionId()); by != "" {
		return nil, fault.New(fault.Stale, "see: halligan history "+by, "action %s was taken back already, by %s", in.GetActionId(), by)
	}
	in = proto.CloneOf(in)
	in.Evidence = proof
	return r.bring(ctx, node, in, opts...)
}

// bring hands what bastions keep of an action to an agent of the cluster, and goes on
// there. The node that did it is no such agent: one that was made anew under its name
// has a new key, to which nothing was sealed.
func (r *roamer) bring(ctx context.Context, node string, in *halliganv1.UndoRequest, opts ...grpc.CallOption) (*halliganv1.Plan, error) {
	why := "has no record of it any more"
	if r.mu.Lock(); slices.Contains(r.silent, node) {
		why = "cannot be asked"
	}
	r.mu.Unlock()
	var turn sync.Mutex // guards planned and failed
	planned, failed := false, error(nil)
	plan, err := seek(ctx, r, func(ctx context.Context, a *agent) (*halliganv1.Plan, error) {
		turn.Lock()
		defer turn.Unlock()
		if planned || a.host.ID() == node {
			return nil, fault.New(fault.NotFound, "", "not asked")
		}
		r.fleet.app.note("%s did it and %s: %s gets what bastions keep of it, and verifies that", node, why, a.host.ID())
		plan, err := a.Undo(ctx, in, opts...)
		if planned = err == nil; !planned {
			failed = err
		}
		return plan, err
	})
	switch {
	case err == nil || r.host.ID() != node:
		return plan, err
	case failed != nil:
		return nil, failed
	}
	return nil, fault.New(fault.NotFound, "look at what it changed (halligan history "+in.GetActionId()+"), and change that back by hand",
		"%s did it and %s, and no other agent of the cluster can be asked", node, why)
}

// Plan is Undo where that is the action.
func (r *roamer) Plan(ctx context.Context, in *halliganv1.PlanRequest, opts ...grpc.CallOption) (*halliganv1.Plan, error) {
	if in.GetAction() != "undo" {
		return r.agent.Plan(ctx, in, opts...)
	}
	return r.Undo(ctx, &halliganv1.UndoRequest{ActionId: in.GetParameters().GetFields()["action"].GetStringValue(), Reason: in.GetReason(), Incident: in.GetIncident()}, opts...)
}

// lost fetches what bastions keep of the nodes that could not be asked, or, where
// all could, of all that they know of the cluster: one may have been made anew.
func (r *roamer) lost(ctx context.Context) (*evidence.Lost, error) {
	a := r.fleet.app
	r.mu.Lock()
	silent := slices.Clone(r.silent)
	r.mu.Unlock()
	lost, err := evidence.FetchLost(ctx, evidence.Surroundings{Err: a.Err, Env: a.Env, Now: a.Now, Bundle: a.current, State: a.evidenceFolder, Bastions: a.eachBastion},
		r.host.Cluster, silent)
	if err != nil && !fault.Is(err, fault.NotFound) {
		a.note("what bastions keep of other nodes could not be fetched: %s", fault.Of(err).Message)
	}
	return lost, err
}

// maxAsked is how many records an agent tells of at most.
const maxAsked = 1000

// undoneBy returns which action of the agents that can be asked took back one of
// another node: no two of them know that of each other.
func (r *roamer) undoneBy(ctx context.Context, id string) string {
	from := func(ctx context.Context, a *agent) ([]*halliganv1.HistoryEntry, error) {
		return a.records(ctx, &halliganv1.HistoryRequest{Limit: maxAsked})
	}
	entries, err := from(ctx, r.agent)
	if err != nil {
		r.fleet.app.note("%s does not tell its history: %s", r.host.ID(), api.FromStatus(err).Message)
	}
	for _, e := range append(entries, r.gather(ctx, from)...) {
		if strings.HasPrefix(e.GetUndoes(), id) && e.GetResult() == "applied" {
			return e.GetActionId()
		}
	}
	return ""
}

// past returns what lost nodes did, as bastions keep it; with an ID that action only.
func (r *roamer) past(ctx context.Context, id string) []*halliganv1.HistoryEntry {
	lost, err := r.lost(ctx)
	if err != nil {
		return nil
	}
	entries, err := lost.History(ctx, id)
	if err != nil {
		r.fleet.app.note("what bastions keep of %s cannot be read: %s", strings.Join(lost.Nodes, ", "), fault.Of(err).Message)
		return nil
	}
	if len(entries) > 0 {
		r.fleet.app.note("what was done on %s is from the log that bastions keep of it", strings.Join(lost.Nodes, ", "))
	}
	return entries
}

// History finds the agent that has the record of an action, or gathers the
// records of all.
func (r *roamer) History(ctx context.Context, in *halliganv1.HistoryRequest, opts ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.HistoryEntry], error) {
	from := func(ctx context.Context, a *agent) ([]*halliganv1.HistoryEntry, error) {
		return a.records(ctx, in, opts...)
	}
	var entries []*halliganv1.HistoryEntry
	var err error
	if in.GetActionId() != "" {
		if entries, err = seek(ctx, r, from); err != nil && api.FromStatus(err).Code == fault.NotFound {
			switch found := r.past(ctx, in.GetActionId()); len(found) {
			case 0:
			case 1:
				entries, err = found, nil
			default:
				err = fault.New(fault.Usage, "give more of it", "%d actions begin with %q", len(found), in.GetActionId())
			}
		}
	} else if entries, err = from(ctx, r.agent); err == nil {
		entries = append(entries, r.gather(ctx, from)...)
		if len(r.silent) > 0 { // nobody else is at it any more
			entries = append(entries, r.past(ctx, "")...)
		}
		slices.SortStableFunc(entries, func(x, y *halliganv1.HistoryEntry) int {
			return y.GetTime().AsTime().Compare(x.GetTime().AsTime())
		})
		if n := int(in.GetLimit()); n > 0 && len(entries) > n {
			entries = entries[:n]
		}
	}
	if err != nil {
		return nil, err
	}
	return &told{entries: entries}, nil
}

// gather asks all other agents, and says which could not be asked.
func (r *roamer) gather(ctx context.Context, from func(context.Context, *agent) ([]*halliganv1.HistoryEntry, error)) (entries []*halliganv1.HistoryEntry) {
	var mu sync.Mutex // guards entries
	r.others(ctx, func(ctx context.Context, a *agent) bool {
		more, err := from(ctx, a)
		if err != nil {
			r.fleet.app.note("%s does not tell its history: %s", a.host.ID(), api.FromStatus(err).Message)
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		entries = append(entries, more...)
		return false
	})
	return entries
}

// seek asks this agent, and where it knows nothing of it the others.
func seek[T any](ctx context.Context, r *roamer, ask func(context.Context, *agent) (T, error)) (T, error) {
	first, err := ask(ctx, r.agent)
	if err == nil || api.FromStatus(err).Code != fault.NotFound {
		return first, err
	}
	var mu sync.Mutex // guards found and answer
	var found *agent
	var answer T
	r.others(ctx, func(ctx context.Context, a *agent) bool {
		got, err := ask(ctx, a)
		if err != nil {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		if found != nil {
			return false
		}
		found, answer = a, got
		return true
	})
	if found == nil {
		return first, err
	}
	last := r.agent
	r.fleet.loose.Go(func() { _ = last.Close() })
	r.agent, r.fleet.app.host = found, &found.host
	return answer, nil
}

// others logs in at each other node of the cluster, some at a time. What keep
// does not want to keep is closed.
func (r *roamer) others(ctx context.Context, keep func(context.Context, *agent) bool) {
	n, limit := r.fleet.limits()
	turns := make(chan struct{}, n)
	var asking sync.WaitGroup
	for _, host := range r.fleet.bundles.Current().Inventory.Nodes(r.host.Cluster) {
		if host.ID() == r.host.ID() {
			continue
		}
		turns <- struct{}{}
		asking.Go(func() {
			defer func() { <-turns }()
			if a := r.reach(ctx, host, limit, keep); a != nil {
				r.fleet.loose.Go(func() { _ = a.Close() })
			}
		})
	}
	asking.Wait()
}

// reach logs in at one node, and returns the connection where it is not kept.
func (r *roamer) reach(ctx context.Context, host bundle.Host, limit time.Duration, keep func(context.Context, *agent) bool) *agent {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	a, err := r.fleet.dial(ctx, host)
	if err != nil {
		r.fleet.app.note("%s was not asked: %s", host.ID(), fault.Of(err).Message)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.silent = append(r.silent, host.ID())
		return nil
	}
	if keep(ctx, a) {
		return nil
	}
	return a
}

// records returns what an agent's history tells.
func (a *agent) records(ctx context.Context, in *halliganv1.HistoryRequest, opts ...grpc.CallOption) (entries []*halliganv1.HistoryEntry, err error) {
	stream, err := a.AgentClient.History(ctx, in, opts...)
	for err == nil {
		var e *halliganv1.HistoryEntry
		if e, err = stream.Recv(); err == nil {
			entries = append(entries, e)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return entries, err
}

// told is a stream of what is known already.
type told struct {
	grpc.ClientStream // nil: nobody asks for more than Recv
	entries           []*halliganv1.HistoryEntry
}

// Recv returns the next entry, and io.EOF at the end.
func (t *told) Recv() (*halliganv1.HistoryEntry, error) {
	if len(t.entries) == 0 {
		return nil, io.EOF
	}
	e := t.entries[0]
	t.entries = t.entries[1:]
	return e, nil
}
