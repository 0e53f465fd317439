package etcd

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/halligan-io/halligan/internal/fault"
)

// Fate is what became of a write.
type Fate int

// The fates.
const (
	Undetermined Fate = iota // etcd cannot tell, or did not answer
	Done
	NotDone
)

// String returns the fate in words.
func (f Fate) String() string {
	switch f {
	case Done:
		return "done"
	case NotDone:
		return "not done"
	}
	return "undetermined"
}

// Expect is a write whose outcome is in question.
type Expect struct {
	Key string
	// ModRevision and Since are those of the Write.
	ModRevision, Since int64
	// Deleted says that the write was a delete; otherwise SHA256 is of the
	// value that was to be written.
	Deleted bool
	SHA256  [sha256.Size]byte
}

// Settle finds out from etcd's history whether a write happened, and at which
// revision (0 where history no longer says). It changes nothing. Undetermined
// without an error means that the history was compacted away and the present
// value decides nothing.
//
// The rule: the key is still as it was before the write → not done. Otherwise
// the first event after that is looked at: if it is what the write would have
// made, the write is done, else another writer came first, and it is not done.
// So another's delete, or another's write of the very same bytes, counts as
// ours. A create that was undone again is only seen where Since is given.
//
// A write that timed out could still be on its way. Settle therefore asks not
// with a read but with a transaction that goes through Raft and whose comparison
// can never hold: it takes its place in the log behind everything that was
// proposed before it through the same member (proposals travel to the leader in
// order on one stream), and its answer is read at that place. What it cannot
// fence is a request that has not been proposed when it is itself proposed: one
// still in the buffers of a member that hangs, or in those of another member
// than the one asked, whose connection to the leader hangs. A member forgets a
// request when its connection closes or its deadline is over, so these windows
// are open for less than RequestTimeout after the write, in practice for
// milliseconds. Commit closes them for updates and deletes, since its repeated
// comparison can only succeed once.
func (c *Client) Settle(ctx context.Context, e Expect) (fate Fate, revision int64, err error) {
	return c.settle(ctx, e, false)
}

// settle is patient while nobody answers, as after a restart of the member.
func (c *Client) settle(ctx context.Context, e Expect, patient bool) (fate Fate, revision int64, err error) {
	what := "finding out about " + name(e.Key)
	if e.Key == "" {
		return Undetermined, 0, fault.New(fault.Usage, "", "%s: the key is empty", what)
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	kv, found, now, err := c.fence(ctx, what, e.Key, patient)
	if err != nil {
		return Undetermined, 0, err
	}
	from := max(e.ModRevision, e.Since) + 1
	switch {
	case e.ModRevision > 0 && found && kv.ModRevision == e.ModRevision:
		return NotDone, 0, nil
	case e.ModRevision == 0 && e.Since == 0 && !found:
		return NotDone, 0, nil
	case e.ModRevision == 0 && e.Since == 0:
		from = kv.CreateRevision
	case found && kv.ModRevision < from:
		// Unchanged since Since, and so not by us.
		return NotDone, 0, nil
	}
	until := int64(math.MaxInt64) // the key changed, so that there is an event
	if e.ModRevision == 0 && !found {
		until = now // it may never have been there
	}
	ev, state, err := c.firstEvent(ctx, e.Key, from, until)
	switch {
	case err != nil:
		return Undetermined, 0, c.explain(ctx, what, err, true)
	case state == none:
		return NotDone, 0, nil
	case state == compacted:
		if e.Deleted && !found {
			return Done, 0, nil
		}
		if !e.Deleted && found && sha256.Sum256(kv.Value) == e.SHA256 {
			return Done, kv.ModRevision, nil
		}
		return Undetermined, 0, nil
	}
	deleted := ev.Type == clientv3.EventTypeDelete
	if deleted == e.Deleted && (deleted || sha256.Sum256(ev.Kv.Value) == e.SHA256) {
		return Done, ev.Kv.ModRevision, nil
	}
	return NotDone, 0, nil
}

// fence reads a key at a place of its own in the Raft log; now is the cluster's
// revision there. A delete makes the transaction a write for etcd
// (server/etcdserver/txn: IsTxnReadonly) and passes a NOSPACE alarm; no key has
// a version below zero, so that it is never carried out and the revision stays.
// It is repeated freely, having no effect.
func (c *Client) fence(ctx context.Context, what, key string, patient bool) (kv KV, found bool, now int64, err error) {
	k := []byte(key)
	req := &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: k, Target: pb.Compare_VERSION, Result: pb.Compare_LESS, TargetUnion: &pb.Compare_Version{Version: 0}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: k}}}},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: k}}}},
	}
	var last error
	lastSent, unsents := false, 0
	for try := 0; ; try++ {
		actx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), c.attempt)
		var p peer.Peer
		resp, err := c.kv.Txn(actx, req, opts(&p, math.MaxInt32)...)
		cancel()
		if err == nil {
			if kvs := resp.Responses[0].GetResponseRange().GetKvs(); len(kvs) == 1 {
				return fromWire(kvs[0]), true, resp.Header.Revision, nil
			}
			return KV{}, false, resp.Header.Revision, nil
		}
		// The deadline that ends the series says less than what came before.
		if last == nil || !tooLong(err) {
			last, lastSent = err, p.Addr != nil
		}
		v := judge(err, p.Addr != nil)
		if v == unsent {
			unsents++
		}
		if v == rejected || !patient && unsents > 3 || !pause(ctx, try) {
			return KV{}, false, 0, c.explain(ctx, what, last, lastSent)
		}
	}
}

