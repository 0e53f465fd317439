package store

import (
	"bytes"
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

const (
	bundleKey = root + "bundle"
	// shareEvery is how often the bundle in the store is looked at.
	shareEvery = 2 * time.Second
	// writeEvery is the least time between two bundles that this bastion writes,
	// whoever else may write, too.
	writeEvery = 5 * time.Second
)

// Bundles is the bundle that the bastion trusts: a *bundle.Store.
type Bundles interface {
	// Offer verifies what it is given, and takes over what is newer.
	Offer(data []byte) (changed bool, err error)
	// Current returns what is in force.
	Current() *bundle.Bundle
	Subscribe() (changed <-chan struct{}, cancel func())
}

// Share keeps the bundle in force and the one in the store the same, until the
// context ends: each gets what is newer in the other. What is in the store is
// verified like what anybody brings.
func (s *Store) Share(ctx context.Context, own Bundles) {
	changed, cancel := own.Subscribe()
	defer cancel()
	every := time.NewTicker(shareEvery)
	defer every.Stop()
	var seen int64 // revision of what was last looked at
	var wrote time.Time
	said := ""
	for {
		_ = s.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
			got, err := c.Get(ctx, bundleKey, clientv3.WithKeysOnly())
			if err != nil {
				return err
			}
			var theirs []byte
			revision := int64(0)
			if len(got.Kvs) > 0 {
				revision = got.Kvs[0].ModRevision
				if revision == seen {
					return nil
				}
				if got, err = c.Get(ctx, bundleKey, clientv3.WithRev(got.Header.Revision)); err != nil {
					return err
				}
				if len(got.Kvs) == 0 {
					return nil
				}
				theirs = got.Kvs[0].Value
			}
			bad := ""
			if len(theirs) > 0 && !bytes.Equal(theirs, own.Current().Raw()) {
				// Alarms of a fork are the bundle's to raise, and whoever is right,
				// writing over the other ends nothing.
				switch changed, err := own.Offer(theirs); {
				case errors.Is(err, bundle.ErrForked):
					seen = revision
					return nil
				case err != nil && !changed && !errors.Is(err, bundle.ErrOlder):
					bad = "the bundle in the bastions' store is not used: " + neutral.LineMax(fault.Of(err).Message, 256)
				}
			}
			if bad != said && bad != "" {
				s.o.Log.Warn().Msg(bad)
			}
			said = bad
			if !newer(own.Current(), theirs) { // perhaps it is this bastion that is behind
				seen = revision
				return nil
			}
			if time.Since(wrote) < writeEvery {
				return nil // the next time, or the one after
			}
			wrote = time.Now()
			_, err = c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(bundleKey), "=", revision)).Then(clientv3.OpPut(bundleKey, string(own.Current().Raw()))).Commit()
			return err
		})
		select {
		case <-ctx.Done():
			return
		case <-s.ctx.Done():
			return
		case <-changed:
			seen = 0
		case <-every.C:
		}
	}
}

// newer reports whether a bundle has a part that the other file has not, or only
// an older one.
func newer(b *bundle.Bundle, other []byte) bool {
	f, err := bundle.Parse(other)
	if err != nil || f.Policy == nil || f.Inventory == nil || f.Revocations == nil {
		return true
	}
	return b.Policy.Version > f.Policy.Version || b.Inventory.Version > f.Inventory.Version || b.Revocations.Version > f.Revocations.Version
}
