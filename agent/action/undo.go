package action

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	corev1 "k8s.io/api/core/v1"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// undoOwn is how long a person may take the own action back without anybody's
// approval. All other undoing counts as adding authority: who puts back what
// somebody else took away gives something to somebody.
const undoOwn = 24 * time.Hour

var undoRow = row{
	name:    undoName,
	summary: "Put back what an action changed",
	description: "Plans the reversal of an action: fields get the value that they had, deleted objects are stored again as they were. " +
		"Whoever did it takes it back within 24 h; later, or for anybody else, it needs a commander and an approval. " +
		"A field that somebody changed since is left alone (exit 3). What the garbage collector removed in the meantime does not come back by itself, and Secrets cannot be put back through etcd at all.",
	role: trust.Responder, effect: mutate, timeout: 30 * time.Minute,
	parameters: []*halliganv1.Parameter{
		{Name: "action", Type: "string", Required: true, Positional: true, Placeholder: "ACTION-ID", Description: "the action, or an unambiguous beginning of its ID"},
	},
	examples: []string{"undo 20261123-114502-k3xq7mab"},
	plan:     planUndo,
}

type undoParameters struct {
	Action string `json:"action"`
}

func planUndo(ctx context.Context, p *planner, raw *structpb.Struct) error {
	par, err := decode[undoParameters](raw)
	if err != nil {
		return err
	}
	entry, from, err := p.find(par.Action)
	if err != nil {
		return err
	}
	switch {
	case entry.Result == "" && p.lost != nil:
		return fault.New(fault.Refused, "recover it with the offline key (halligan audit recover), or look for yourself what was done", "the log of %s does not tell what became of %s",
			p.lost.server, entry.ID)
	case entry.Result == "":
		return fault.New(fault.Stale, "look again in a moment: halligan history "+entry.ID, "action %s is still unfinished", entry.ID)
	case !own(entry, p.who) || p.engine.now().Sub(entry.Time) > undoOwn:
		if err := p.addAuthority(fmt.Sprintf("taking back %s, which %s did %s,", entry.ID, entry.Actor, entry.Time.Format(stamp))); err != nil {
			return err
		}
	}
	if p.lost != nil && !p.lost.met {
		// Whoever had the host authority's key could make up a node's log.
		if err := p.addAuthority(fmt.Sprintf("taking back %s of %s, whose log this agent has not met while the node was there,", entry.ID, p.lost.server)); err != nil {
			return err
		}
	}
	if err := p.onceMore(entry); err != nil {
		return err
	}
	if by := p.engine.journal.UndoneBy(entry.ID); by != "" {
		return fault.New(fault.Stale, "see: halligan history "+by, "action %s was taken back already, by %s", entry.ID, by)
	}
	record, err := from.Read(entry.ID)
	if err != nil {
		return err
	}
	if record.Plan.Cluster != p.plan.Cluster {
		return fault.New(fault.Refused, "undo it where it was done", "action %s belongs to another cluster's etcd", entry.ID)
	}
	p.plan.Undoes, p.from = entry.ID, from
	p.tellLost()
	applied := map[int]journal.Note{}
	for _, n := range record.Notes {
		if n.Outcome == journal.Applied {
			applied[n.Index] = n
		}
	}
	// In reverse, so that, of a few objects, what was taken away last comes back
	// first; many go at once. The last
	// image of an object that was tried twice is the one that was written.
	var written []journal.ImageRef
	var conflicts []error
	seen := map[int]bool{}
	for _, ref := range slices.Backward(record.Images) {
		if _, ok := applied[ref.Index]; ok && !seen[ref.Index] {
			seen[ref.Index] = true
			written = append(written, ref)
		}
	}
	for chunk := range slices.Chunk(written, chunkObjects) {
		keys := make([]string, len(chunk))
		for i, ref := range chunk {
			keys[i] = ref.Key
		}
		now, view, err := p.engine.etcd.GetMany(ctx, keys)
		if err != nil {
			return err
		}
		p.see(view)
		for _, ref := range chunk {
			kv, found := now[ref.Key]
			err := p.undoOne(ctx, entry, record.Plan.Objects[ref.Index], ref, applied[ref.Index], kv, found)
			if fault.Is(err, fault.Stale) && len(written) > 1 {
				// One that somebody changed since does not hold up the others.
				if conflicts = append(conflicts, err); len(conflicts) <= 5 {
					p.warn("left alone: %s", fault.Of(err).Message)
				}
				continue
			}
			if err != nil {
				return err
			}
		}
	}
	if len(conflicts) > 5 {
		p.warn("left alone: %d objects in all that were changed since", len(conflicts))
	}
	if len(p.steps) == 0 && len(conflicts) > 0 {
		return conflicts[0]
	}
	if len(p.steps) == 0 {
		p.summary("nothing to do: %s left nothing that could be put back", entry.ID)
		return nil
	}
	p.showAllGiven(ctx)
	p.summary("take back %s: %s", entry.ID, entry.Summary)
	p.bypass(bypassUpdate...)
	return nil
}

