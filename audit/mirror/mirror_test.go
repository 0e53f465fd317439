package mirror

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/rs/zerolog"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

const origin = testfleet.Server

// fleet is a bundle and a bastion's mirrors under it.
type fleet struct {
	*testfleet.Fleet
	t      *testing.T
	bundle *bundle.Bundle
	dir    string
	key    ed25519.PrivateKey
	now    time.Time

	mu     sync.Mutex
	alarms []string
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{Fleet: testfleet.New(t), t: t, dir: filepath.Join(t.TempDir(), "mirror"), now: time.Now()}
	f.bundle = f.Opened()
	var err error
	if f.key, err = Key(filepath.Join(t.TempDir(), "audit", "witness-key")); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fleet) open(quota int64) *Mirrors {
	f.t.Helper()
	m, err := Open(Options{Dir: f.dir, Server: "a.bastion", Key: f.key, Bundle: func() *bundle.Bundle { return f.bundle }, Now: func() time.Time { return f.now }, Quota: quota, Log: zerolog.Nop(),
		Raise: func(e alarm.Event) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.alarms = append(f.alarms, e.Text)
		}})
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

func (f *fleet) copy(quota int64) *Copy {
	f.t.Helper()
	c, err := f.open(quota).Copy(origin)
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// raised returns the alarms since it was asked last.
func (f *fleet) raised() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.alarms = nil }()
	return f.alarms
}

// statement is that of a server whose log has the key.
func (f *fleet) statement(server string, key ed25519.PrivateKey) []byte {
	f.t.Helper()
	return f.Statement(logkey.Statement{Server: server, Log: key.Public().(ed25519.PublicKey), Signed: f.now})
}

func newKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// log is one generation of a log in memory, which signs whatever a test wants.
type log struct {
	t       *testing.T
	origin  string
	lineage string
	number  uint64
	first   uint64
	key     ed25519.PrivateKey
	entries [][]byte
	hashes  []tlog.Hash
}

func newLog(t *testing.T, origin, lineage string, key ed25519.PrivateKey, events int) *log {
	l := &log{t: t, origin: origin, lineage: lineage, number: 1, key: key}
	l.grow(events, "")
	return l
}

func (l *log) grow(events int, text string) *log {
	for range events {
		l.add(audit.Event{Kind: audit.Read, Text: text})
	}
	return l
}

func (l *log) add(e audit.Event) {
	l.t.Helper()
	e.Version, e.Origin, e.Seq = audit.Version, l.origin, l.first+uint64(len(l.entries))
	e.ID = fmt.Sprintf("e-%d", e.Seq)
	data, err := json.Marshal(e)
	if err != nil {
		l.t.Fatal(err)
	}
	l.raw(data)
}

func (l *log) raw(data []byte) {
	l.t.Helper()
	n := int64(len(l.entries))
	hashes, err := tlog.StoredHashes(n, data, l.reader())
	if err != nil {
		l.t.Fatal(err)
	}
	l.entries, l.hashes = append(l.entries, data), append(l.hashes, hashes...)
}

func (l *log) reader() tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			out[i] = l.hashes[x]
		}
		return out, nil
	})
}

// at returns the log as it was with fewer entries, to go on differently.
func (l *log) at(n int) *log {
	return &log{t: l.t, origin: l.origin, lineage: l.lineage, number: l.number, first: l.first, key: l.key,
		entries: slices.Clone(l.entries[:n]), hashes: slices.Clone(l.hashes[:tlog.StoredHashCount(int64(n))])}
}

// next begins the generation after this one.
func (l *log) next() *log {
	n := &log{t: l.t, origin: l.origin, lineage: l.lineage, number: l.number + 1, first: l.first + uint64(len(l.entries)), key: l.key}
	n.add(audit.Event{Kind: audit.Seam, Previous: string(l.head().Checkpoint)})
	return n
}

