package evidence

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// maxBrought bounds the sealed file of an action that an undo brings to another
// agent: its door takes 1 MiB, with the events and their proofs.
const maxBrought = 900 << 10

// Lost reads what bastions keep of nodes that cannot be asked themselves.
type Lost struct {
	t *tool
	// Nodes are those whose logs somebody has, NODE.CLUSTER.
	Nodes []string
	dir   string
}

// FetchLost fetches from the bastions what is new of the logs of nodes of a cluster;
// without names, of all nodes of it that bastions have heard of. It is fault.NotFound
// where no bastion has anything.
func FetchLost(ctx context.Context, s Surroundings, cluster string, nodes []string) (*Lost, error) {
	l := &Lost{t: &tool{Surroundings: s}}
	var err error
	if l.dir, err = s.State(); err != nil {
		return nil, err
	}
	store, err := evidence.OpenStore(ctx, l.dir)
	if err != nil {
		return nil, err
	}
	defer store.Close()
	trust, err := l.t.trust()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards the store, and Nodes
	failed, err := s.Bastions(ctx, func(ctx context.Context, d Daemon) {
		wanted := nodes
		if len(wanted) == 0 {
			wanted = copies(ctx, d, cluster)
		}
		for _, node := range wanted {
			mu.Lock()
			err := take(ctx, store, trust, d, node)
			var conflict *evidence.Conflict
			if err != nil && !fault.Is(err, fault.NotFound) {
				l.t.note("%s, of the log of %s: %s", d.Name, node, fault.Of(err).Message)
			}
			// What is here already stays, whatever a copy lacks of it.
			if (err == nil || errors.As(err, &conflict)) && !slices.Contains(l.Nodes, node) {
				l.Nodes = append(l.Nodes, node)
			}
			mu.Unlock()
		}
	})
	if err != nil {
		return nil, err
	}
	for name, err := range failed {
		l.t.note("%s was not asked for what it keeps: %s", name, fault.Of(err).Message)
	}
	if len(l.Nodes) == 0 {
		return nil, fault.New(fault.NotFound, "see: halligan audit show", "no bastion has a log of those nodes")
	}
	slices.Sort(l.Nodes)
	return l, nil
}

// copies asks which nodes of a cluster a bastion keeps logs of.
func copies(ctx context.Context, d Daemon, cluster string) (nodes []string) {
	all, err := d.ListLogs(ctx, &halliganv1.ListLogsRequest{})
	if err != nil {
		return nil // reading fails as well, and tells
	}
	for _, log := range all.GetLogs() {
		if _, of, ok := trust.CutServer(log.GetOrigin()); ok && of == cluster && !slices.Contains(nodes, log.GetOrigin()) {
			nodes = append(nodes, log.GetOrigin())
		}
	}
	return nodes
}

// take fetches what is new of one log.
func take(ctx context.Context, store *evidence.Store, trust evidence.Trust, d Daemon, node string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.ReadLog(ctx, &halliganv1.ReadLogRequest{Origin: node, Have: store.Have(node)})
	if err != nil {
		return api.FromStatus(err)
	}
	_, err = store.Take(ctx, node, trust, parts(stream))
	return err
}

// deed is an action as a log tells it.
type deed struct {
	intent, outcome evidence.Entry
	// more are the events that belong to the outcome.
	more []evidence.Entry
}