// again returns the action that is done once more by taking the entry back; "" where
// it is not an undo.
func (e *Engine) again(entry journal.Entry) (string, error) {
	redo := false
	for entry.Undoes != "" {
		next, err := e.journal.Find(entry.Undoes)
		if err != nil {
			return "", err
		}
		entry, redo = next, !redo
	}
	if !redo {
		return "", nil
	}
	return entry.Action, nil
}

// own reports whether somebody did it. Automation is not the person whose name it
// happens to have.
func own(entry journal.Entry, who trust.Identity) bool {
	automated := strings.HasPrefix(entry.Credential, string(trust.Automation))
	return entry.Actor == who.Person && automated == (who.Kind == trust.Automation)
}

// undoOne plans the reversal of one object's change.
func (p *planner) undoOne(ctx context.Context, entry journal.Entry, planned *halliganv1.PlannedObject, ref journal.ImageRef, wrote journal.Note, kv etcd.KV, found bool) error {
	kind, namespace, name, err := p.kindOfKey(ctx, ref.Key)
	if err != nil {
		return err
	}
	authority := kind.Authority
	if authority && wrote.Settled {
		if err := p.addAuthority(fmt.Sprintf("after an interruption it is not certain that %s took %s/%s away; putting it back", entry.ID, kind.Resource(), name)); err != nil {
			return err
		}
	}
	changedSince := func(how string) error {
		return fault.New(fault.Stale, "look at it with: halligan get "+kind.Plural+"/"+name, "%s/%s %s since %s", kind.Resource(), name, how, entry.ID)
	}
	if !found {
		if !ref.Delete {
			return changedSince("was deleted")
		}
		if ref.UID == "" {
			return fault.New(fault.Refused, "its bytes are in the record of "+entry.ID+" on this node", "%s/%s could not be read: put back, it would break every LIST of its kind again",
				kind.Resource(), name)
		}
		// That nobody took it back already only the record's own node knows: there,
		// what gives no rights needs no more.
		since := int64(0)
		if authority || p.lost != nil {
			quiet, err := p.engine.quietSince(ctx, p.plan.Cluster, ref.Key, wrote.Revision)
			if err != nil {
				return err
			}
			if quiet == etcd.Untouched {
				since = wrote.Revision
			} else if err := p.unsure(kind, name, entry, quiet); err != nil {
				return err
			}
		}
		if gone, err := p.namespaceGone(ctx, namespace); err != nil || gone {
			if gone {
				err = changedSince("lost its namespace")
			}
			return err
		}
		return p.restore(ctx, kind, namespace, name, entry, ref, since)
	}
	obj, err := p.open(ctx, kind, namespace, name, kv)
	if err != nil {
		return err
	}
	same := string(obj.Meta.UID) == planned.Uid
	switch {
	case ref.Delete && same:
		return nil // an undo that was cut short put it back already
	case ref.Delete || !same:
		return changedSince("was made again")
	case ref.Revision == 0:
		// The action had made the key, by undoing a deletion: remove it again.
		if kind.Authority && kv.ModRevision != wrote.Revision {
			return changedSince("was changed")
		}
		p.remove(obj)
		return nil
	}
	if kind.Authority && kv.ModRevision != wrote.Revision && !p.request.AddsAuthority {
		if _, left, err := kind.Revert(obj.Plain(), ref.Changes); err == nil && len(left) == 0 {
			return nil
		}
		return changedSince("was changed")
	}
	if err := p.revert(obj, ref.Changes); err != nil {
		return fmt.Errorf("%s: %w", obj.title(), err)
	}
	return nil
}

