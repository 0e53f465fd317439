package evidence_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/rs/zerolog"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// outsiders verify one generation with tools that are not ours: tessera's fsck and
// torchwood's client. They need its folder and its key.
func outsiders(ctx context.Context, dir, vkey string) (fromFsck, fromTorchwood error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return err, err
	}
	hashes := func(data []byte) (list [][]byte, _ error) {
		var b api.EntryBundle
		if err := b.UnmarshalText(data); err != nil {
			return nil, err
		}
		for _, e := range b.Entries {
			h := tlog.RecordHash(e)
			list = append(list, h[:])
		}
		return list, nil
	}
	fromFsck = fsck.New(v.Name(), v, client.FileFetcher{Root: dir}, hashes, fsck.Opts{}).Check(ctx)
	fromTorchwood = func() error {
		f, err := torchwood.NewTileFS(os.DirFS(dir))
		if err != nil {
			return err
		}
		raw, err := f.ReadEndpoint(ctx, "checkpoint")
		if err != nil {
			return err
		}
		c, _, err := torchwood.VerifyCheckpoint(raw, torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(v.Name()), torchwood.SingleVerifierPolicy(v)))
		if err != nil {
			return err
		}
		reader, err := torchwood.NewClient(f)
		if err != nil {
			return err
		}
		n := int64(0)
		for range reader.AllEntries(ctx, c.Tree, 0) {
			n++
		}
		if reader.Err() == nil && n != c.N {
			return fmt.Errorf("%d entries of %d", n, c.N)
		}
		return reader.Err()
	}()
	return fromFsck, fromTorchwood
}

// TestOutsidersAgree: a daemon's log is verified as it lies there, by this package
// and by others; of a changed byte all of them say so.
func TestOutsidersAgree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l, err := ledger.Open(ledger.Options{Dir: dir, Origin: "cp-1.prod", GenerationBytes: 64 << 10, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	var last audit.Receipt
	for i := range 300 {
		if last, err = l.Append(t.Context(), audit.Event{Kind: audit.Intent, Action: "scale", Reason: strings.Repeat("r", 300+i%7), Actor: &audit.Actor{Person: "alice"}}); err != nil {
			t.Fatal(err)
		}
	}
	within, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := l.SignedWithin(within, last.Seq); err != nil {
		t.Fatal(err)
	}
	trust := evidence.Trust{Keys: []string{l.State().VKey}, Now: time.Now()}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	verify := func() *evidence.Log {
		t.Helper()
		e, err := evidence.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		r, err := e.Verify(t.Context(), trust)
		if err != nil {
			t.Fatal(err)
		}
		return r.Logs[0]
	}
	log := verify()
	if len(log.Problems) > 0 || log.Events < 300 || len(log.Generations) < 2 {
		t.Fatalf("%+v", log)
	}
	folder := func(g evidence.Generation) string {
		return filepath.Join(dir, "logs", fmt.Sprintf("%s.%08d", log.Lineage, g.Number))
	}
	for _, g := range log.Generations {
		if f, w := outsiders(t.Context(), folder(g), g.VKey); f != nil || w != nil {
			t.Fatalf("generation %d: fsck: %v; torchwood: %v", g.Number, f, w)
		}
	}
	// One byte of the last entry of the first generation.
	g := log.Generations[0]
	bundle := filepath.Join(folder(g), filepath.FromSlash(torchwood.TilePath(tlog.Tile{H: 8, L: -1, N: int64(g.Size-1) / 256, W: int(g.Size-1)%256 + 1})))
	data, err := os.ReadFile(bundle)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.LastIndex(data, []byte("alice"))
	flipped := slices.Clone(data)
	flipped[at] ^= 1
	if err := os.WriteFile(bundle, flipped, 0o600); err != nil {
		t.Fatal(err)
	}
	log = verify()
	f, w := outsiders(t.Context(), folder(g), g.VKey)
	if len(log.Problems) != 1 || log.Problems[0].Seq == nil || f == nil || w == nil {
		t.Fatalf("%+v; fsck: %v; torchwood: %v", log.Problems, f, w)
	}
	index := *log.Problems[0].Seq - g.FirstSeq
	if !strings.Contains(w.Error(), fmt.Sprintf("entry %d", index)) {
		t.Errorf("it is entry %d, and torchwood says: %v", index, w)
	}
}

// BenchmarkVerify is the rate at which a log is verified, in events a second, and
// beside it what torchwood needs for the hashes alone. How many events there are is
// taken from the environment: a million make the figure of README.
func BenchmarkVerify(b *testing.B) {
	size := 20_000
	if text := os.Getenv("HALLIGAN_BENCH_EVENTS"); text != "" { // how many, for a larger one
		if _, err := fmt.Sscan(text, &size); err != nil {
			b.Fatal(err)
		}
	}
	dir, vkey, proof := large(b, size)
	var ours, theirs time.Duration
	for b.Loop() {
		begin := time.Now()
		e, err := evidence.Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		r, err := e.Verify(b.Context(), evidence.Trust{Keys: []string{vkey}, Now: time.Now()})
		if err != nil || !r.OK() || r.Logs[0].Events != uint64(size) {
			b.Fatal(err, r)
		}
		ours += time.Since(begin)
		begin = time.Now()
		v, err := note.NewVerifier(vkey)
		if err != nil {
			b.Fatal(err)
		}
		f, err := torchwood.NewTileFS(os.DirFS(filepath.Join(dir, "logs", "a1b2c3d4.00000001")))
		if err != nil {
			b.Fatal(err)
		}
		raw, err := f.ReadEndpoint(b.Context(), "checkpoint")
		if err != nil {
			b.Fatal(err)
		}
		c, _, err := torchwood.VerifyCheckpoint(raw, torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(v.Name()), torchwood.SingleVerifierPolicy(v)))
		if err != nil {
			b.Fatal(err)
		}
		reader, err := torchwood.NewClient(f)
		if err != nil {
			b.Fatal(err)
		}
		n := 0
		for range reader.AllEntries(b.Context(), c.Tree, 0) {
			n++
		}
		if n != size || errors.Join(reader.Err()) != nil {
			b.Fatal(n, reader.Err())
		}
		theirs += time.Since(begin)
	}
	b.ReportMetric(float64(size*b.N)/ours.Seconds(), "events/s")
	b.ReportMetric(ours.Seconds()/theirs.Seconds(), "x-torchwood")
	b.ReportMetric(float64(proof), "proof-bytes")
}