func (l *log) head() *halliganv1.WitnessHead {
	l.t.Helper()
	n := int64(len(l.entries))
	root, err := tlog.TreeHash(n, l.reader())
	if err != nil {
		l.t.Fatal(err)
	}
	return l.sign(torchwood.Checkpoint{Origin: logkey.Tree(l.origin, l.lineage, l.number), Tree: tlog.Tree{N: n, Hash: root}})
}

func (l *log) sign(c torchwood.Checkpoint) *halliganv1.WitnessHead {
	l.t.Helper()
	skey, err := noteKey(c.Origin, l.key)
	if err != nil {
		l.t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		l.t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: c.String()}, signer)
	if err != nil {
		l.t.Fatal(err)
	}
	return &halliganv1.WitnessHead{Lineage: l.lineage, Generation: l.number, FirstSeq: l.first, Checkpoint: signed}
}

// since yields entries from an index on, as a stream would.
func (l *log) since(from int) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for _, e := range l.entries[min(from, len(l.entries)):] {
			if !yield(e, nil) {
				return
			}
		}
		yield(nil, io.ErrUnexpectedEOF)
	}
}

// take has the copy take the log as it is.
func take(c *Copy, l *log) ([]byte, error) {
	have := 0
	for _, h := range c.Have() {
		if h.GetLineage() == l.lineage && h.GetGeneration() == l.number {
			have = int(h.GetSize())
		}
	}
	return c.Head(context.Background(), l.head(), l.since(have))
}