// addAuthority makes the plan one that gives rights to somebody, or refuses it
// to whoever may not do that even with approvals.
func (p *planner) addAuthority(why string) error {
	p.request.AddsAuthority = true
	if err := p.policy.Decide(p.who, p.request); err != nil {
		f := fault.Of(err)
		return fault.New(f.Code, "ask whoever did it, or come as commander; or change the object by a plan of your own", "%s adds authority: %s", why, f.Message)
	}
	p.warn("%s adds authority", why)
	return nil
}

// namespaceGone reports whether the namespace does not exist any more: whoever
// makes it again must not find what was in it.
func (p *planner) namespaceGone(ctx context.Context, namespace string) (bool, error) {
	if namespace == "" {
		return false, nil
	}
	if gone, known := p.gone[namespace]; known {
		return gone, nil
	}
	kind, err := p.engine.resolve(ctx, "namespaces")
	if err != nil {
		return false, err
	}
	key, err := kind.Key(p.engine.prefix, "", namespace)
	if err != nil {
		return false, err
	}
	_, found, _, err := p.engine.etcd.Get(ctx, key)
	if p.gone == nil {
		p.gone = map[string]bool{}
	}
	p.gone[namespace] = !found
	return !found, err
}

// unsure is about an object that gives rights and is gone, which somebody else made
// again and deleted, or may have: etcd forgets within minutes, and an agent that was
// away for so long does not know. Putting it back is for a commander and another
// person then.
func (p *planner) unsure(kind *storage.Kind, name string, entry journal.Entry, quiet etcd.Quiet) error {
	if p.request.AddsAuthority {
		return nil
	}
	what := kind.Resource() + "/" + name
	how := "was made again and deleted by somebody since " + entry.ID
	if quiet == etcd.Forgotten {
		how = "may have been made again and deleted since " + entry.ID + ": etcd's history was compacted before this agent looked (it was down, etcd did not answer, or too much was deleted)"
	}
	request := p.request
	request.AddsAuthority = true
	if p.policy.Decide(p.who, request) != nil {
		return fault.New(fault.Stale, "a commander can take it back with an approval: halligan undo "+entry.ID, "%s %s", what, how)
	}
	return p.addAuthority("putting back " + what + ", which " + how + ",")
}

// restore plans to store a deleted object again. since is the revision after which
// nothing happened to its key, 0 where that does not matter.
func (p *planner) restore(ctx context.Context, kind *storage.Kind, namespace, name string, entry journal.Entry, ref journal.ImageRef, since int64) error {
	s := &step{kind: kind, namespace: namespace, name: name, key: ref.Key, uid: ref.UID, op: opCreate, size: ref.Size,
		image: &imageOf{from: p.from, action: entry.ID, ref: ref}, since: since}
	if kind.Group == "" && kind.Kind == "Service" {
		taken, err := p.addressTaken(ctx, kind, entry, ref)
		if err != nil {
			return err
		}
		if taken != "" {
			return fault.New(fault.Stale, "restore it through the API server, which finds another address", "%s/%s had %s since %s", kind.Resource(), name, taken, entry.ID)
		}
	}
	if ref.Lease != 0 {
		alive, err := p.engine.etcd.LeaseAlive(ctx, ref.Lease)
		if err != nil {
			return err
		}
		if !alive {
			p.expired++
			return nil
		}
		s.lease = ref.Lease
	}
	p.add(s, nil)
	return nil
}

// maxGiven bounds, in bytes, what a plan shows of objects that it puts back.
const maxGiven = 256 << 10

// showAllGiven shows what objects give that are put back: who approves that sees it
// nowhere else. Those that give rights are always shown, and first; those that pods
// are made of, which can run as anybody in their namespace, where somebody has to
// approve.
func (p *planner) showAllGiven(ctx context.Context) {
	for _, rights := range []bool{true, false} {
		for i, s := range p.steps {
			if s.image == nil || s.kind.Authority != rights || !rights && (!s.kind.PodTemplate || !p.request.AddsAuthority) || p.given > maxGiven {
				continue
			}
			planned := p.plan.Objects[i]
			if err := p.showGiven(ctx, s, planned); err != nil {
				planned.Warnings = append(planned.Warnings, short("what it gives cannot be shown: "+fault.Of(err).Message, maxShown))
			}
		}
	}
}

