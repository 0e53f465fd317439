package etcd

import (
	"context"
	"crypto/sha256"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/peer"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
)

// Write is one compare-and-swap on one key.
type Write struct {
	Key string
	// ModRevision is the revision that the key must be at; 0: it must not
	// exist.
	ModRevision int64
	// Value is the new value; nil deletes the key, and then ModRevision must
	// not be 0.
	Value []byte
	// KeepLease keeps the lease that the key has. Without it, an update
	// detaches the key from its lease.
	KeepLease bool
	// Lease is the lease of a key that is created; 0: none.
	Lease int64
	// Since is a revision of the cluster that was read before the write. It
	// lets the history tell a create that happened from one that did not.
	Since int64
}

// Expect returns what Settle needs to know about the write.
func (w Write) Expect() Expect {
	return Expect{Key: w.Key, ModRevision: w.ModRevision, Since: w.Since, Deleted: w.Value == nil, SHA256: sha256.Sum256(w.Value)}
}

func (w Write) check() error {
	switch {
	case w.Key == "":
		return fault.New(fault.Usage, "", "writing to etcd: the key is empty")
	case w.ModRevision < 0 || w.ModRevision == 0 && w.Value == nil:
		return fault.New(fault.Usage, "read the key first", "writing %s: a delete needs the revision that it deletes", name(w.Key))
	case w.Lease != 0 && w.ModRevision != 0, w.KeepLease && w.ModRevision == 0:
		return fault.New(fault.Usage, "", "writing %s: a lease is given to a new key and kept by an old one", name(w.Key))
	}
	return nil
}

func (w Write) request() *pb.TxnRequest {
	key := []byte(w.Key)
	var op *pb.RequestOp
	if w.Value == nil {
		op = &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}}
	} else {
		op = &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: key, Value: w.Value, Lease: w.Lease, IgnoreLease: w.KeepLease}}}
	}
	return &pb.TxnRequest{
		// A key that is absent compares as one with mod revision 0.
		Compare: []*pb.Compare{{Key: key, Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_ModRevision{ModRevision: w.ModRevision}}},
		Success: []*pb.RequestOp{op},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key, KeysOnly: true}}}},
	}
}

// Commit carries the write out exactly once and returns its revision, or an
// error:
//
//   - fault.Stale: the key is not at ModRevision; the message says whether it is
//     gone, there already or changed. Nothing was written.
//   - fault.NoSpace, fault.TooLarge, fault.NoQuorum, fault.Unreachable,
//     fault.Unauthenticated, fault.Usage, fault.Failed: nothing was written.
//   - fault.Unknown: the request was sent, and time ran out before it could be
//     found out whether it was done, or will be. Settle tells later.
//
// On the way that usually works it is one round trip. What was refused before
// it could take effect (no leader, too many requests, no connection) is tried
// again with backoff until RequestTimeout. After an error that leaves the
// outcome open, Settle is asked first; where it says not done, the same
// comparison is sent again, and if an earlier copy was still under way, only one
// of them can succeed, and the history tells which. A create has no revision
// that makes it unique: it is sent again only after the deadline that the
// server knows for the copy before is over.
//
// It is fault.AuditUnavailable, and nothing is sent, where the permit does not hold.
func (c *Client) Commit(ctx context.Context, permit audit.Permit, w Write) (revision int64, err error) {
	if err := permit.Check(); err != nil {
		return 0, err
	}
	if err := w.check(); err != nil {
		return 0, err
	}
	what := "writing " + name(w.Key)
	if w.Value == nil {
		what = "deleting " + name(w.Key)
	}
	req := w.request()
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	unknown := func(cause error) error {
		return &fault.Error{Code: fault.Unknown, Cause: cause, Next: "look again when etcd has a leader: its history tells",
			Message: what + ": sent, but whether it was done is not known: " + fault.Of(cause).Message}
	}
	doubt := false // an earlier copy may have been done, or may yet be
	settle := func() (Fate, int64, error) { return c.settle(ctx, w.Expect(), true) }
	for try, lost := 0, 0; ; try++ {
		actx, acancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), c.attempt)
		deadline, _ := actx.Deadline()
		var p peer.Peer
		resp, err := c.kv.Txn(actx, req, opts(&p, maxMessage)...)
		acancel()
		sent := p.Addr != nil
		if err == nil && resp.Succeeded {
			if c.lost.Load() != nil {
				c.lost.Store(nil)
			}
			return resp.Header.Revision, nil
		}
		if err == nil && !doubt {
			return 0, w.stale(what, resp)
		}
		if err == nil { // the comparison failed: by ourselves, or by another writer
			fate, rev, serr := settle()
			switch fate {
			case Done:
				return rev, nil
			case NotDone:
				return 0, w.stale(what, resp)
			}
			return 0, unknown(orUndetermined(serr))
		}
		v := judge(err, sent)
		again := false
		switch v {
		case unsent:
			lost++
			again = lost <= 3
		case refused:
			again = true
		case doubtful:
			doubt, again = true, true
		}
		if v == doubtful || v == noSpace || !again && doubt {
			fate, rev, serr := settle()
			switch {
			case fate == Done:
				return rev, nil
			case fate == Undetermined:
				return 0, unknown(orUndetermined(serr))
			case v == doubtful && w.ModRevision == 0 && !sleep(ctx, time.Until(deadline)):
				return 0, unknown(c.explain(caller, what, err, sent))
			case v == noSpace:
				return 0, c.explain(caller, what, err, sent)
			}
		}
		if again && pause(ctx, try) {
			continue
		}
		if doubt && v != rejected {
			return 0, unknown(c.explain(caller, what, err, sent))
		}
		return 0, c.explain(caller, what, err, sent)
	}
}

func orUndetermined(err error) error {
	if err != nil {
		return err
	}
	return fault.New(fault.Failed, "", "etcd's history of the key is compacted")
}

func (w Write) stale(what string, resp *pb.TxnResponse) error {
	var rev int64
	if len(resp.Responses) == 1 {
		if kvs := resp.Responses[0].GetResponseRange().GetKvs(); len(kvs) == 1 {
			rev = kvs[0].ModRevision
		}
	}
	const next = "nothing was written: plan again"
	switch {
	case rev == 0:
		return fault.New(fault.Stale, next, "%s: the key is gone", what)
	case w.ModRevision == 0:
		return fault.New(fault.Stale, next, "%s: the key exists already, since revision %d", what, rev)
	}
	return fault.New(fault.Stale, next, "%s: the key was changed at revision %d, the plan is of revision %d", what, rev, w.ModRevision)
}
