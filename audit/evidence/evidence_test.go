package evidence_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// began is the time of the first event.
var began = time.Date(2026, 1, 31, 9, 0, 0, 0, time.UTC)

// world is a fleet whose daemons keep logs in one folder.
type world struct {
	*testing.T
	fleet  *testfleet.Fleet
	bundle *bundle.Bundle
	dir    string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, fleet: testfleet.New(t), dir: filepath.Join(t.TempDir(), "evidence")}
	file, err := bundle.Parse(w.fleet.Bundle())
	if err != nil {
		t.Fatal(err)
	}
	if w.bundle, err = bundle.Verify(file, nil); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) trust() evidence.Trust { return evidence.Trust{Bundle: w.bundle, Now: time.Now()} }

// daemon keeps a log of its own, with tiles and a key alone.
type daemon struct {
	w                *world
	origin, lineage  string
	log, witness     ed25519.PrivateKey
	dir              string
	generation, next uint64 // seq of the next event
	first            uint64 // of the generation
	entries          [][]byte
	checkpoint       []byte
}

func (w *world) daemon(origin string) *daemon {
	w.Helper()
	d := &daemon{w: w, origin: origin, lineage: "a1b2c3d4", dir: filepath.Join(w.dir, origin), generation: 1}
	_, d.log, _ = ed25519.GenerateKey(nil)
	_, d.witness, _ = ed25519.GenerateKey(nil)
	w.must(os.MkdirAll(filepath.Join(d.dir, "logs"), 0o700))
	w.write(filepath.Join(d.dir, "identity"), d.identity())
	return d
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) write(name string, data []byte) {
	w.Helper()
	w.must(os.MkdirAll(filepath.Dir(name), 0o700))
	w.must(os.WriteFile(name, data, 0o600))
}

func (w *world) read(name string) []byte {
	w.Helper()
	data, err := os.ReadFile(name)
	w.must(err)
	return data
}

func (d *daemon) identity() []byte {
	return d.w.fleet.Statement(logkey.Statement{Server: d.origin, Log: d.log.Public().(ed25519.PublicKey), Witness: d.witness.Public().(ed25519.PublicKey), Signed: time.Now()})
}

func (d *daemon) tree() string { return logkey.Tree(d.origin, d.lineage, d.generation) }

func (d *daemon) logDir() string {
	return filepath.Join(d.dir, "logs", fmt.Sprintf("%s.%08d", d.lineage, d.generation))
}

// noteSigner signs as note.NewSigner does, from a key that is at hand.
type noteSigner struct {
	name string
	hash uint32
	key  ed25519.PrivateKey
}

func (s noteSigner) Name() string                     { return s.name }
func (s noteSigner) KeyHash() uint32                  { return s.hash }
func (s noteSigner) Sign(text []byte) ([]byte, error) { return ed25519.Sign(s.key, text), nil }

func (d *daemon) sign(text string) []byte {
	d.w.Helper()
	v, err := logkey.Verifier(d.tree(), d.log.Public().(ed25519.PublicKey))
	d.w.must(err)
	signed, err := note.Sign(&note.Note{Text: text}, noteSigner{d.tree(), v.KeyHash(), d.log})
	d.w.must(err)
	return signed
}

// log records events as they are, but for their numbers and times.
func (d *daemon) record(events ...audit.Event) {
	d.w.Helper()
	for _, e := range events {
		e.Version, e.Seq, e.Origin = audit.Version, d.next, d.origin
		if e.Time.IsZero() {
			e.Time = began.Add(time.Duration(d.next) * time.Second)
		}
		if e.ID == "" {
			e.ID = fmt.Sprintf("%s-%d", d.origin, d.next)
		}
		data, err := json.Marshal(e)
		d.w.must(err)
		d.entries = append(d.entries, data)
		d.next++
	}
	d.publish(d.entries)
}

// publish appends what is not in the tree yet, and signs.
func (d *daemon) publish(entries [][]byte) {
	d.w.Helper()
	d.w.must(os.MkdirAll(d.logDir(), 0o700))
	tree, err := tiles.Open(d.logDir())
	d.w.must(err)
	from := int64(0)
	if _, c, err := tree.Checkpoint(); err == nil {
		from = c.N
	}
	d.checkpoint = d.sign(torchwood.Checkpoint{Origin: d.tree(), Tree: treeOf(d.w, entries)}.String())
	d.w.must(tree.Append(context.Background(), d.checkpoint, slices.Values(entries[from:])))
}

func treeOf(w *world, entries [][]byte) tlog.Tree {
	w.Helper()
	var hashes []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) (got []tlog.Hash, _ error) {
		for _, i := range indexes {
			got = append(got, hashes[i])
		}
		return got, nil
	})
	for n, entry := range entries {
		h, err := tlog.StoredHashes(int64(n), entry, read)
		w.must(err)
		hashes = append(hashes, h...)
	}
	root, err := tlog.TreeHash(int64(len(entries)), read)
	w.must(err)
	return tlog.Tree{N: int64(len(entries)), Hash: root}
}

// rotate begins another generation.
func (d *daemon) rotate() {
	d.w.Helper()
	previous := string(d.checkpoint)
	d.generation, d.first, d.entries = d.generation+1, d.next, nil
	d.record(audit.Event{Kind: audit.Seam, Previous: previous})
}