func must(t *testing.T, c *Copy, l *log) []byte {
	t.Helper()
	signed, err := take(c, l)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// TestCountersign: what was stored is countersigned, outside tools agree, and a
// bastion that is started again goes on from there.
func TestCountersign(t *testing.T) {
	f := newFleet(t)
	key := newKey(t)
	c := f.copy(0)
	if err := c.Identify(f.statement(origin, key)); err != nil {
		t.Fatal(err)
	}
	if s := c.Status(); s.Lag != -1 || s.Events != 0 {
		t.Errorf("before the first head: %+v", s)
	}
	l := newLog(t, origin, "00ff00ff", key, 3)
	must(t, c, l)
	must(t, c, l.grow(600, "more"))
	signed := must(t, c, l) // nothing new: the same again
	v, err := logkey.WitnessVerifier("a.bastion", f.key.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	own, err := logkey.Verifier(logkey.Tree(origin, l.lineage, 1), key.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	n, err := note.Open(signed, note.VerifierList(v, own))
	if err != nil || len(n.Sigs) != 2 {
		t.Fatalf("%v, %d signatures", err, len(n.Sigs))
	}
	c.Live(true, nil)
	if s := c.Status(); s.Lag != 0 || s.Events != 603 || s.Problem != "" {
		t.Errorf("%+v", s)
	}

	c = f.copy(0)
	if have := c.Have(); len(have) != 1 || have[0].GetSize() != 603 {
		t.Fatalf("started again: %v", have)
	}
	next := l.next().grow(2, "")
	must(t, c, next)
	f.now = f.now.Add(time.Minute)
	if s := c.Status(); s.Lag != time.Minute || s.Events != 606 {
		t.Errorf("without a stream: %+v", s)
	}
	// What lies there is a log that torchwood reads.
	fs, err := torchwood.NewTileFS(os.DirFS(filepath.Join(f.dir, origin, "logs", "00ff00ff.00000001")))
	if err != nil {
		t.Fatal(err)
	}
	client, err := torchwood.NewClient(fs)
	if err != nil {
		t.Fatal(err)
	}
	head, _, err := torchwood.VerifyCheckpoint(signed, torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(logkey.Tree(origin, l.lineage, 1)), torchwood.SingleVerifierPolicy(own)))
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for i, e := range client.AllEntries(t.Context(), head.Tree, 0) {
		if !bytes.Equal(e, l.entries[i]) {
			t.Errorf("entry %d", i)
		}
		count++
	}
	if err := client.Err(); err != nil || count != 603 {
		t.Errorf("torchwood read %d entries: %v", count, err)
	}
	if all := f.raised(); len(all) > 0 {
		t.Error(all)
	}
}

// TestNotWhatItWas: whatever a node that was taken over makes of its log is seen,
// told of once, proven by a file, and neither stored nor signed.
func TestNotWhatItWas(t *testing.T) {
	key := func(l *log, k ed25519.PrivateKey) *log { c := l.at(len(l.entries)); c.key = k; return c }
	for name, c := range map[string]struct {
		now  func(l *log, other ed25519.PrivateKey) *log
		want string
	}{
		"rolled back":        {func(l *log, _ ed25519.PrivateKey) *log { return l.at(7) }, "it was cut: it has 7 entries, and its daemon has signed 10"},
		"forked, as long":    {func(l *log, _ ed25519.PrivateKey) *log { return l.at(9).grow(1, "other") }, "two different logs of 10 entries"},
		"forked, longer":     {func(l *log, _ ed25519.PrivateKey) *log { return l.at(3).grow(20, "other") }, "does not follow from the 10 entries"},
		"closed earlier":     {func(l *log, _ ed25519.PrivateKey) *log { return l.at(8).next() }, "it was closed at 8 entries, and its daemon has signed 10"},
		"closed differently": {func(l *log, _ ed25519.PrivateKey) *log { return l.at(9).grow(1, "other").next() }, "two different logs of 10 entries were closed"},
		"another key":        {func(l *log, k ed25519.PrivateKey) *log { return key(l, k).grow(1, "") }, "another key than it began with"},
		"a generation, no seam": {func(l *log, _ ed25519.PrivateKey) *log {
			n := l.next()
			n.entries, n.hashes = nil, nil
			return n.grow(2, "")
		}, "does not begin with the checkpoint"},
		"a seam of somebody else": {func(l *log, k ed25519.PrivateKey) *log { n := key(l, k).next(); n.key = l.key; return n }, "not by the log's key"},
		"begins in the middle": {func(l *log, _ ed25519.PrivateKey) *log {
			n := l.at(0)
			n.lineage, n.first = "11111111", 4
			return n.grow(1, "")
		}, "begins with event 4"},
		"a closed one that goes on": {func(l *log, _ ed25519.PrivateKey) *log { return l.grow(1, "") }, "closed at 10 entries goes on"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			mine, other := newKey(t), newKey(t)
			copy := f.copy(0)
			if err := copy.Identify(f.statement(origin, mine)); err != nil {
				t.Fatal(err)
			}
			l := newLog(t, origin, "00ff00ff", mine, 10)
			must(t, copy, l)
			if name == "a closed one that goes on" {
				must(t, copy, l.next())
			}
			if name == "another key" {
				f.now = f.now.Add(time.Minute)
				if err := copy.Identify(f.statement(origin, other)); err != nil {
					t.Fatal(err)
				}
			}
			f.raised()
			before := snapshot(t, filepath.Join(f.dir, origin, "logs", "00ff00ff.00000001"))
			bad := c.now(l.at(10), other)
			for range 2 {
				var problem *Problem
				if signed, err := take(copy, bad); !errors.As(err, &problem) || !strings.Contains(err.Error(), c.want) || signed != nil {
					t.Fatalf("%v, want %q", err, c.want)
				}
			}
			all := f.raised()
			if len(all) != 1 || !strings.Contains(all[0], c.want) {
				t.Errorf("alarms: %q", all)
			}
			if now := snapshot(t, filepath.Join(f.dir, origin, "logs", "00ff00ff.00000001")); now != before {
				t.Error("the copy has changed")
			}
			// It stands over a restart, until somebody removes the proof.
			copy = f.copy(0)
			if s := copy.Status(); !strings.Contains(s.Problem, c.want) {
				t.Errorf("after a restart: %+v", s)
			}
			proofs, err := filepath.Glob(filepath.Join(f.dir, origin, "problems", "*"))
			if err != nil || len(proofs) == 0 {
				t.Fatalf("no proof: %v", err)
			}
			for _, p := range proofs {
				if err := os.Remove(p); err != nil {
					t.Fatal(err)
				}
			}
			if s := copy.Status(); s.Problem != "" {
				t.Errorf("without its proof: %+v", s)
			}
			if name != "a closed one that goes on" && name != "another key" {
				must(t, copy, l.grow(1, "as it should be"))
			}
		})
	}
}

// snapshot is all files of a folder.
func snapshot(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	tree, err := tiles.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	raw, c, err := tree.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	b.Write(raw)
	for e, err := range tree.Entries(t.Context(), 0, c.N) {
		if err != nil {
			t.Fatal(err)
		}
		b.Write(e)
	}
	cosigned, err := os.ReadFile(filepath.Join(dir, "cosigned"))
	if err != nil {
		t.Fatal(err)
	}
	b.Write(cosigned)
	return b.String()
}

// TestSwapped: a log is that of the server that it is fetched from.
func TestSwapped(t *testing.T) {
	f := newFleet(t)
	mine, other := newKey(t), newKey(t)
	c := f.copy(0)
	if err := c.Identify(f.statement("cp-2.prod", other)); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("another's statement: %v", err)
	}
	if _, err := take(c, newLog(t, origin, "00ff00ff", mine, 1)); err == nil {
		t.Error("stored before there was a statement")
	}
	if err := c.Identify(f.statement(origin, mine)); err != nil {
		t.Fatal(err)
	}
	for name, l := range map[string]*log{"the log of another": newLog(t, "cp-2.prod", "00ff00ff", other, 2), "by another's key": newLog(t, origin, "00ff00ff", other, 2)} {
		if signed, err := take(c, l); err == nil || signed != nil {
			t.Errorf("%s is stored", name)
		}
	}
	foreign := newLog(t, origin, "00ff00ff", mine, 0)
	foreign.origin = "cp-2.prod"
	foreign.grow(2, "")
	foreign.origin = origin
	if _, err := take(c, foreign); err == nil {
		t.Error("the events of another are stored")
	}
	if len(c.Have()) > 0 {
		t.Error(c.Have())
	}
	must(t, c, newLog(t, origin, "00ff00ff", mine, 2))
}

