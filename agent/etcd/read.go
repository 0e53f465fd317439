package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/halligan-io/halligan/internal/fault"
)

// KV is a key with its value and etcd's counters of it.
type KV struct {
	Key                                         string
	Value                                       []byte
	CreateRevision, ModRevision, Version, Lease int64
}

// View says what a read saw.
type View struct {
	// Revision is the cluster's revision that the read is of.
	Revision int64
	// Stale is empty for a linearizable read. Otherwise it says in words why
	// this is what one member has, which the cluster may have left behind.
	Stale string
}

// quorumLoss is the memory of a linearizable read that found no quorum.
type quorumLoss struct {
	at  time.Time
	why string
}

const (
	// forget is how long reads go straight to what one member has, once a
	// linearizable read has found no quorum.
	forget = 2 * time.Second
	// patience is how long a loss is remembered so far that the next
	// linearizable read does not wait for an election again.
	patience = 30 * time.Second
)

// firstPage is how many keys a walk reads at once before it streams. Of etcd's
// largest usual values they have 12 MiB.
const firstPage = 8

// Get reads one key. It is linearizable unless view.Stale says otherwise.
func (c *Client) Get(ctx context.Context, key string) (kv KV, found bool, view View, err error) {
	if key == "" {
		return kv, false, view, fault.New(fault.Usage, "", "reading etcd: the key is empty")
	}
	resp, view, err := c.read(ctx, "reading "+name(key), &pb.RangeRequest{Key: []byte(key)})
	if err != nil || len(resp.Kvs) == 0 {
		return kv, false, view, err
	}
	return fromWire(resp.Kvs[0]), true, view, nil
}

// Count returns how many keys begin with prefix; "" counts all.
func (c *Client) Count(ctx context.Context, prefix string) (int64, View, error) {
	key, end := interval(prefix)
	resp, view, err := c.read(ctx, "counting "+name(prefix), &pb.RangeRequest{Key: key, RangeEnd: end, CountOnly: true})
	if err != nil {
		return 0, view, err
	}
	return resp.Count, view, nil
}

// Walk calls fn for every key that begins with prefix ("" is all), in key
// order, all at the one revision of the returned View. It keeps only one piece
// of the answer at a time; values stay valid after fn. An error of fn ends it
// and is returned as it is.
//
// After a first few keys it uses the server's range stream (etcd 3.7), else
// pages bounded by bytes, which cost the server a count of all that follows,
// each. In both the server guesses the size of a piece from the one before:
// walk a resource at a time, so that small values are not followed by large
// ones.
//
// A broken connection is taken up again at the same revision. When that was
// compacted away in the meantime the walk fails with fault.Failed; it never
// starts over by itself.
func (c *Client) Walk(ctx context.Context, prefix string, fn func(KV) error) (View, error) {
	what := "reading " + name(prefix)
	key, end := interval(prefix)
	// One linearizable read decides what the walk is a view of, and is often all
	// of it. What follows is served by one member at that revision, so that the
	// loss of the leader cannot stop it.
	first, view, err := c.read(ctx, what, &pb.RangeRequest{Key: key, RangeEnd: end, Limit: firstPage})
	if err != nil {
		return view, err
	}
	w := &walk{c: c, fn: fn, req: &pb.RangeRequest{RangeEnd: end, Revision: view.Revision, Serializable: true}}
	var stop *stopped
	if err := w.take(first.Kvs); errors.As(err, &stop) {
		return view, stop.err
	}
	if !first.More {
		return view, nil
	}
	for tries := 0; ; {
		before := w.seen
		step := w.stream
		if w.paged || c.noStream.Load() {
			step = w.page
		}
		done, sent, err := step(ctx)
		switch {
		case err == nil && done:
			return view, nil
		case err == nil:
			tries = 0
			continue
		case errors.As(err, &stop):
			return view, stop.err
		case status.Code(err) == codes.Unimplemented && !w.paged && !c.noStream.Load():
			c.noStream.Store(true)
			continue
		case overLimit(err) && (!w.paged || w.req.Limit > 1):
			w.shrink()
			continue
		}
		if w.seen > before {
			tries = 0
		}
		tries++
		// A member that lags behind the one that was asked first answers that
		// the revision lies in the future.
		again := status.Code(err) == codes.Unavailable || rpctypes.Error(err) == rpctypes.ErrFutureRev
		if !again || tries > 4 || !pause(ctx, tries) {
			return view, c.explain(ctx, what, err, sent)
		}
	}
}

// walk is a Walk under way; req says what is still to be read.
type walk struct {
	c     *Client
	fn    func(KV) error
	req   *pb.RangeRequest
	seen  int
	paged bool
}

// stopped carries an error of the caller's function past everything that looks
// at etcd's errors.
type stopped struct{ err error }

func (s *stopped) Error() string { return s.err.Error() }

func (w *walk) shrink() {
	if !w.paged {
		w.paged, w.req.Limit = true, 0
		return
	}
	w.req.Limit = max(1, w.req.Limit/4)
}

func (w *walk) take(kvs []*mvccpb.KeyValue) error {
	for i, kv := range kvs {
		kvs[i] = nil
		if err := w.fn(fromWire(kv)); err != nil {
			return &stopped{err}
		}
		w.seen++
		w.req.Key = append(kv.Key, 0)
	}
	return nil
}