// cosigned countersigns what the log has now.
func (d *daemon) cosigned(by ...*daemon) {
	d.w.Helper()
	signed := d.checkpoint
	for _, b := range by {
		signer, err := torchwood.NewCosignatureSigner(logkey.WitnessName(b.origin), b.witness)
		d.w.must(err)
		v, err := logkey.Verifier(d.tree(), d.log.Public().(ed25519.PublicKey))
		d.w.must(err)
		n, err := note.Open(signed, note.VerifierList(v))
		d.w.must(err)
		signed, err = note.Sign(n, signer)
		d.w.must(err)
	}
	d.w.write(filepath.Join(d.logDir(), "cosigned"), signed)
}

// plain are events of no meaning.
func plain(n int) (events []audit.Event) {
	for range n {
		events = append(events, audit.Event{Kind: audit.Read, Action: "get", Actor: &audit.Actor{Person: "alice", Role: "responder"}})
	}
	return events
}

func (w *world) verify(trust evidence.Trust) (*evidence.Evidence, *evidence.Report) {
	w.Helper()
	e, err := evidence.Open(w.dir)
	w.must(err)
	w.Cleanup(e.Close)
	r, err := e.Verify(w.Context(), trust)
	w.must(err)
	return e, r
}

// bad demands a problem in the file, of the event, with the words.
func (w *world) bad(file string, seq int, words string) {
	w.Helper()
	_, r := w.verify(w.trust())
	for _, l := range r.Logs {
		for _, p := range l.Problems {
			if strings.Contains(p.File, file) && strings.Contains(p.Text, words) && (seq < 0 || p.Seq != nil && *p.Seq == uint64(seq)) {
				return
			}
		}
	}
	data, _ := json.MarshalIndent(r, "", " ")
	w.Errorf("no problem of %s, event %d, %q: %s", file, seq, words, data)
}

func TestVerifySaysWhatHolds(t *testing.T) {
	w := newWorld(t)
	node, a, b := w.daemon("cp-1.prod"), w.daemon("a.bastion"), w.daemon("b.bastion")
	a.record(plain(2)...)
	b.record(plain(1)...)
	node.record(plain(300)...)
	node.cosigned(a)
	node.rotate()
	node.record(plain(10)...)
	node.cosigned(a, b)
	node.record(plain(5)...)
	_, r := w.verify(w.trust())
	if !r.OK() || len(r.Logs) != 3 {
		data, _ := json.MarshalIndent(r, "", " ")
		t.Fatalf("%s", data)
	}
	l := r.Logs[slices.IndexFunc(r.Logs, func(l *evidence.Log) bool { return l.Origin == "cp-1.prod" })]
	if l.Events != 316 || len(l.Generations) != 2 || l.Generations[1].FirstSeq != 300 || l.Unwitnessed != 5 || l.VouchedBy != "host certificate" ||
		!l.Begin.Equal(began) || !l.End.Equal(began.Add(315*time.Second)) {
		t.Errorf("%+v", l)
	}
	for _, by := range l.Witnessed {
		if !by.Known || by.Events != 311 || by.At.IsZero() {
			t.Errorf("%+v", by)
		}
	}
	if len(l.Witnessed) != 2 {
		t.Errorf("witnessed by %v", l.Witnessed)
	}
	// The keys by name, without the bundle: nothing vouches for what is not named.
	witness, err := logkey.WitnessVKey(a.origin, a.witness.Public().(ed25519.PublicKey))
	w.must(err)
	_, r = w.verify(evidence.Trust{Keys: []string{l.Generations[0].VKey, witness}, Now: time.Now()})
	for _, l := range r.Logs {
		if ok := len(l.Problems) == 0; ok != (l.Origin == "cp-1.prod") {
			t.Errorf("%s by its key: %v", l.Origin, l.Problems)
		}
		if l.Origin == "cp-1.prod" && (l.VouchedBy != "key" || !slices.ContainsFunc(l.Witnessed, func(w evidence.Witnessed) bool { return w.By == "b.bastion" && !w.Known })) {
			t.Errorf("%+v", l)
		}
	}
	// One folder alone, with the statement of a witness.
	e, err := evidence.Open(node.dir)
	w.must(err)
	alone := w.trust()
	for unwitnessed, identities := range map[uint64][][]byte{316: nil, 5: {a.identity()}} {
		alone.Identities = identities
		if r, err := e.Verify(t.Context(), alone); err != nil || !r.OK() || r.Logs[0].Unwitnessed != unwitnessed {
			t.Errorf("%+v, %v", r, err)
		}
	}
	alone.Identities = [][]byte{[]byte("nothing")}
	if _, err := e.Verify(t.Context(), alone); !fault.Is(err, fault.Unauthenticated) {
		t.Error(err)
	}
	e, err = evidence.Open(w.dir)
	w.must(err)
	if _, err := e.Verify(t.Context(), evidence.Trust{Now: time.Now()}); !fault.Is(err, fault.Usage) {
		t.Errorf("without anybody to believe: %v", err)
	}
}

