package store

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/neutral"
)

const (
	sessions = root + "sessions/" // BASTION/ID
	// sessionLease is how long a bastion that is gone has sessions, in seconds,
	// and renewEvery how often one that is there says so.
	sessionLease = 30
	renewEvery   = 8 * time.Second
	// publishEvery is how often changes are told: what comes and goes between is
	// not.
	publishEvery = time.Second
	// maxSessions bounds those of one bastion, and those that are listed.
	maxSessions = 4096
	maxListed   = 2 * maxSessions
	// maxOps is how many keys one request changes; etcd takes 128.
	maxOps = 100
	// maxText bounds each text of a session, in bytes.
	maxText = 128
)

// Enter notes that somebody is in, until leave is called. It does not block and
// needs no store: other bastions see it within seconds, if they can. It fills in
// the session's ID and bastion.
func (s *Store) Enter(x *halliganv1.Session) (leave func()) {
	x = proto.CloneOf(x)
	x.Id, x.Bastion = uuid.NewString(), s.o.Bastion
	shorten(x)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.own) >= maxSessions {
		return func() {}
	}
	s.own[x.GetId()] = x
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.own, x.GetId())
	}
}

// shorten bounds what a session says, and makes it safe to show.
func shorten(x *halliganv1.Session) {
	for _, text := range []*string{&x.Id, &x.Bastion, &x.Person, &x.Credential, &x.Door, &x.Source, &x.Target} {
		*text = neutral.LineMax(*text, maxText)
	}
}

// Sessions returns who is in on any bastion, the oldest first, and says why some
// may be missing. Those of other bastions are what the store says, no more.
func (s *Store) Sessions(ctx context.Context) (list []*halliganv1.Session, incomplete string) {
	err := s.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
		list = nil
		got, err := c.Get(ctx, sessions, clientv3.WithPrefix(), clientv3.WithLimit(maxListed))
		if err != nil {
			return err
		}
		for _, kv := range got.Kvs {
			bastion, id, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), sessions), "/")
			x := &halliganv1.Session{}
			if bastion == s.o.Bastion || !fromStore(kv.Value, x, func() []*timestamppb.Timestamp { return []*timestamppb.Timestamp{x.Started} }) || x.GetBastion() != bastion || x.GetId() != id {
				continue
			}
			shorten(x)
			list = append(list, x)
		}
		if got.More {
			incomplete = "there are more"
		}
		return nil
	})
	if err != nil {
		incomplete = "those of other bastions are not known: " + err.Error()
	}
	s.mu.Lock()
	for _, x := range s.own {
		list = append(list, proto.CloneOf(x))
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b *halliganv1.Session) int {
		return cmp.Or(a.GetStarted().AsTime().Compare(b.GetStarted().AsTime()), cmp.Compare(a.GetId(), b.GetId()))
	})
	return list, incomplete
}

// publish tells other bastions of this one's sessions until the store is closed,
// under a lease that ends with this process.
func (s *Store) publish() {
	p := &published{store: s}
	every := time.NewTicker(publishEvery)
	defer every.Stop()
	for {
		select {
		case <-s.ctx.Done():
			p.withdraw()
			return
		case <-every.C:
		}
		if err := s.call(s.ctx, p.renew); err == nil {
			_ = s.call(s.ctx, p.update) // else the next one does
		}
	}
}

// published is what the store has of this bastion's sessions.
type published struct {
	store   *Store
	lease   clientv3.LeaseID
	renewed time.Time
	ids     map[string]bool
}

// renew sees to it that there is a lease.
func (p *published) renew(ctx context.Context, c *clientv3.Client) error {
	if p.lease != clientv3.NoLease {
		if time.Since(p.renewed) < renewEvery {
			return nil
		}
		switch _, err := c.KeepAliveOnce(ctx, p.lease); {
		case err == nil:
			p.renewed = time.Now()
			return nil
		case !errors.Is(err, rpctypes.ErrLeaseNotFound):
			return err
		}
	}
	granted, err := c.Grant(ctx, sessionLease)
	if err != nil {
		return err
	}
	p.lease, p.renewed, p.ids = granted.ID, time.Now(), map[string]bool{}
	return nil
}

// update brings the store up to date, some sessions at a time.
func (p *published) update(ctx context.Context, c *clientv3.Client) error {
	p.store.mu.Lock()
	own := maps.Clone(p.store.own) // whose elements do not change
	p.store.mu.Unlock()
	var ops []clientv3.Op
	var changes []func()
	flush := func() error {
		if len(ops) == 0 {
			return nil
		}
		if _, err := c.Txn(ctx).Then(ops...).Commit(); err != nil {
			if errors.Is(err, rpctypes.ErrLeaseNotFound) {
				p.lease = clientv3.NoLease
				return nil // another one, next time
			}
			return err
		}
		for _, change := range changes {
			change()
		}
		ops, changes = nil, nil
		return nil
	}
	add := func(op clientv3.Op, change func()) error {
		if ops, changes = append(ops, op), append(changes, change); len(ops) == maxOps {
			return flush()
		}
		return nil
	}
	for id, x := range own {
		if p.ids[id] {
			continue
		}
		value, err := proto.Marshal(x)
		if err != nil {
			continue
		}
		if err := add(clientv3.OpPut(p.key(id), string(value), clientv3.WithLease(p.lease)), func() { p.ids[id] = true }); err != nil {
			return err
		}
	}
	for id := range p.ids {
		if own[id] == nil {
			if err := add(clientv3.OpDelete(p.key(id)), func() { delete(p.ids, id) }); err != nil {
				return err
			}
		}
	}
	return flush()
}

func (p *published) key(id string) string { return sessions + p.store.o.Bastion + "/" + id }

// withdraw takes all out again, if that goes quickly.
func (p *published) withdraw() {
	c := p.store.client.Load()
	if c == nil || p.lease == clientv3.NoLease {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.store.ctx), tryTimeout)
	defer cancel()
	_, _ = c.Revoke(ctx, p.lease) // else they end by themselves
}