// stream reads all that is left as one stream. The server ends it with a piece
// that has a header.
func (w *walk) stream(ctx context.Context) (done, sent bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	idle := time.AfterFunc(w.c.cfg.RequestTimeout, cancel)
	defer idle.Stop()
	fail := func(err error) error {
		if ctx.Err() != nil && !idle.Stop() && status.Code(err) == codes.Canceled {
			return status.Error(codes.DeadlineExceeded, fmt.Sprintf("no data for %s", w.c.cfg.RequestTimeout))
		}
		return err
	}
	w.req.Limit = 0
	var p peer.Peer
	s, err := w.c.kv.RangeStream(ctx, w.req, opts(&p, maxMessage)...)
	if err != nil {
		return false, p.Addr != nil, fail(err)
	}
	for {
		m, err := s.Recv()
		if err == io.EOF {
			return true, true, nil
		}
		if err != nil {
			return false, w.seen > 0 || p.Addr != nil, fail(err)
		}
		idle.Stop()
		if err := w.take(m.GetRangeResponse().GetKvs()); err != nil {
			return false, true, err
		}
		idle.Reset(w.c.cfg.RequestTimeout)
	}
}

// page reads the next page and sets the size of the one after it.
func (w *walk) page(ctx context.Context) (done, sent bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, w.c.cfg.RequestTimeout)
	defer cancel()
	if w.req.Limit == 0 {
		w.req.Limit = 32 // of etcd's largest usual values: 48 MiB
	}
	var p peer.Peer
	resp, err := w.c.kv.Range(ctx, w.req, opts(&p, maxMessage)...)
	if err != nil {
		return false, p.Addr != nil, err
	}
	size := 1
	for _, kv := range resp.Kvs {
		size += len(kv.Key) + len(kv.Value)
	}
	if n := int64(len(resp.Kvs)); n > 0 {
		w.req.Limit = max(1, min(n*int64(w.c.cfg.ReadChunk)/int64(size), 4*w.req.Limit))
	}
	if err := w.take(resp.Kvs); err != nil {
		return false, true, err
	}
	return !resp.More, true, nil
}

// read runs one range request: linearizable and, where there is no quorum for
// that, serializable.
func (c *Client) read(ctx context.Context, what string, req *pb.RangeRequest) (*pb.RangeResponse, View, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	lost := c.lost.Load()
	if lost == nil || time.Since(lost.at) >= forget {
		resp, why, sent, err := c.linearizable(ctx, req, lost)
		if err == nil {
			if lost != nil {
				c.lost.Store(nil)
			}
			return resp, View{Revision: resp.Header.Revision}, nil
		}
		if why == "" || ctx.Err() != nil {
			return nil, View{}, c.explain(ctx, what, err, sent)
		}
		lost = &quorumLoss{at: time.Now(), why: why}
		c.lost.Store(lost)
	}
	req.Serializable = true
	for try := 0; ; try++ {
		var p peer.Peer
		resp, err := c.kv.Range(ctx, req, opts(&p, math.MaxInt32)...)
		if err == nil {
			return resp, View{Revision: resp.Header.Revision, Stale: lost.why}, nil
		}
		if status.Code(err) != codes.Unavailable || try >= 3 || !pause(ctx, try) {
			return nil, View{}, c.explain(ctx, what, err, p.Addr != nil)
		}
	}
}

// linearizable tries for the part of the time that one try may take, through
// an election if need be. why is set when a read of one member is worth a try.
// After a loss that is not long ago, one "no leader" is enough.
func (c *Client) linearizable(ctx context.Context, req *pb.RangeRequest, lost *quorumLoss) (resp *pb.RangeResponse, why string, sent bool, err error) {
	known := lost != nil && time.Since(lost.at) < patience
	rctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), c.attempt)
	defer cancel()
	broken := 0
	for try := 0; ; try++ {
		var p peer.Peer
		resp, err = c.kv.Range(rctx, req, opts(&p, math.MaxInt32)...)
		sent = p.Addr != nil
		switch {
		case err == nil:
			return resp, "", true, nil
		case leaderless(err):
			why = "no leader: this is what one etcd member has, and it may be out of date"
			if known || !pause(rctx, try) {
				return nil, why, sent, err
			}
		case rpctypes.Error(err) == errLearner:
			return nil, "the member is a learner: this is what it has, and it may be out of date", sent, err
		case tooLong(err) && sent:
			return nil, fmt.Sprintf("no quorum answered within %s: this is what one etcd member has, and it may be out of date", c.attempt), sent, err
		case status.Code(err) == codes.Unavailable:
			if broken++; broken > 3 || !pause(rctx, try) {
				return nil, why, sent, err
			}
		default:
			return nil, why, sent, err
		}
	}
}

func interval(prefix string) (key, end []byte) {
	if prefix == "" {
		return []byte{0}, []byte{0} // etcd's words for everything
	}
	return []byte(prefix), []byte(clientv3.GetPrefixRangeEnd(prefix))
}

func fromWire(kv *mvccpb.KeyValue) KV {
	return KV{Key: string(kv.Key), Value: kv.Value, CreateRevision: kv.CreateRevision, ModRevision: kv.ModRevision, Version: kv.Version, Lease: kv.Lease}
}