// TestEveryByte flips each byte of a small log's files, one at a time.
func TestEveryByte(t *testing.T) {
	w := newWorld(t)
	node, a := w.daemon("cp-1.prod"), w.daemon("a.bastion")
	a.record(plain(1)...)
	node.record(plain(3)...)
	node.cosigned(a)
	before, _ := json.Marshal(must(w.verify(w.trust())))
	n := 0
	w.must(filepath.WalkDir(node.dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data := w.read(name)
		for i := range data {
			n++
			flipped := slices.Clone(data)
			flipped[i] ^= 1
			w.write(name, flipped)
			_, r := w.verify(w.trust())
			after, _ := json.Marshal(r)
			switch base := filepath.Base(name); {
			// A witness that is another is not believed, and what it signed counts as not
			// seen.
			case base == "cosigned" && r.OK() && !bytes.Equal(before, after):
			// White space behind the last line, and bits of base64 that count for nothing:
			// it says what it said.
			case base == "identity" && (i == len(data)-1 || data[i+1] == '=' || data[i+1] == '\n' || data[i+1] == ' ') && bytes.Equal(before, after):
			case r.OK():
				t.Errorf("%s, byte %d of %d: nothing is wrong", name, i, len(data))
			}
		}
		w.write(name, data)
		return nil
	}))
	if _, r := w.verify(w.trust()); !r.OK() || n < 1500 {
		t.Errorf("after %d bytes: %+v", n, r.Logs)
	}
}

func must(_ *evidence.Evidence, r *evidence.Report) *evidence.Report { return r }

func TestFirstBadEntry(t *testing.T) {
	w := newWorld(t)
	node := w.daemon("cp-1.prod")
	node.record(plain(300)...)
	node.rotate()
	node.record(plain(300)...)
	bundle := filepath.Join(node.logDir(), "tile", "entries", "001.p", "45")
	data := w.read(bundle)
	at := bytes.Index(data, []byte(`"seq":580`))
	if at < 0 {
		t.Fatal("event 580 is not there")
	}
	flipped := slices.Clone(data)
	flipped[at+7] ^= 1
	w.write(bundle, flipped)
	w.bad("cp-1.prod/logs/a1b2c3d4.00000002/tile/entries/001.p/45", 580, "tree hash")
	e, r := w.verify(w.trust())
	events := 0
	for entry, err := range e.Events(t.Context(), evidence.Filter{}) {
		if err != nil {
			t.Fatal(err)
		}
		if entry.Seq >= 580 {
			t.Fatalf("event %d does not hold", entry.Seq)
		}
		events++
	}
	if events != 580 || r.Logs[0].Events != 580 {
		t.Errorf("%d events, %d in the report", events, r.Logs[0].Events)
	}
	w.write(bundle, data[:len(data)-5])
	w.bad("001.p/45", 600, "cut off")
	w.must(os.Remove(bundle))
	w.bad("001.p/45", 556, "cannot be read")
}

func TestRolledBack(t *testing.T) {
	w := newWorld(t)
	node, a := w.daemon("cp-1.prod"), w.daemon("a.bastion")
	a.record(plain(1)...)
	node.record(plain(20)...)
	old := filepath.Join(t.TempDir(), "old")
	w.must(os.CopyFS(old, os.DirFS(node.dir)))
	node.record(plain(20)...)
	node.cosigned(a)
	if _, r := w.verify(w.trust()); !r.OK() {
		t.Fatal(r.Logs)
	}
	// All but the countersigned checkpoint is from before.
	newer := filepath.Join(t.TempDir(), "newer")
	w.must(os.Rename(node.dir, newer))
	w.must(os.CopyFS(node.dir, os.DirFS(old)))
	w.write(filepath.Join(node.logDir(), "cosigned"), w.read(filepath.Join(newer, "logs", filepath.Base(node.logDir()), "cosigned")))
	w.bad("cp-1.prod/logs", 20, "rolled back")
	// All of it is from before, and a bastion has the rest.
	w.must(os.Remove(filepath.Join(node.logDir(), "cosigned")))
	if _, r := w.verify(w.trust()); !r.OK() {
		t.Fatal("an older state holds by itself")
	}
	w.must(os.CopyFS(filepath.Join(w.dir, evidence.Apart(node.origin, a.origin)), os.DirFS(newer)))
	w.bad("cp-1.prod/logs", 20, "rolled back")
}

