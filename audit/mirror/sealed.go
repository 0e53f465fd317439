package mirror

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

const (
	// maxSealed bounds one file of sealed before-images in bytes; those of 10,000
	// objects have some 20 MiB.
	maxSealed = 128 << 20
	// sealedShare is the part of a copy's quota that they may take.
	sealedShare = 4
	// maxVersions is how many older files of one action are kept.
	maxVersions = 3
	// waitSealed is how long one that has begun may take to become whole.
	waitSealed = 10 * time.Minute
	// expireEvery is how often is looked for what the policy keeps no longer.
	expireEvery = time.Hour
	// onItsWay is the form of a file's name until it is whole.
	onItsWay = ".arriving.*.tmp"
)

// arriving is a file of sealed before-images that is on its way.
type arriving struct {
	action string
	file   *os.File
	sum    hash.Hash
	size   int64
	since  time.Time
}

// Images takes the sealed before-images of one stream. It is used by one goroutine,
// which closes it.
type Images struct {
	c  *Copy
	in *arriving
}

// Images returns what takes the sealed before-images of a stream.
func (c *Copy) Images() *Images { return &Images{c: c} }

// Close forgets what did not become whole.
func (i *Images) Close() {
	if i.in != nil {
		i.in.file.Close()
		os.Remove(i.in.file.Name())
		i.in = nil
	}
}

// Part takes a piece, and returns a file's hash when the file is durable. Pieces of
// one file come in order, one file after another.
func (i *Images) Part(p *halliganv1.WitnessSealed) (*halliganv1.WitnessStored, error) {
	name, err := sealed.Name(p.GetActionId())
	if err != nil {
		return nil, err
	}
	if p.GetOffset() == 0 {
		i.Close()
		if i.in, err = i.c.arrive(p.GetActionId(), filepath.Join(i.c.dir, filepath.Dir(name))); err != nil {
			return nil, err
		}
	}
	in := i.in
	if in == nil || in.action != p.GetActionId() || in.size != p.GetOffset() {
		i.Close()
		return nil, fault.New(fault.Usage, "", "%s sends its sealed before-images in no order", i.c.origin)
	}
	if in.size += int64(len(p.GetData())); in.size > maxSealed || i.c.m.o.Now().Sub(in.since) > waitSealed {
		i.Close()
		return nil, fault.New(fault.Refused, "", "sealed before-images of %s of more than %d MiB, or that take too long", i.c.origin, maxSealed>>20)
	}
	if _, err := io.MultiWriter(in.file, in.sum).Write(p.GetData()); err != nil {
		i.Close()
		return nil, err
	}
	if !p.GetLast() {
		return nil, nil
	}
	defer i.Close()
	sum := hex.EncodeToString(in.sum.Sum(nil))
	return &halliganv1.WitnessStored{ActionId: in.action, Sha256: sum}, i.c.keep(in, filepath.Join(i.c.dir, filepath.FromSlash(name)), sum)
}

// Expire removes the sealed before-images that the policy keeps no longer, now and
// every hour until the context ends.
func (m *Mirrors) Expire(ctx context.Context) {
	for {
		for _, c := range m.all() {
			if err := c.expire(); err != nil {
				m.o.Log.Warn().Str("log", c.origin).Err(err).Msg("sealed before-images that are too old could not be removed")
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(expireEvery):
		}
	}
}

func (c *Copy) expire() error {
	at, ok := sealed.Before(c.m.o.Bundle(), c.m.o.Now())
	if !ok {
		return nil
	}
	_, err := sealed.Expire(c.dir, at)
	return err
}

// arrive begins a file, where there is room.
func (c *Copy) arrive(action, dir string) (*arriving, error) {
	c.work.Lock()
	defer c.work.Unlock()
	if err := c.expire(); err != nil {
		return nil, err
	}
	if taken := size(dir); taken >= c.m.o.Quota/sealedShare {
		return nil, fault.New(fault.Refused, "", "the sealed before-images of %s take %d MiB here, which is the most", c.origin, taken>>20)
	}
	f, err := os.CreateTemp(dir, onItsWay)
	if err != nil {
		return nil, err
	}
	return &arriving{action: action, file: f, sum: sha256.New(), since: c.m.o.Now()}, nil
}

// keep makes a whole file durable under its name. A daemon that died before it had
// recorded what it sealed seals again; but whoever has taken a node could send
// others, too, so that what was there stays as ACTION-HASH.age.
func (c *Copy) keep(in *arriving, path, sum string) error {
	c.work.Lock()
	defer c.work.Unlock()
	was, err := fileSum(path)
	switch {
	case err == nil && was == sum:
		return nil
	case err == nil:
		stem := strings.TrimSuffix(path, ".age") + "-"
		if before, err := filepath.Glob(stem + "*.age"); err != nil || len(before) >= maxVersions {
			return fault.New(fault.Refused, "", "%s has sent other sealed before-images of %s too often", c.origin, in.action)
		}
		c.m.o.Log.Warn().Str("log", c.origin).Str("action", in.action).Str("before", was).Str("now", sum).Msg("other sealed before-images than before: both are kept")
		if err := os.Rename(path, stem+was[:8]+".age"); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := in.file.Sync(); err != nil {
		return err
	}
	if err := os.Rename(in.file.Name(), path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", fmt.Errorf("reading %s: %w", path, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// Peers returns the newest statements of the other agents of a cluster, for one of
// them to seal for.
func (m *Mirrors) Peers(of, cluster string) (statements [][]byte) {
	if cluster == bundle.BastionDomain {
		return nil
	}
	for _, c := range m.all() {
		if _, theirs, ok := trust.CutServer(c.origin); ok && theirs == cluster && c.origin != of {
			if data := c.Identity(); data != nil {
				statements = append(statements, data)
			}
		}
	}
	return statements
}