// Quiet is what etcd's history tells of a key after some revision.
type Quiet string

// What it tells.
const (
	Untouched Quiet = "untouched" // nothing happened to the key
	Touched   Quiet = "touched"
	// Forgotten: the history was compacted away, or is another one.
	Forgotten Quiet = "forgotten"
)

// QuietSince tells of up to MaxMany keys what happened to each after the revision
// given with it, and up to which revision that is known. It never rests on what one
// member has: without a leader it is fault.NoQuorum.
func (c *Client) QuietSince(ctx context.Context, since map[string]int64) (found map[string]Quiet, upTo int64, err error) {
	what := fmt.Sprintf("looking at the history of %d keys", len(since))
	if len(since) == 0 || len(since) > MaxMany {
		return nil, 0, fault.New(fault.Usage, "", "%s at once", what)
	}
	keys := slices.Sorted(maps.Keys(since))
	_, _, view, err := c.Get(ctx, keys[0])
	if err == nil && view.Stale != "" {
		err = fault.New(fault.NoQuorum, "bring etcd's members back first", "%s: %s", what, view.Stale)
	}
	if err != nil {
		return nil, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	ctx = ownStream(ctx)
	found = make(map[string]Quiet, len(keys))
	watches := make(map[string]clientv3.WatchChan, len(keys))
	for _, key := range keys {
		switch revision := since[key]; {
		case revision <= 0 || revision > view.Revision: // etcd was restored since
			found[key] = Forgotten
		case revision == view.Revision:
			found[key] = Untouched
		default:
			watches[key] = c.cl.Watch(ctx, key, clientv3.WithRev(revision+1))
		}
	}
	for key, events := range watches {
		_, state, err := c.first(ctx, events, view.Revision)
		if err != nil {
			return nil, 0, c.explain(ctx, what, err, true)
		}
		found[key] = map[history]Quiet{none: Untouched, event: Touched, compacted: Forgotten}[state]
	}
	return found, view.Revision, nil
}

type history int

const (
	event     history = iota // there is an event
	none                     // nothing happened to the key
	compacted                // etcd has forgotten
)

// stream numbers the watch streams, so that each is one's own.
var stream atomic.Uint64

// firstEvent returns the first event on the key at or after from, and none if
// there is no such event up to the revision until.
func (c *Client) firstEvent(ctx context.Context, key string, from, until int64) (*clientv3.Event, history, error) {
	if from > until {
		return nil, none, nil
	}
	ctx, cancel := context.WithCancel(ownStream(ctx))
	defer cancel()
	return c.first(ctx, c.cl.Watch(ctx, key, clientv3.WithRev(from)), until)
}

// ownStream gives watches a stream that is not shared with others: clientv3 has one
// for all of equal metadata. Progress is told per stream, and the progress of
// another watch must not pass for ours.
func ownStream(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "halligan-watch", strconv.FormatUint(stream.Add(1), 10))
}

// first is firstEvent of a watch in ctx.
func (c *Client) first(ctx context.Context, events clientv3.WatchChan, until int64) (*clientv3.Event, history, error) {
	// etcd answers a request for progress once the watch has caught up, so an
	// answer that is not older than until and has no event before it means that
	// there was none. (Before 3.4.25 and 3.5.8 it answers at once: etcd issue
	// 15220.)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case r, ok := <-events:
			switch {
			case !ok:
				return nil, none, cmp.Or(ctx.Err(), errors.New("the watch ended"))
			case r.CompactRevision != 0:
				return nil, compacted, nil
			case r.Err() != nil:
				return nil, none, r.Err()
			case len(r.Events) > 0:
				return r.Events[0], event, nil
			case r.IsProgressNotify() && r.Header.Revision >= until:
				return nil, none, nil
			}
		case <-tick.C:
			if until == math.MaxInt64 {
				continue
			}
			if err := c.cl.RequestProgress(ctx); err != nil {
				return nil, none, err
			}
		case <-ctx.Done():
			return nil, none, ctx.Err()
		}
	}
}