// TestAnew: a log that begins anew is countersigned from there, and people hear of
// it; what it held stays.
func TestAnew(t *testing.T) {
	f := newFleet(t)
	mine, other := newKey(t), newKey(t)
	c := f.copy(0)
	if err := c.Identify(f.statement(origin, mine)); err != nil {
		t.Fatal(err)
	}
	must(t, c, newLog(t, origin, "00ff00ff", mine, 5))
	f.now = f.now.Add(time.Minute)
	if err := c.Identify(f.statement(origin, other)); err != nil {
		t.Fatal(err)
	}
	must(t, c, newLog(t, origin, "0aaaaaaa", other, 2))
	if all := f.raised(); len(all) != 1 || !strings.Contains(all[0], "began anew") {
		t.Errorf("alarms: %q", all)
	}
	c = f.copy(0)
	if s := c.Status(); s.Events != 2 || !strings.Contains(s.Problem, "began anew") || len(c.Have()) != 2 {
		t.Errorf("%+v, %v", s, c.Have())
	}
	for i := range maxLineages {
		_, err := take(c, newLog(t, origin, fmt.Sprintf("%08x", i), other, 1))
		if last := i >= maxLineages-2; (err != nil) != last {
			t.Errorf("beginning %d: %v", i+3, err)
		}
	}
}