// large writes a log of so many events in one generation, and returns its folder, its
// key and the size of a proof in it.
func large(b *testing.B, size int) (dir, vkey string, proof int) {
	b.Helper()
	dir = filepath.Join(b.TempDir(), "cp-1.prod")
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		b.Fatal(err)
	}
	tree := logkey.Tree("cp-1.prod", "a1b2c3d4", 1)
	if vkey, err = logkey.VKey(tree, public); err != nil {
		b.Fatal(err)
	}
	v, err := note.NewVerifier(vkey)
	if err != nil {
		b.Fatal(err)
	}
	event := func(n int) []byte {
		data, err := json.Marshal(audit.Event{Version: audit.Version, ID: fmt.Sprintf("20260131T090000.000-%016x", n), Seq: uint64(n), Time: began, Boot: "b", Origin: "cp-1.prod", Kind: audit.Intent,
			Actor:  &audit.Actor{Person: "alice", Role: "responder", Credential: "person", Fingerprint: strings.Repeat("f", 50), Door: "ssh", Source: "192.0.2.1:40000"},
			Action: "scale", Incident: "INC-7", Reason: "too many replicas", Objects: []audit.Object{{Key: "/registry/deployments/shop/web", RevisionBefore: 12345}}})
		if err != nil {
			b.Fatal(err)
		}
		return data
	}
	// The hash first, from one pass over the entries, with a tree's right edge alone.
	edge := map[int]tlog.Hash{}
	for n := range size {
		h := tlog.RecordHash(event(n))
		level := 0
		for ; n>>level&1 == 1; level++ {
			h = tlog.NodeHash(edge[level], h)
		}
		edge[level] = h
	}
	var root *tlog.Hash
	for level := 0; size>>level > 0; level++ {
		if size>>level&1 == 0 {
			continue
		}
		h := edge[level]
		if root != nil {
			h = tlog.NodeHash(h, *root)
		}
		root = &h
	}
	signed, err := note.Sign(&note.Note{Text: torchwood.Checkpoint{Origin: tree, Tree: tlog.Tree{N: int64(size), Hash: *root}}.String()}, noteSigner{tree, v.KeyHash(), private})
	if err != nil {
		b.Fatal(err)
	}
	logDir := filepath.Join(dir, "logs", "a1b2c3d4.00000001")
	if err := os.MkdirAll(logDir, 0o700); err != nil {
		b.Fatal(err)
	}
	log, err := tiles.Open(logDir)
	if err != nil {
		b.Fatal(err)
	}
	if err := log.Append(b.Context(), signed, func(yield func([]byte) bool) {
		for n := range size {
			if !yield(event(n)) {
				return
			}
		}
	}); err != nil {
		b.Fatal(err)
	}
	p, err := tlog.ProveRecord(int64(size), int64(size/2), log.HashReader(tlog.Tree{N: int64(size), Hash: *root}))
	if err != nil {
		b.Fatal(err)
	}
	return dir, vkey, len(torchwood.FormatProof(int64(size/2), p, signed))
}