func TestForkedAndSwapped(t *testing.T) {
	w := newWorld(t)
	node, other := w.daemon("cp-1.prod"), w.daemon("cp-2.prod")
	other.record(plain(5)...)
	node.record(plain(20)...)
	apart := filepath.Join(w.dir, evidence.Apart(node.origin, "a.bastion"))
	w.must(os.CopyFS(apart, os.DirFS(node.dir)))
	node.record(plain(1)...)
	if _, r := w.verify(w.trust()); !r.OK() {
		t.Errorf("a copy that lags: %+v", r.Logs)
	}
	// The same key signs another history.
	w.must(os.RemoveAll(apart))
	forked := *node
	forked.dir, forked.next, forked.entries = apart, 0, nil
	w.must(os.MkdirAll(filepath.Join(apart, "logs"), 0o700))
	w.write(filepath.Join(apart, "identity"), node.identity())
	forked.record(append(plain(19), audit.Event{Kind: audit.Alarm})...)
	w.bad("cp-1.prod/logs", 0, "forked")
	w.bad("cp-1.prod~a.bastion/logs", 0, "forked")
	w.must(os.RemoveAll(apart))

	// A whole folder under another name, then only the logs of another.
	w.must(os.Rename(node.dir, filepath.Join(w.dir, "x")))
	w.must(os.Rename(other.dir, node.dir))
	w.must(os.Rename(filepath.Join(w.dir, "x"), other.dir))
	w.bad("cp-1.prod/logs", -1, "it is of cp-2.prod")
	w.bad("cp-2.prod/logs", -1, "it is of cp-1.prod")
	id1, id2 := w.read(filepath.Join(other.dir, "identity")), w.read(filepath.Join(node.dir, "identity"))
	w.write(filepath.Join(node.dir, "identity"), id1)
	w.write(filepath.Join(other.dir, "identity"), id2)
	w.bad("cp-1.prod/logs", -1, "it is of cp-2.prod")
	// By itself, without a name that says anything.
	e, err := evidence.Open(node.dir)
	w.must(err)
	r, err := e.Verify(t.Context(), w.trust())
	w.must(err)
	if r.OK() || !strings.Contains(r.Logs[0].Problems[0].Text, "the key that is vouched for is of cp-1.prod") {
		t.Errorf("%+v", r.Logs[0])
	}
}

func TestSeams(t *testing.T) {
	w := newWorld(t)
	node := w.daemon("cp-1.prod")
	node.record(plain(5)...)
	first, one := node.logDir(), node.checkpoint
	node.rotate()
	node.record(plain(5)...)
	second := node.logDir()
	node.rotate()
	node.record(plain(5)...)
	if _, r := w.verify(w.trust()); !r.OK() || r.Logs[0].Events != 17 {
		t.Fatalf("%+v", r.Logs[0])
	}
	away := filepath.Join(t.TempDir(), "away")
	w.must(os.Rename(second, away))
	w.bad("a1b2c3d4.00000003", -1, "generation 2 is missing")
	w.must(os.Rename(first, first+"x"))
	if _, r := w.verify(w.trust()); !r.OK() || r.Logs[0].FirstSeq != 11 || r.Logs[0].Events != 6 {
		t.Errorf("pruned: %+v", r.Logs[0])
	}
	w.must(os.Rename(first+"x", first))
	w.must(os.Rename(away, second))
	// The first goes on after its end.
	older := *node
	older.generation, older.next, older.entries = 1, 5, nil
	tree, err := tiles.Open(first)
	w.must(err)
	for entry, err := range tree.Entries(t.Context(), 0, 5) {
		w.must(err)
		older.entries = append(older.entries, entry)
	}
	older.record(plain(1)...)
	w.bad("a1b2c3d4.00000002", 5, "generation 1 ended with 5 entries, and here it has 6")
	// A seam by another key.
	w.must(os.RemoveAll(w.dir))
	node = w.daemon("cp-1.prod")
	node.record(plain(5)...)
	node.checkpoint = one
	node.rotate()
	w.bad("a1b2c3d4.00000002", 5, "does not hold")
}

func TestEventsThatAreNone(t *testing.T) {
	for name, tt := range map[string]struct {
		entry string
		words string
	}{
		"unknown field":  {`{"v":1,"id":"x","seq":1,"time":"2026-01-31T09:00:00Z","uptimeNs":0,"origin":"cp-1.prod","kind":"read","more":1}`, "unknown field"},
		"later version":  {`{"v":2,"id":"x","seq":1,"time":"2026-01-31T09:00:00Z","uptimeNs":0,"origin":"cp-1.prod","kind":"read"}`, "version 2"},
		"another number": {`{"v":1,"id":"x","seq":7,"time":"2026-01-31T09:00:00Z","uptimeNs":0,"origin":"cp-1.prod","kind":"read"}`, "event 7"},
		"another origin": {`{"v":1,"id":"x","seq":1,"time":"2026-01-31T09:00:00Z","uptimeNs":0,"origin":"cp-2.prod","kind":"read"}`, `"cp-2.prod"`},
		"two values":     {`{"v":1,"seq":1,"origin":"cp-1.prod"}{}`, "something follows"},
		"no JSON":        {"\x1b[2J", "not an event"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			node := w.daemon("cp-1.prod")
			node.record(plain(1)...)
			node.entries = append(node.entries, []byte(tt.entry))
			node.publish(node.entries)
			w.bad("tile/entries/000.p/2", 1, tt.words)
		})
	}
}

