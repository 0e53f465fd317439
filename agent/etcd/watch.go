package etcd

import (
	"context"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/halligan-io/halligan/internal/fault"
)

// Change is one write that a watch saw.
type Change struct {
	KV
	// Deleted: the key is gone, and there is no value.
	Deleted bool
}

// Watch calls fn for every write to a key that begins with prefix, from now on,
// in order, until the context ends, which is no error. ready is called once etcd
// watches. fn must be quick: what it does not take is kept in memory.
func (c *Client) Watch(ctx context.Context, prefix string, ready func(), fn func(Change)) error {
	what := "watching " + name(prefix)
	key, end := interval(prefix)
	wctx, cancel := context.WithCancel(ownStream(clientv3.WithRequireLeader(ctx)))
	defer cancel()
	events := c.cl.Watch(wctx, string(key), clientv3.WithRange(string(end)), clientv3.WithCreatedNotify(), clientv3.WithFragment())
	for {
		select {
		case r, ok := <-events:
			switch {
			case ctx.Err() != nil:
				return nil
			case !ok:
				return fault.New(fault.Failed, "try again", "%s: the watch ended", what)
			case r.Err() != nil:
				return c.explain(ctx, what, r.Err(), true)
			case r.Created:
				ready()
			}
			for _, e := range r.Events {
				fn(Change{KV: fromWire(e.Kv), Deleted: e.Type == clientv3.EventTypeDelete})
			}
		case <-ctx.Done():
			return nil
		}
	}
}