// TestGap: what was never here is told of, and the rest is stored.
func TestGap(t *testing.T) {
	f := newFleet(t)
	key := newKey(t)
	c := f.copy(0)
	if err := c.Identify(f.statement(origin, key)); err != nil {
		t.Fatal(err)
	}
	l := newLog(t, origin, "00ff00ff", key, 5)
	must(t, c, l)
	second := l.grow(5, "").next()
	must(t, c, second)
	if all := f.raised(); len(all) != 1 || !strings.Contains(all[0], "entries 5 to 9 of generation 1 were never here") {
		t.Errorf("alarms: %q", all)
	}
	must(t, c, second.next().next())
	if all := f.raised(); len(all) != 1 || !strings.Contains(all[0], "generation 3 was never here") {
		t.Errorf("alarms: %q", all)
	}
}

// TestHostile: a node that sends whatever it likes costs a bounded amount of disk
// and nothing else.
func TestHostile(t *testing.T) {
	f := newFleet(t)
	key := newKey(t)
	const quota = 1 << 20
	c := f.copy(quota)
	if err := c.Identify(f.statement(origin, key)); err != nil {
		t.Fatal(err)
	}
	l := newLog(t, origin, "00ff00ff", key, 5)
	must(t, c, l)
	tree := logkey.Tree(origin, l.lineage, 1)
	endless := func(size int) iter.Seq2[[]byte, error] {
		return func(yield func([]byte, error) bool) {
			for entry := bytes.Repeat([]byte("x"), size); yield(entry, nil); {
			}
		}
	}
	refused := func(name string, head *halliganv1.WitnessHead, entries iter.Seq2[[]byte, error]) {
		t.Helper()
		if signed, err := c.Head(t.Context(), head, entries); err == nil || signed != nil {
			t.Errorf("%s: %v", name, err)
		}
		if have := c.Have(); len(have) != 1 || have[0].GetSize() != 5 {
			t.Fatalf("%s: %v", name, have)
		}
		if took := size(f.dir); took > 3*quota {
			t.Fatalf("%s: %d bytes on disk", name, took)
		}
	}
	refused("a huge size", l.sign(torchwood.Checkpoint{Origin: tree, Tree: tlog.Tree{N: 1 << 60}}), endless(1))
	refused("endless entries", l.sign(torchwood.Checkpoint{Origin: tree, Tree: tlog.Tree{N: 10_000}}), endless(1000))
	refused("a long entry", l.sign(torchwood.Checkpoint{Origin: tree, Tree: tlog.Tree{N: 6}}), endless(audit.MaxEvent+1))
	refused("a wrong root", l.sign(torchwood.Checkpoint{Origin: tree, Tree: tlog.Tree{N: 300}}), endless(100))
	refused("too few", l.at(5).grow(3, "").head(), l.at(5).grow(2, "").since(5))
	refused("a broken stream", l.at(5).grow(3, "").head(), func(yield func([]byte, error) bool) { yield(nil, io.ErrClosedPipe) })
	for name, h := range map[string]*halliganv1.WitnessHead{
		"no lineage": {Generation: 1, Checkpoint: l.head().Checkpoint}, "a path": {Lineage: "../../..", Generation: 1, Checkpoint: l.head().Checkpoint},
		"generation 0": {Lineage: l.lineage, Checkpoint: l.head().Checkpoint}, "a huge generation": {Lineage: l.lineage, Generation: 1 << 40, Checkpoint: l.head().Checkpoint},
		"no checkpoint": {Lineage: l.lineage, Generation: 1}, "a huge checkpoint": {Lineage: l.lineage, Generation: 1, Checkpoint: bytes.Repeat(l.head().Checkpoint, 100)},
		"the wrong generation": {Lineage: l.lineage, Generation: 2, Checkpoint: l.head().Checkpoint},
	} {
		refused(name, h, endless(1))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Head(ctx, l.at(5).grow(3, "").head(), l.at(5).grow(3, "").since(5)); !errors.Is(err, context.Canceled) {
		t.Errorf("the stream ended: %v", err)
	}
	must(t, c, l.at(5).grow(300, "as it should be"))
}

// TestUnsigned: what never counts takes no room beyond the quota either.
func TestUnsigned(t *testing.T) {
	f := newFleet(t)
	const quota = 1 << 20
	c := f.copy(quota)
	l := newLog(t, origin, "00ff00ff", newKey(t), 5)
	if err := c.Identify(f.statement(origin, l.key)); err != nil {
		t.Fatal(err)
	}
	must(t, c, l)
	for i := range 5 {
		for _, wrong := range []*log{l.at(5), l.next(), l.next().next()} {
			wrong.number += 2 * uint64(i) * (wrong.number - 1)
			head := wrong.sign(torchwood.Checkpoint{Origin: logkey.Tree(origin, l.lineage, wrong.number), Tree: tlog.Tree{N: 512}})
			entries := wrong.grow(512, strings.Repeat("x", 1<<10)).since(map[bool]int{true: 5}[wrong.number == 1])
			if signed, err := c.Head(t.Context(), head, entries); err == nil || signed != nil {
				t.Fatal("a wrong root is taken")
			}
		}
		if took := size(f.dir); took > quota {
			t.Fatalf("%d bytes on disk", took)
		}
	}
	must(t, c, l.at(5).grow(300, "as it should be"))
	if took := size(filepath.Join(f.dir, origin)); took > c.bytes || c.bytes > quota {
		t.Errorf("%d bytes on disk, and %d counted", took, c.bytes)
	}
}

// TestQuota: what is young stays, whatever comes; what is old makes room.
func TestQuota(t *testing.T) {
	f := newFleet(t)
	key := newKey(t)
	c := f.copy(600 << 10)
	if err := c.Identify(f.statement(origin, key)); err != nil {
		t.Fatal(err)
	}
	l := newLog(t, origin, "00ff00ff", key, 0)
	for {
		l.grow(1, strings.Repeat("x", 40<<10))
		if _, err := take(c, l); err != nil {
			if !strings.Contains(err.Error(), "no more of it is stored") {
				t.Fatal(err)
			}
			break
		}
		if len(l.entries)%3 == 0 {
			l = l.next()
		}
		if len(c.Have()) > 20 {
			t.Fatal("there is no end to it")
		}
	}
	if all := f.raised(); len(all) != 1 || !strings.Contains(all[0], "no more of it is stored") {
		t.Errorf("alarms: %q", all)
	}
	before := len(c.Have())
	f.now = f.now.Add(Retention + time.Hour)
	must(t, c, l)
	if have := c.Have(); len(have) >= before || have[0].GetGeneration() == 1 {
		t.Errorf("%d generations of %d, from %d on", len(have), before, have[0].GetGeneration())
	}
}

// TestDamaged: a copy that rotted is told of, and nothing is built on it.
func TestDamaged(t *testing.T) {
	f := newFleet(t)
	key := newKey(t)
	c := f.copy(0)
	if err := c.Identify(f.statement(origin, key)); err != nil {
		t.Fatal(err)
	}
	l := newLog(t, origin, "00ff00ff", key, 5)
	must(t, c, l)
	file := filepath.Join(f.dir, origin, "logs", "00ff00ff.00000001", "checkpoint")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-10] ^= 1
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	c = f.copy(0)
	if _, err := take(c, l.grow(1, "")); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Error(err)
	}
	if s := c.Status(); !strings.Contains(s.Problem, "move its folder away") {
		t.Errorf("%+v", s)
	}
	if all := f.raised(); len(all) != 1 {
		t.Error(all)
	}
}

// noteKey is a key as x/mod's notes take it.
func noteKey(name string, key ed25519.PrivateKey) (string, error) {
	vkey, err := logkey.VKey(name, key.Public().(ed25519.PublicKey))
	if err != nil {
		return "", err
	}
	return "PRIVATE+KEY+" + name + "+" + strings.Split(vkey, "+")[1] + "+" + base64Key(key), nil
}

func base64Key(key ed25519.PrivateKey) string {
	return base64.StdEncoding.EncodeToString(append([]byte{1}, key.Seed()...))
}