func TestRecordings(t *testing.T) {
	w := newWorld(t)
	node := w.daemon("cp-1.prod")
	cast := []byte("{\"version\":2}\n[0.1,\"o\",\"hello\"]\n[0.2,\"o\",\"world\"]\n")
	piece := func(session string, from, to int, last bool) audit.Event {
		sum := sha256.Sum256(cast[from:to])
		return audit.Event{Kind: audit.Recording, Session: session, Chunk: &audit.Chunk{Session: session, Offset: int64(from), Length: int64(to - from), SHA256: hex.EncodeToString(sum[:]), Last: last}}
	}
	node.record(piece("s-1", 0, 20, false), piece("s-2", 0, 20, true), piece("s-1", 20, len(cast), true))
	file := filepath.Join(node.dir, "recordings", "s-1.cast")
	w.write(file, cast)
	e, r := w.verify(w.trust())
	if l := r.Logs[0]; !r.OK() || l.Recordings != 1 || l.Absent != 1 {
		t.Fatalf("%+v", l)
	}
	data, log, err := e.Recording(t.Context(), "s-1")
	w.must(err)
	if got, _ := io.ReadAll(data); !bytes.Equal(got, cast) || log.Origin != "cp-1.prod" {
		t.Errorf("%q of %s", got, log.Origin)
	}
	_ = data.Close()
	for session, code := range map[string]fault.Code{"s-2": fault.NotFound, "s-3": fault.NotFound, "../s": fault.Usage} {
		if _, _, err := e.Recording(t.Context(), session); !fault.Is(err, code) {
			t.Errorf("%s: %v", session, err)
		}
	}
	w.write(file, append(slices.Clone(cast), "more"...))
	w.bad("recordings/s-1.cast", 2, "4 bytes follow")
	changed := bytes.Replace(cast, []byte("world"), []byte("w0rld"), 1)
	w.write(file, changed)
	w.bad("recordings/s-1.cast", 2, "not what was recorded")
	e, _ = w.verify(w.trust())
	if _, _, err := e.Recording(t.Context(), "s-1"); err == nil {
		t.Error("a changed recording was given out")
	}
	w.write(file, cast[:30])
	w.bad("recordings/s-1.cast", 2, "not what was recorded")
}

func TestFilters(t *testing.T) {
	w := newWorld(t)
	one, two := w.daemon("cp-1.prod"), w.daemon("cp-2.prod")
	alice, bob := &audit.Actor{Person: "alice"}, &audit.Actor{Person: "bob"}
	object := []audit.Object{{Key: "/registry/deployments/shop/web"}}
	one.record(
		audit.Event{Kind: audit.Start},
		audit.Event{Kind: audit.Login, Actor: alice, Session: "s1", Time: began.Add(10 * time.Second)},
		audit.Event{Kind: audit.Intent, ID: "i1", Actor: alice, Session: "s1", Incident: "INC-1", Action: "scale", Objects: object, ApprovedBy: []audit.Approval{{Person: "carol"}}, Time: began.Add(20 * time.Second)},
		audit.Event{Kind: audit.Outcome, Of: "i1", Actor: alice, Session: "s1", Action: "scale", Outcome: "applied", Time: began.Add(30 * time.Second)})
	two.record(
		audit.Event{Kind: audit.Start, Time: began.Add(5 * time.Second)},
		audit.Event{Kind: audit.Intent, ID: "i2", Actor: bob, Session: "s2", Incident: "INC-2", Action: "delete", Time: began.Add(25 * time.Second)},
		audit.Event{Kind: audit.Outcome, Of: "i2", Actor: bob, Session: "s2", Action: "delete", Outcome: "failed", Time: began.Add(40 * time.Second)})
	e, r := w.verify(w.trust())
	if !r.OK() {
		t.Fatal(r.Logs)
	}
	for name, tt := range map[string]struct {
		f    evidence.Filter
		want string
	}{
		"all":      {evidence.Filter{}, "1:0 2:0 1:1 1:2 2:1 1:3 2:2"},
		"incident": {evidence.Filter{Incident: "inc-1"}, "1:2 1:3"},
		"person":   {evidence.Filter{Person: "alice"}, "1:1 1:2 1:3"},
		"approver": {evidence.Filter{Person: "carol"}, "1:2 1:3"},
		"object":   {evidence.Filter{Object: "shop/web"}, "1:2 1:3"},
		"action":   {evidence.Filter{Action: "delete"}, "2:1 2:2"},
		"session":  {evidence.Filter{Session: "s2"}, "2:1 2:2"},
		"kind":     {evidence.Filter{Incident: "INC-2", Kinds: []audit.Kind{audit.Outcome}}, "2:2"},
		"origin":   {evidence.Filter{Origin: "cp-2"}, "2:0 2:1 2:2"},
		"when":     {evidence.Filter{Since: began.Add(20 * time.Second), Until: began.Add(30 * time.Second)}, "1:2 2:1"},
		"nothing":  {evidence.Filter{Person: "mallory"}, ""},
	} {
		var got []string
		for entry, err := range e.Events(t.Context(), tt.f) {
			w.must(err)
			got = append(got, fmt.Sprintf("%c:%d", entry.Origin[3], entry.Seq))
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s: %v, want %s", name, got, tt.want)
		}
	}
	for _, l := range e.Logs() {
		var got []uint64
		for entry, err := range e.Of(t.Context(), l, 2) {
			w.must(err)
			got = append(got, entry.Seq)
		}
		if len(got) == 0 || got[0] != 2 {
			t.Errorf("%s from 2: %v", l.Origin, got)
		}
	}
}

