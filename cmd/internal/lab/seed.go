package lab

import (
	"context"
	"crypto/rand"
	"encoding/base64"
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
	Objects int `json:"objects"`
	Nodes   int `json:"nodes"`
	Runaway int `json:"runaway"` // ConfigMaps labelled app=runaway
}

// seed fills an empty etcd. What was seeded is noted in the folder last, so
// that a seeding that was interrupted is done again; it is deterministic and
// writes the same keys.
func (l *Lab) seed(ctx context.Context) error {
	note := l.seededNote()
	switch _, err := os.Stat(note); {
	case err == nil:
		l.say("objects: %s has those of an earlier run", l.opts.Dir)
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case l.opts.Objects <= 0:
		return nil
	case exists(l.kubeDir()):
		l.say("objects: %s has a real control plane, for which none are made up", l.opts.Dir)
		return nil
	}
	began := time.Now()
	cli, err := l.cluster.Client()
	if err != nil {
		return err
	}
	defer cli.Close()
	sealed, err := storage.LoadEncryption(ctx, l.encryption)
	if err != nil {
		return err
	}
	defer sealed.Close()
	seeded, err := Seed(ctx, cli, Seeding{Objects: l.opts.Objects, Workers: l.opts.Nodes, Encryption: sealed,
		Progress: func(done int64) { l.say("objects: %d written", done) }})
	if err != nil {
		return err
	}
	l.say("objects: %d of a cluster with %d nodes after %s", seeded.Objects, seeded.Nodes, since(began))
	data, err := json.Marshal(seeded)
	if err != nil {
		return err
	}
	return durable.Write(note, data)
}

// Seeding says what to seed.
type Seeding struct {
	// Objects is about how many there will be; some hundred is the least.
	Objects int
	// Workers is how many nodes there are besides those of the control plane.
	Workers int
	// Encryption, if any, encrypts values as the API server would.
	Encryption *storage.Transformers
	// Progress, if any, is called every 20,000 objects.
	Progress func(done int64)
}

// Seed writes the objects of a cluster, as an API server stores them under its
// default prefix. The same numbers give the same keys and, before encryption,
// the same values.
func Seed(ctx context.Context, cli *clientv3.Client, s Seeding) (Seeded, error) {
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
	w := seedWriter{Seeding: s, cli: cli, catalogue: catalogue, lease: lease.ID}
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
		seeded = population(s.Objects, s.Workers, func(i item) bool {
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
	Seeding
	cli       *clientv3.Client
	catalogue *storage.Catalogue
	lease     clientv3.LeaseID
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
		if n := w.done.Add(int64(len(ops))); w.Progress != nil && n/20_000 > (n-int64(len(ops)))/20_000 {
			w.Progress(n)
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
		if w.Encryption != nil {
			if value, err = w.Encryption.Seal(ctx, kind, key, value); err != nil {
				return err
			}
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

// seededNote is the file that says that the folder's etcd has its objects.
func (l *Lab) seededNote() string { return filepath.Join(l.opts.Dir, "seeded.json") }

// writeEncryption makes the cluster's EncryptionConfiguration, with a key of its
// own, unless the folder has one: Secrets are encrypted, as in any cluster that
// is taken care of. A real control plane has it only if asked for, and keeps it.
func (l *Lab) writeEncryption() error {
	file := filepath.Join(l.opts.Dir, "encryption.yaml")
	switch _, err := os.Stat(file); {
	case err == nil:
		l.encryption = file
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case l.kube != nil && !l.kube.o.Encrypt:
		return nil
	}
	l.encryption = file
	key := make([]byte, 32) // secretbox takes no other length
	if _, err := rand.Read(key); err != nil {
		return err
	}
	return durable.Write(file, fmt.Appendf(nil, `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - secretbox:
      keys:
      - {name: lab, secret: %s}
  - identity: {}
`, base64.StdEncoding.EncodeToString(key)))
}