// entry is what a node's own history would say.
func (d *deed) entry(whole bool) *halliganv1.HistoryEntry {
	i, o := d.intent.Event, d.outcome.Event
	out := &halliganv1.HistoryEntry{ActionId: i.PlanID, Action: i.Action, Reason: i.Reason, Incident: i.Incident, Time: timestamppb.New(i.Time), Summary: i.Text,
		Result: o.Outcome, Objects: int64(i.ObjectCount), Undoes: i.Undoes, Alone: i.Alone}
	if out.Result == "" {
		out.Result = "unfinished"
	}
	if i.Actor != nil {
		out.Actor, out.Door, out.Source = i.Actor.Person, i.Actor.Door, i.Actor.Source
		out.Credential = strings.Join(slices.DeleteFunc([]string{i.Actor.Credential, i.Actor.Fingerprint}, func(s string) bool { return s == "" }), ", ")
	}
	for _, a := range i.ApprovedBy {
		out.ApprovedBy = append(out.ApprovedBy, a.Person)
	}
	if whole {
		out.Plan = &halliganv1.Plan{Id: i.PlanID, Action: i.Action, Actor: out.Actor, Reason: i.Reason, Incident: i.Incident, Summary: i.Text, Sha256: i.PlanSHA256, Undoes: i.Undoes, Via: i.Via}
		out.Plan.Node, out.Plan.ClusterName, _ = trust.CutServer(i.Origin)
		if i.Actor != nil {
			out.Plan.Role = i.Actor.Role
		}
		for _, object := range i.Objects {
			p := &halliganv1.PlannedObject{Key: object.Key, Uid: object.UID, Revision: object.RevisionBefore, Operation: object.Operation}
			for _, c := range object.Changes {
				p.Changes = append(p.Changes, &halliganv1.FieldChange{Path: c.Path, Before: c.Before, After: c.After})
			}
			out.Plan.Objects = append(out.Plan.Objects, p)
		}
	}
	for _, e := range append(slices.Clone(d.more), d.outcome) {
		for _, object := range e.Objects {
			if object.Outcome == "applied" || object.Outcome == "unverified" {
				out.Applied++
			}
			if whole {
				out.Results = append(out.Results, &halliganv1.ObjectResult{Key: object.Key, Uid: object.UID, RevisionBefore: object.RevisionBefore, RevisionAfter: object.RevisionAfter,
					Outcome: object.Outcome, Error: object.Error})
			}
		}
	}
	return out
}