// TestKeptElsewhere: what bastions keep for a node is found as the node's, and told
// of until the node has taken it back.
func TestKeptElsewhere(t *testing.T) {
	w := newWorld(t)
	node, a, b := w.daemon("cp-1.prod"), w.daemon("a.bastion"), w.daemon("b.bastion")
	node.record(plain(2)...)
	var payloads []string
	for i := range 2 {
		data, err := json.Marshal(audit.Event{Version: audit.Version, ID: fmt.Sprint("held-", i), Time: began, Origin: "cp-1.prod", Kind: audit.Intent, Actor: &audit.Actor{Person: "dora"}})
		w.must(err)
		payloads = append(payloads, string(data))
	}
	for _, by := range []*daemon{a, b} {
		by.record(audit.Event{Kind: audit.Held, Target: "cp-1.prod", Of: "held-0", Payload: payloads[0]}, audit.Event{Kind: audit.Held, Target: "cp-1.prod", Of: "held-1", Payload: payloads[1]},
			audit.Event{Kind: audit.Held, Target: "cp-1.prod", Payload: "nothing"})
	}
	notes := func() (all string) {
		_, r := w.verify(w.trust())
		for _, l := range r.Logs {
			if len(l.Problems) > 0 {
				t.Errorf("%s: %v", l.Origin, l.Problems)
			}
			all += strings.Join(l.Notes, "\n") + "\n"
		}
		return all
	}
	if text := notes(); !strings.Contains(text, "a.bastion keeps 2 events of cp-1.prod") || !strings.Contains(text, "b.bastion keeps 2 events") {
		t.Error(text)
	}
	receipt := func(by *daemon, i int) string {
		signed, err := logkey.SignReceipt(by.origin, by.witness, fmt.Sprint("held-", i), []byte(payloads[i]))
		w.must(err)
		return string(signed)
	}
	node.record(audit.Event{Kind: audit.Adopted, Payload: payloads[0], Receipts: []string{receipt(a, 0), receipt(b, 0)}},
		audit.Event{Kind: audit.Adopted, Payload: payloads[1], Receipts: []string{receipt(a, 1), receipt(a, 0)}})
	if text := notes(); strings.Contains(text, "keeps") || strings.Contains(text, "event 2 was") || !strings.Contains(text, "event 3 was kept elsewhere before it got here: the receipts of 1 of two bastions") {
		t.Error(text)
	}
	e, _ := w.verify(w.trust())
	found := 0
	for entry, err := range e.Events(t.Context(), evidence.Filter{Person: "dora", Origin: "cp-1"}) {
		w.must(err)
		if entry.Payload == "" {
			t.Errorf("%s of %s", entry.ID, entry.Origin)
		}
		found++
	}
	if found != 6 {
		t.Errorf("%d events of dora, want 2 in each of 3 logs", found)
	}
}

func TestProof(t *testing.T) {
	w := newWorld(t)
	node, a := w.daemon("cp-1.prod"), w.daemon("a.bastion")
	a.record(plain(1)...)
	node.record(plain(300)...)
	node.rotate()
	node.record(plain(299)...)
	node.cosigned(a)
	node.record(plain(10)...)
	e, r := w.verify(w.trust())
	if !r.OK() {
		t.Fatal(r.Logs)
	}
	identities := [][]byte{node.identity(), a.identity()}
	for seq, witnessed := range map[int]int{0: 0, 299: 0, 300: 1, 580: 1, 599: 1, 605: 0} {
		entry, err := e.Find(t.Context(), fmt.Sprintf("cp-1.prod-%d", seq))
		w.must(err)
		proof, err := e.Prove(entry)
		w.must(err)
		p, err := evidence.VerifyProof(w.trust(), identities, proof, entry.Raw)
		w.must(err)
		if p.Event.Seq != uint64(seq) || len(p.Witnessed) != witnessed {
			t.Errorf("event %d: %+v", seq, p)
		}
		// By torchwood alone.
		v, err := note.NewVerifier(must(w.verify(w.trust())).Logs[1].Generations[entry.Generation-1].VKey)
		w.must(err)
		outside := torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(v.Name()), torchwood.SingleVerifierPolicy(v))
		if err := torchwood.VerifyProof(outside, tlog.RecordHash(entry.Raw), proof); err != nil {
			t.Errorf("torchwood, event %d: %v", seq, err)
		}
		for i := 0; i < len(proof); i += 7 {
			flipped := slices.Clone(proof)
			flipped[i] ^= 1
			if p, err := evidence.VerifyProof(w.trust(), identities, flipped, entry.Raw); err == nil && len(p.Witnessed) == witnessed {
				t.Fatalf("event %d, byte %d of its proof (%q): it holds", seq, i, proof[max(i-20, 0):i+1])
			}
		}
		other := bytes.Replace(entry.Raw, []byte("alice"), []byte("alicf"), 1)
		if seq == 300 {
			other = append(slices.Clone(entry.Raw), ' ')
		}
		if _, err := evidence.VerifyProof(w.trust(), identities, proof, other); !fault.Is(err, fault.Failed) {
			t.Errorf("another event: %v", err)
		}
		if _, err := evidence.VerifyProof(w.trust(), identities[1:], proof, entry.Raw); !fault.Is(err, fault.Usage) {
			t.Errorf("nobody vouches: %v", err)
		}
	}
	if _, err := e.Find(t.Context(), "nothing"); !fault.Is(err, fault.NotFound) {
		t.Error(err)
	}
}