func (p *planner) showGiven(ctx context.Context, s *step, planned *halliganv1.PlannedObject) error {
	raw, err := s.image.value()
	if err != nil {
		return err
	}
	o, err := p.open(ctx, s.kind, s.namespace, s.name, etcd.KV{Key: s.key, Value: raw})
	if err != nil {
		return err
	}
	data, note, err := o.JSON()
	if err != nil {
		return err
	}
	var fields, meta map[string]json.RawMessage
	if err := json.Unmarshal(data, &fields); err != nil {
		return err
	}
	if err := json.Unmarshal(fields["metadata"], &meta); err != nil {
		return err
	}
	if labels, ok := meta["labels"]; ok { // they add a role to aggregated ones
		fields["metadata.labels"] = labels
	}
	for _, known := range []string{"apiVersion", "kind", "metadata", "status"} {
		delete(fields, known)
	}
	deep := 0
	if s.kind.PodTemplate {
		deep = podDepth
	}
	for _, path := range slices.Sorted(maps.Keys(fields)) {
		p.spread(planned, path, fields[path], deep)
	}
	if note != "" {
		planned.Warnings = append(planned.Warnings, note)
	}
	return nil
}

// podDepth is how many fields lie above a container: in a CronJob
// spec.jobTemplate.spec.template.spec.containers.
const podDepth = 5

// spread gives each field of an object so deep down, and each element of a list, a
// line.
func (p *planner) spread(planned *halliganv1.PlannedObject, path string, value json.RawMessage, deep int) {
	var list []json.RawMessage
	var fields map[string]json.RawMessage
	switch {
	case p.given > maxGiven:
	case json.Unmarshal(value, &list) == nil && len(list) > 0:
		for i, v := range list {
			p.give(planned, fmt.Sprintf("%s[%d]", path, i), v)
		}
	case deep > 0 && json.Unmarshal(value, &fields) == nil && len(fields) > 0:
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			p.spread(planned, path+"."+name, fields[name], deep-1)
		}
	default:
		p.give(planned, path, value)
	}
}

// give adds a line to the diff, as long as there is room.
func (p *planner) give(planned *halliganv1.PlannedObject, path string, value json.RawMessage) {
	var text bytes.Buffer
	if err := json.Compact(&text, value); err != nil || p.given > maxGiven {
		return
	}
	if p.given += len(path) + text.Len(); p.given > maxGiven {
		p.warn("not all that this gives is shown: take it back in smaller parts, or look at the record first")
		return
	}
	planned.Changes = append(planned.Changes, &halliganv1.FieldChange{Path: path, After: text.String()})
}

// addressTaken looks whether another Service got an address or a node port of
// the one to be put back: the API server, which hands them out, is not asked. It
// returns what was taken by whom.
func (p *planner) addressTaken(ctx context.Context, kind *storage.Kind, entry journal.Entry, ref journal.ImageRef) (string, error) {
	raw, err := p.from.Value(entry.ID, ref)
	if err != nil {
		return "", err
	}
	_, namespace, name, err := p.engine.byKey(ref.Key)
	if err != nil {
		return "", err
	}
	old, err := p.open(ctx, kind, namespace, name, etcd.KV{Key: ref.Key, Value: raw})
	if err != nil {
		return "", err
	}
	claims, err := claimsOf(old)
	if err != nil || len(claims) == 0 {
		return "", err
	}
	taken := ""
	_, err = p.walk(ctx, kind, "", func(o *object, problem error) error {
		if problem != nil {
			return nil
		}
		theirs, err := claimsOf(o)
		for _, c := range theirs {
			if slices.Contains(claims, c) {
				taken = c + ", which " + o.title() + " got"
			}
		}
		return err
	})
	return taken, err
}

// claimsOf returns what only one Service can have.
func claimsOf(o *object) ([]string, error) {
	var s corev1.Service
	if err := typed(o, &s); err != nil {
		return nil, err
	}
	var out []string
	for _, ip := range s.Spec.ClusterIPs {
		if ip != corev1.ClusterIPNone {
			out = append(out, "the cluster IP "+ip)
		}
	}
	for _, port := range s.Spec.Ports {
		if port.NodePort != 0 {
			out = append(out, fmt.Sprintf("the node port %d/%s", port.NodePort, port.Protocol))
		}
	}
	return out, nil
}