// deeds calls do for each action of the nodes of which the log tells, those of one node
// in order, with its evidence, which is open only then.
func (l *Lost) deeds(ctx context.Context, wanted func(audit.Event) bool, do func(*evidence.Evidence, *deed) error) error {
	for _, node := range l.Nodes {
		if err := l.deedsOf(ctx, node, wanted, do); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lost) deedsOf(ctx context.Context, node string, wanted func(audit.Event) bool, do func(*evidence.Evidence, *deed) error) error {
	e, _, err := l.t.open(ctx, filepath.Join(l.dir, node))
	if err != nil {
		return err
	}
	defer e.Close()
	byIntent, order := map[string]*deed{}, []*deed(nil)
	for entry, err := range e.Events(ctx, evidence.Filter{Kinds: []audit.Kind{audit.Intent, audit.Objects, audit.Outcome}}) {
		if err != nil {
			return err
		}
		switch d := byIntent[entry.Of]; {
		case entry.Origin != node:
		case entry.Kind == audit.Intent && wanted(entry.Event):
			byIntent[entry.ID] = &deed{intent: entry}
			order = append(order, byIntent[entry.ID])
		case d == nil:
		case entry.Kind == audit.Outcome:
			d.outcome = entry // the last one counts
		default:
			d.more = append(d.more, entry)
		}
	}
	for _, d := range order {
		// What was found out later comes with all its objects again; that it was
		// sealed once more has none.
		d.more = slices.DeleteFunc(d.more, func(e evidence.Entry) bool { return e.Settled != d.outcome.Settled && e.Images == "" })
		if err := do(e, d); err != nil {
			return err
		}
	}
	return nil
}

// History returns what the nodes did, newest first; with an ID, or its beginning,
// that action and what became of each object.
func (l *Lost) History(ctx context.Context, id string) (entries []*halliganv1.HistoryEntry, err error) {
	undone := map[string]string{}
	err = l.deeds(ctx, func(i audit.Event) bool { return i.PlanID != "" }, func(_ *evidence.Evidence, d *deed) error {
		if d.intent.Undoes != "" && d.outcome.Outcome == "applied" {
			undone[d.intent.Undoes] = d.intent.PlanID
		}
		if strings.HasPrefix(d.intent.PlanID, id) && d.outcome.Outcome != "not-applied" {
			entries = append(entries, d.entry(id != ""))
		}
		return nil
	})
	for _, e := range entries {
		e.UndoneBy = undone[e.GetActionId()]
	}
	slices.SortStableFunc(entries, func(x, y *halliganv1.HistoryEntry) int { return y.GetTime().AsTime().Compare(x.GetTime().AsTime()) })
	return entries, err
}

// Evidence returns what another agent of the cluster has to be given to take an
// action back. It is fault.NotFound where no log tells of it.
func (l *Lost) Evidence(ctx context.Context, id string) (node string, out *halliganv1.SealedEvidence, err error) {
	found, images, action := 0, []string(nil), ""
	var undone error
	err = l.deeds(ctx, func(i audit.Event) bool { return strings.HasPrefix(i.PlanID, id) || strings.HasPrefix(i.Undoes, id) }, func(e *evidence.Evidence, d *deed) error {
		if d.outcome.Raw == nil || d.outcome.Outcome == "not-applied" {
			return nil
		}
		if strings.HasPrefix(d.intent.Undoes, id) && d.outcome.Outcome == "applied" {
			undone = fault.New(fault.Stale, "see: halligan history "+d.intent.PlanID, "action %s was taken back already, by %s on %s", d.intent.Undoes, d.intent.PlanID, d.intent.Origin)
		}
		if !strings.HasPrefix(d.intent.PlanID, id) {
			return nil
		}
		if found++; found > 1 {
			return fault.New(fault.Usage, "give more of it", "several actions begin with %q", id)
		}
		node, action = d.intent.Origin, d.intent.PlanID
		out = &halliganv1.SealedEvidence{}
		if out.Identity, err = l.identity(node, d.intent.Log.Lineage); err != nil {
			return err
		}
		all := append([]evidence.Entry{d.intent, d.outcome}, d.more...)
		slices.SortFunc(all, func(x, y evidence.Entry) int { return cmp.Compare(x.Seq, y.Seq) })
		for _, entry := range all {
			proof, err := e.Prove(entry)
			if err != nil {
				return err
			}
			out.Events = append(out.Events, &halliganv1.ProvenEvent{Event: entry.Raw, Proof: proof})
			if entry.Images != "" {
				images = append(images, entry.Images)
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return node, nil, err
	case undone != nil:
		return node, nil, undone
	case found == 0:
		return node, nil, fault.New(fault.NotFound, "see: halligan history", "no log of a node that cannot be asked tells of an action %q", id)
	case len(images) == 0:
		return node, nil, fault.New(fault.Refused, "look at what it changed (halligan history "+action+"), and change that back by hand", "%s was not sealed for others when %s did it", action, node)
	}
	out.Sealed, err = l.sealed(ctx, node, action, images)
	return node, out, err
}

// identity returns the statement of the key of a log.
func (l *Lost) identity(node, lineage string) (data []byte, err error) {
	for _, name := range []string{"identity." + lineage, "identity"} {
		if data, err = readBounded(filepath.Join(l.dir, node, name), logkey.MaxSize); err == nil {
			return data, nil
		}
	}
	return nil, fault.New(fault.Unauthenticated, "do not believe what this log says", "nothing vouches for the key of the log of %s: %w", node, err)
}

// sealed fetches the sealed file that has the last of the hashes that one has.
func (l *Lost) sealed(ctx context.Context, node, action string, hashes []string) (file []byte, err error) {
	var mu sync.Mutex // guards file, best and last
	var last error
	best := -1
	_, err = l.t.Bastions(ctx, func(ctx context.Context, d Daemon) {
		got, i, err := readSealed(ctx, d, node, action, hashes)
		for _, hash := range hashes { // a bastion that was sent another file since keeps both
			if i >= 0 || err != nil || len(hash) < 8 {
				break
			}
			if older, at, missing := readSealed(ctx, d, node, action+"-"+hash[:8], hashes); missing == nil && at >= 0 {
				got, i = older, at
			}
		}
		if err == nil && i < 0 {
			err = fault.New(fault.Failed, "do not rely on that bastion", "%s has a file for %s that is not the one that the log tells of", d.Name, action)
			l.t.note("%s", fault.Of(err).Message)
		}
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			last = err
		} else if i > best {
			file, best = got, i
		}
	})
	if file == nil && err == nil {
		err = last
	}
	return file, err
}

// readSealed returns a sealed file, and which of the hashes is its, -1 for none.
func readSealed(ctx context.Context, d Daemon, node, action string, hashes []string) (file []byte, i int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.ReadSealed(ctx, &halliganv1.ReadSealedRequest{Origin: node, ActionId: action})
	for err == nil {
		var part *halliganv1.FilePart
		if part, err = stream.Recv(); err != nil {
			break
		}
		if len(file)+len(part.GetData()) > maxBrought {
			return nil, -1, fault.New(fault.Refused, "recover it with the offline key: halligan audit recover", "what was sealed of %s is more than the %d KiB that an agent takes", action, maxBrought>>10)
		}
		file = append(file, part.GetData()...)
	}
	if errors.Is(err, io.EOF) {
		sum := sha256.Sum256(file)
		return file, slices.Index(hashes, hex.EncodeToString(sum[:])), nil
	}
	return nil, -1, received(err)
}