func TestArchives(t *testing.T) {
	w := newWorld(t)
	node := w.daemon("cp-1.prod")
	node.record(plain(10)...)
	pack := func(prefix string, more ...tar.Header) string {
		var b bytes.Buffer
		out := tar.NewWriter(&b)
		w.must(filepath.WalkDir(w.dir, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			rel, _ := filepath.Rel(w.dir, name)
			data := w.read(name)
			w.must(out.WriteHeader(&tar.Header{Name: prefix + rel, Mode: 0o600, Size: int64(len(data)), Typeflag: tar.TypeReg}))
			_, err = out.Write(data)
			return err
		}))
		for _, h := range more {
			w.must(out.WriteHeader(&h))
			_, err := out.Write(append([]byte("0\n"), make([]byte, 512)...)[:h.Size])
			w.must(err)
		}
		w.must(out.Close())
		file := filepath.Join(t.TempDir(), "evidence.tar")
		w.write(file, b.Bytes())
		return file
	}
	for _, prefix := range []string{"", "./", "evidence/"} {
		e, err := evidence.Open(pack(prefix))
		w.must(err)
		r, err := e.Verify(t.Context(), w.trust())
		e.Close()
		if err != nil || !r.OK() || r.Logs[0].Events != 10 {
			t.Errorf("%q: %v %+v", prefix, err, r)
		}
	}
	if _, err := evidence.Open(pack("", tar.Header{Name: "../../out", Typeflag: tar.TypeReg})); !fault.Is(err, fault.Usage) {
		t.Errorf("a way out: %v", err)
	}
	e, err := evidence.Open(pack("", tar.Header{Name: "cp-1.prod/recordings/x.cast", Linkname: "/etc/passwd", Typeflag: tar.TypeSymlink}))
	w.must(err) // links are not unpacked
	e.Close()
	// GNU tar's sparse format 1.0, which the library does not write: no data, of 1 GiB.
	sparse := pack("", tar.Header{Name: "cp-1.prod/x", Typeflag: tar.TypeReg, Size: 512, PAXRecords: map[string]string{"GNU_sparse.major": "1", "GNU_sparse.minor": "0", "GNU_sparse.name": "x", "GNU_sparse.realsize": "1073741824"}})
	w.write(sparse, bytes.ReplaceAll(w.read(sparse), []byte("GNU_sparse."), []byte("GNU.sparse.")))
	if _, err := evidence.Open(sparse); !fault.Is(err, fault.Usage) || !strings.Contains(err.Error(), "sparse") {
		t.Errorf("a sparse file: %v", err)
	}
	w.write(filepath.Join(w.dir, "file"), []byte("nothing"))
	for _, name := range []string{filepath.Join(w.dir, "file"), t.TempDir(), filepath.Join(w.dir, "absent")} {
		if _, err := evidence.Open(name); !fault.Is(err, fault.Usage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// stream gives out a daemon's folder as its service does.
func (d *daemon) stream(have map[string]uint64, more ...evidence.Part) func() (evidence.Part, error) {
	d.w.Helper()
	parts := slices.Clone(more)
	d.w.must(filepath.WalkDir(d.dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(d.dir, name)
		data := d.w.read(name)
		half := len(data) / 2
		parts = append(parts, evidence.Part{Path: filepath.ToSlash(rel), Data: data[:half]}, evidence.Part{Path: filepath.ToSlash(rel), Offset: int64(half), Data: data[half:]})
		return nil
	}))
	return func() (evidence.Part, error) {
		if len(parts) == 0 {
			return evidence.Part{}, io.EOF
		}
		p := parts[0]
		parts = parts[1:]
		return p, nil
	}
}

func TestStoreOnlyGrows(t *testing.T) {
	w := newWorld(t)
	node, a := w.daemon("cp-1.prod"), w.daemon("a.bastion")
	a.record(plain(1)...)
	s, err := evidence.OpenStore(t.Context(), filepath.Join(t.TempDir(), "kept"))
	w.must(err)
	defer s.Close()
	seen := map[string]uint64{}
	take := func(d *daemon, want uint64) error {
		t.Helper()
		added, err := s.Take(t.Context(), d.origin, w.trust(), d.stream(s.Have(d.origin), evidence.Part{Path: "../out", Data: []byte("x")}, evidence.Part{Path: "key", Data: []byte("x")}))
		if added != want {
			t.Errorf("%d new ones, want %d", added, want)
		}
		return err
	}
	node.record(plain(300)...)
	w.must(take(node, 300))
	w.must(take(a, 1))
	node.record(plain(5)...)
	node.cosigned(a)
	node.rotate()
	w.must(take(node, 6))
	w.must(take(node, 0))
	if have := s.Have(node.origin); have["a1b2c3d4.00000001"] != 305 || have["a1b2c3d4.00000002"] != 1 {
		t.Errorf("%v", have)
	}
	news := 0
	for _, err := range s.New(t.Context(), node.origin, seen) {
		w.must(err)
		news++
	}
	for range s.New(t.Context(), node.origin, seen) {
		news++
	}
	if news != 306 {
		t.Errorf("%d new events", news)
	}
	ok := func() *evidence.Report {
		t.Helper()
		e, err := evidence.Open(s.Dir())
		w.must(err)
		r, err := e.Verify(t.Context(), w.trust())
		w.must(err)
		return r
	}
	if r := ok(); !r.OK() || r.Logs[1].Events != 306 || r.Logs[1].Unwitnessed != 1 {
		t.Errorf("%+v", r.Logs[1])
	}
	if text := s.Contradicts(node.origin, node.lineage, 2, node.checkpoint); text != "" {
		t.Error(text)
	}

	// The daemon's log is pruned: it stays here. It is rolled back, or forked: that
	// is said, and it stays as well.
	w.must(os.RemoveAll(filepath.Join(node.dir, "logs", "a1b2c3d4.00000001")))
	node.record(plain(1)...)
	w.must(take(node, 1))
	before := node.checkpoint
	w.must(os.RemoveAll(node.logDir()))
	node.entries, node.next = node.entries[:1], 306
	node.publish(node.entries)
	var conflict *evidence.Conflict
	if err := take(node, 0); !errors.As(err, &conflict) || !strings.Contains(err.Error(), "rolled back") {
		t.Error(err)
	}
	node.record(audit.Event{Kind: audit.Alarm}, audit.Event{Kind: audit.Alarm})
	if err := take(node, 0); !errors.As(err, &conflict) || !strings.Contains(err.Error(), "forked") {
		t.Error(err)
	}
	if text := s.Contradicts(node.origin, node.lineage, 2, node.checkpoint); !strings.Contains(text, "there were 3") {
		t.Error(text)
	}
	if got := s.Checkpoint(node.origin, node.lineage, 2); !bytes.Equal(got, before) {
		t.Error("the stored checkpoint is another")
	}
	if r := ok(); !r.OK() || r.Logs[1].Events != 307 {
		t.Errorf("%+v", r.Logs[1])
	}

	// The node is made anew, with another key: both of its logs are here, and hold.
	w.must(os.RemoveAll(node.dir))
	node = w.daemon(node.origin)
	node.lineage = "ffffffff"
	node.record(audit.Event{Kind: audit.Start, Time: began.Add(time.Hour)})
	w.must(take(node, 1))
	if r := ok(); !r.OK() || len(r.Logs) != 3 || r.Logs[1].Events != 307 || r.Logs[2].Lineage != "ffffffff" || len(r.Logs[2].Notes) != 1 || !strings.Contains(r.Logs[2].Notes[0], "began anew") {
		t.Errorf("%+v", r)
	}

	// Somebody else's log under its name, and a key that nobody vouches for.
	if _, err := s.Take(t.Context(), "cp-2.prod", w.trust(), a.stream(nil)); !fault.Is(err, fault.Unauthenticated) {
		t.Error(err)
	}
	_, node.log, _ = ed25519.GenerateKey(nil)
	w.must(os.RemoveAll(node.logDir()))
	node.publish(node.entries)
	if err := take(node, 0); !fault.Is(err, fault.Unauthenticated) {
		t.Error(err)
	}
	for _, name := range []string{"..", "a/b", "", "x~../y", "X"} {
		if _, err := s.Take(t.Context(), name, w.trust(), a.stream(nil)); !fault.Is(err, fault.Refused) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(s.Dir()), "out")); err == nil {
		t.Error("a file was written elsewhere")
	}
	within, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := evidence.OpenStore(within, s.Dir()); err == nil {
		t.Error("two have the same folder")
	}
}

