package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/halligan-io/halligan/agent/storage"
	"github.com/halligan-io/halligan/internal/durable"
)

// Bounds of one seeding transaction, below etcd's defaults of 128 operations
// (server/embed/config.go: DefaultMaxTxnOps) and 1.5 MiB.
const (
	seedOps   = 100
	seedBytes = 512 << 10
	// seedWriters keep the members' disks busy while others encode.
	seedWriters = 4
	// seedLease is how long an API server keeps events (--event-ttl).
	seedLease = time.Hour
)

// Seeded says what a lab's etcd was seeded with.
type Seeded struct {
	Objects int
	Nodes   int
	Runaway int // ConfigMaps labelled app=runaway
}

// seed fills an empty etcd. What was seeded is noted in the folder last, so
// that a seeding that was interrupted is done again; it is deterministic and
// writes the same keys.
func (l *Lab) seed(ctx context.Context) error {
	note := filepath.Join(l.opts.Dir, "seeded.json")
	data, err := os.ReadFile(note)
	if err == nil {
		l.say("objects: %s has its objects from an earlier run", l.opts.Dir)
		return json.Unmarshal(data, &l.seeded)
	}
	if !errors.Is(err, fs.ErrNotExist) || l.opts.Objects <= 0 {
		if l.opts.Objects <= 0 {
			return nil
		}
		return err
	}
	began := time.Now()
	cli, err := l.cluster.Client()
	if err != nil {
		return err
	}
	defer cli.Close()
	if l.seeded, err = Seed(ctx, cli, l.opts.Objects, l.opts.Nodes, func(done int64) {
		l.say("objects: %d written", done)
	}); err != nil {
		return err
	}
	l.say("objects: %d of a cluster with %d nodes after %s", l.seeded.Objects, l.seeded.Nodes, since(began))
	if data, err = json.Marshal(l.seeded); err != nil {
		return err
	}
	return durable.Write(note, data)
}

// Seed writes about that many objects of a cluster with so many worker nodes, as
// an API server stores them under its default prefix. The same numbers give the
// same keys and values. progress, if any, is called every 20,000 objects.
func Seed(ctx context.Context, cli *clientv3.Client, objects, workers int, progress func(done int64)) (Seeded, error) {
	lease, err := cli.Grant(ctx, int64(seedLease/time.Second))
	if err != nil {
		return Seeded{}, err
	}
	catalogue := storage.NewCatalogue()
	crd, err := storage.EncodeTyped(cacheCRD())
	if err != nil {
		return Seeded{}, err
	}
	if err := catalogue.AddCRD(crd); err != nil {
		return Seeded{}, err
	}
	w := seedWriter{cli: cli, catalogue: catalogue, lease: lease.ID, progress: progress}
	items := make(chan []item, seedWriters)
	g, ctx := errgroup.WithContext(ctx)
	for range seedWriters {
		g.Go(func() error {
			for batch := range items {
				if err := w.write(ctx, batch); err != nil {
					return err
				}
			}
			return nil
		})
	}
	var seeded Seeded
	g.Go(func() error {
		defer close(items)
		var batch []item
		seeded = population(objects, workers, func(i item) bool {
			if batch = append(batch, i); len(batch) < seedOps {
				return ctx.Err() == nil
			}
			select {
			case items <- batch:
				batch = nil
				return true
			case <-ctx.Done():
				return false
			}
		})
		select {
		case items <- batch:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return seeded, g.Wait()
}

type seedWriter struct {
	cli       *clientv3.Client
	catalogue *storage.Catalogue
	lease     clientv3.LeaseID
	progress  func(int64)
	done      atomic.Int64
}

// write puts a batch in as few transactions as its bytes allow.
func (w *seedWriter) write(ctx context.Context, batch []item) error {
	var ops []clientv3.Op
	bytes := 0
	flush := func() error {
		if len(ops) == 0 {
			return nil
		}
		if _, err := w.cli.Txn(ctx).Then(ops...).Commit(); err != nil {
			return err
		}
		if n := w.done.Add(int64(len(ops))); w.progress != nil && n/20_000 > (n-int64(len(ops)))/20_000 {
			w.progress(n)
		}
		ops, bytes = nil, 0
		return nil
	}
	for _, i := range batch {
		kind := w.catalogue.ByGroupKind(i.group, i.kind)
		if kind == nil {
			return fmt.Errorf("the catalogue has no %s of the group %q", i.kind, i.group)
		}
		key, err := kind.Key(storage.DefaultPrefix, i.obj.GetNamespace(), i.obj.GetName())
		if err != nil {
			return err
		}
		value, err := storage.EncodeTyped(i.obj)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		if bytes += len(key) + len(value); bytes > seedBytes {
			if err := flush(); err != nil {
				return err
			}
			bytes = len(key) + len(value)
		}
		var opts []clientv3.OpOption
		if i.kind == "Event" {
			opts = append(opts, clientv3.WithLease(w.lease))
		}
		ops = append(ops, clientv3.OpPut(key, string(value), opts...))
	}
	return flush()
}
