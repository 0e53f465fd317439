package action

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/halligan-io/halligan/agent/etcd"
	"github.com/halligan-io/halligan/agent/journal"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/neutral"
)

// goneEvery is how often the keys of deleted objects that give rights are looked
// at. The API server compacts etcd every 5 min by default, up to what it was 5 min
// before (apiserver/pkg/storage/etcd3/compact.go).
const goneEvery = time.Minute

// maxGone is how many keys are looked at, the newest deletions first: a few round
// trips a minute at most.
const maxGone = 1024

// gone is what is known of the keys whose objects, which gave rights, were deleted
// by actions that can still be taken back: as long as nobody made them again, who
// deleted them may put them back alone. etcd forgets within minutes, so it is asked
// every minute, and what it told is kept: a restart that is shorter than etcd's
// memory loses nothing.
type gone struct {
	path string // of the file; "" keeps it in memory only

	mu sync.Mutex // guards all below
	// read says that the file was.
	read bool
	known
	// byAction are the deletions of actions, as their records have them.
	byAction map[string][]deletion
}

// known is the file.
type known struct {
	Format  int    `json:"format"`
	Cluster string `json:"cluster"`
	// Keys of the objects.
	Keys map[string]proof `json:"keys"`
}

// proof is what is known of a key since the deletion at a revision.
type proof struct {
	Deleted int64 `json:"deleted"`
	// UpTo is the revision up to which it was untouched.
	UpTo  int64      `json:"upTo"`
	State etcd.Quiet `json:"state"`
}

type deletion struct {
	cluster, key string
	revision     int64
}

// WatchGone keeps proof, until the context ends, of whether what gave rights and
// was deleted was made again meanwhile. While there is nothing to prove it costs
// nothing.
func (e *Engine) WatchGone(ctx context.Context) {
	for {
		if err := e.lookAtGone(ctx); err != nil && ctx.Err() == nil {
			e.log.Warn().Str("problem", neutral.Line(err.Error())).Msg("whether deleted objects that gave rights stay deleted could not be looked at; tried again in a minute")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(goneEvery):
		}
	}
}

// lookAtGone is called by one at a time.
func (e *Engine) lookAtGone(ctx context.Context) error {
	if err := e.journal.Ready(); err != nil {
		return err // that nothing was deleted would be a lie
	}
	last := e.gone.load(e)
	wanted, err := e.goneNow(ctx)
	if len(wanted) == 0 && len(last.Keys) == 0 {
		return err
	}
	next := known{Format: 1, Keys: map[string]proof{}}
	if len(wanted) > 0 {
		cluster, cerr := e.etcd.ClusterID(ctx)
		if cerr != nil {
			return errors.Join(err, cerr)
		}
		next.Cluster = cluster
	}
	if err != nil && last.Cluster == next.Cluster { // a record that cannot be read now may be again
		maps.Copy(next.Keys, last.Keys)
	}
	ask := map[string]int64{}
	for _, d := range wanted {
		if d.cluster != next.Cluster {
			continue
		}
		p := last.Keys[d.key]
		if last.Cluster != next.Cluster || p.Deleted != d.revision {
			p = proof{Deleted: d.revision, UpTo: d.revision, State: etcd.Untouched}
		}
		next.Keys[d.key] = p
		if p.State == etcd.Untouched {
			ask[d.key] = p.UpTo
		}
	}
	for keys := range slices.Chunk(slices.Sorted(maps.Keys(ask)), etcd.MaxMany) {
		some := make(map[string]int64, len(keys))
		for _, key := range keys {
			some[key] = ask[key]
		}
		found, upTo, qerr := e.etcd.QuietSince(ctx, some)
		if qerr != nil {
			err = errors.Join(err, qerr)
			break // what was found until then counts
		}
		for key, state := range found {
			p := next.Keys[key]
			if p.State = state; state == etcd.Untouched {
				p.UpTo = upTo
			}
			next.Keys[key] = p
		}
	}
	return errors.Join(err, e.gone.store(next))
}