// TestEndless: a daemon that sends pieces of nothing without end is not heard to the end.
func TestEndless(t *testing.T) {
	w := newWorld(t)
	s, err := evidence.OpenStore(t.Context(), filepath.Join(t.TempDir(), "kept"))
	w.must(err)
	defer s.Close()
	_, err = s.Take(t.Context(), "cp-1.prod", w.trust(), func() (evidence.Part, error) { return evidence.Part{Path: "identity"}, nil })
	if err == nil || !strings.Contains(err.Error(), "too many") {
		t.Error(err)
	}
}

// TestHugeSealed: a file without end is not read to the end.
func TestHugeSealed(t *testing.T) {
	w := newWorld(t)
	w.daemon("cp-1.prod").record(plain(1)...)
	huge := filepath.Join(w.dir, "cp-1.prod", "sealed", "x.age")
	w.must(os.MkdirAll(filepath.Dir(huge), 0o700))
	w.write(huge, nil)
	w.must(os.Truncate(huge, 1<<40))
	if _, r := w.verify(w.trust()); !r.OK() {
		t.Errorf("%+v", r)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"v":1,"id":"x","seq":1,"time":"2026-01-31T09:00:00Z","uptimeNs":0,"origin":"cp-1.prod","kind":"read"}`))
	f.Add([]byte(`{"v":1,"parameters":{"a":[1,2]},"objects":[{"key":"k"}]}`))
	f.Fuzz(func(t *testing.T, entry []byte) {
		e, err := evidence.Decode(entry)
		if err != nil {
			return
		}
		again, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := evidence.Decode(again); err != nil && len(again) <= audit.MaxEvent {
			t.Errorf("%s: %v", again, err)
		}
	})
}
