package etcd

import (
	"context"
	"fmt"
	"maps"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/peer"

	"github.com/halligan-io/halligan/internal/fault"
)

// MaxMany is the largest number of keys that one GetMany takes: etcd's default
// limit of operations in a transaction (server/embed/config.go,
// DefaultMaxTxnOps).
const MaxMany = 128

// GetMany reads keys by name in one round trip, or in some where the names are
// very long; the View is of the first. Keys that do not exist are missing from
// the answer. It is for preparing writes, so it is always linearizable: without
// a leader it is fault.NoQuorum within RequestTimeout. The caller bounds the sum
// of the values.
func (c *Client) GetMany(ctx context.Context, keys []string) (map[string]KV, View, error) {
	// etcd takes requests of 1.5 MiB.
	size := 0
	for i, k := range keys {
		if size += len(k); size > 1<<20 && i > 0 {
			first, view, err := c.getMany(ctx, keys[:i])
			if err != nil {
				return nil, view, err
			}
			rest, _, err := c.GetMany(ctx, keys[i:])
			maps.Copy(first, rest)
			return first, view, err
		}
	}
	return c.getMany(ctx, keys)
}

func (c *Client) getMany(ctx context.Context, keys []string) (map[string]KV, View, error) {
	if len(keys) == 0 || len(keys) > MaxMany {
		return nil, View{}, fault.New(fault.Usage, "", "reading etcd: %d keys at once", len(keys))
	}
	what := fmt.Sprintf("reading %d keys", len(keys))
	req := &pb.TxnRequest{}
	for _, k := range keys {
		req.Success = append(req.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(k)}}})
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	for try, lost := 0, 0; ; try++ {
		actx, acancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), c.attempt)
		var p peer.Peer
		resp, err := c.kv.Txn(actx, req, opts(&p, math.MaxInt32)...)
		acancel()
		if err == nil {
			out := make(map[string]KV, len(keys))
			for _, r := range resp.Responses {
				for _, kv := range r.GetResponseRange().GetKvs() {
					out[string(kv.Key)] = fromWire(kv)
				}
			}
			return out, View{Revision: resp.Header.Revision}, nil
		}
		// A read is repeated freely, but not for long where nobody answers.
		v := judge(err, p.Addr != nil)
		if v == unsent {
			lost++
		}
		if v == rejected || lost > 3 || !pause(ctx, try) {
			return nil, View{}, c.explain(ctx, what, err, p.Addr != nil)
		}
	}
}