// goneNow returns the deletions that their owners may still take back, one of each
// key.
func (e *Engine) goneNow(ctx context.Context) (all []deletion, err error) {
	byAction, seen := map[string][]deletion{}, map[string]bool{}
	since := e.now().Add(-undoOwn)
	for _, entry := range e.journal.Entries() {
		if entry.Time.Before(since) || len(all) >= maxGone {
			break
		}
		if entry.Applied == 0 || entry.Result == "" || entry.Result == journal.Damaged || e.journal.UndoneBy(entry.ID) != "" {
			continue
		}
		e.gone.mu.Lock()
		of, found := e.gone.byAction[entry.ID]
		e.gone.mu.Unlock()
		if !found {
			var rerr error
			if of, rerr = e.deletionsOf(ctx, entry.ID); rerr != nil {
				err = errors.Join(err, rerr)
				continue
			}
		}
		byAction[entry.ID] = of
		for _, d := range of {
			if !seen[d.key] && len(all) < maxGone {
				seen[d.key] = true
				all = append(all, d)
			}
		}
	}
	e.gone.mu.Lock()
	defer e.gone.mu.Unlock()
	e.gone.byAction = byAction
	return all, err
}

// deletionsOf returns what an action deleted for certain of objects that give
// rights.
func (e *Engine) deletionsOf(ctx context.Context, id string) (all []deletion, err error) {
	record, err := e.journal.Read(id)
	if err != nil {
		return nil, err
	}
	revisions := map[int]int64{}
	for _, n := range record.Notes {
		if n.Outcome == journal.Applied && !n.Settled {
			revisions[n.Index] = n.Revision
		}
	}
	for _, ref := range record.Images {
		revision := revisions[ref.Index]
		if !ref.Delete || revision <= 0 {
			continue
		}
		kind, _, _, err := (&planner{engine: e}).kindOfKey(ctx, ref.Key)
		if err != nil {
			return nil, fmt.Errorf("%s of action %s: %w", ref.Key, id, err)
		}
		if kind.Authority {
			delete(revisions, ref.Index) // one that was tried twice has two images
			all = append(all, deletion{record.Plan.Cluster, ref.Key, revision})
		}
	}
	return all, nil
}

// quietSince tells what happened to a key since an action deleted it at the
// revision.
func (e *Engine) quietSince(ctx context.Context, cluster, key string, revision int64) (etcd.Quiet, error) {
	since := revision
	if last := e.gone.load(e); last.Cluster == cluster {
		if p, found := last.Keys[key]; found && p.Deleted == revision {
			if p.State != etcd.Untouched {
				return p.State, nil
			}
			since = p.UpTo
		}
	}
	found, _, err := e.etcd.QuietSince(ctx, map[string]int64{key: since})
	return found[key], err
}

// load returns what is known, from the file at first. Where that cannot be used
// nothing is.
func (g *gone) load(e *Engine) known {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.read || g.path == "" {
		return g.known
	}
	g.read = true
	var k known
	err := durable.CheckPrivate(g.path)
	if errors.Is(err, fs.ErrNotExist) {
		return g.known
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(g.path)
	}
	if err == nil {
		err = json.Unmarshal(data, &k)
	}
	if err == nil && k.Format != 1 {
		err = fmt.Errorf("it has format %d", k.Format)
	}
	if err != nil {
		e.log.Error().Str("problem", neutral.Line(err.Error())).
			Msg("what was known of deleted objects that gave rights cannot be read: taking such a deletion back may need a commander and an approval")
		return g.known
	}
	g.known = k
	return k
}

// store puts what is known in force, and on disk where it is another.
func (g *gone) store(next known) error {
	g.mu.Lock()
	same := g.Cluster == next.Cluster && maps.Equal(g.Keys, next.Keys)
	g.known = next
	g.mu.Unlock()
	if same || g.path == "" {
		return nil
	}
	data, err := json.Marshal(next)
	if err == nil {
		err = durable.Write(g.path, data)
	}
	return err
}
