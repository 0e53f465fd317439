package ledger

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// fill appends events until so many generations have begun.
func fill(t *testing.T, l *Ledger, generations int) {
	t.Helper()
	for i := 0; l.State().Generation < generations; i++ {
		r := add(t, l, audit.Event{Kind: audit.Intent, Actor: ann, Text: fmt.Sprint(i), Reason: strings.Repeat("r", 3000)})
		if i%8 == 7 {
			signed(t, l, r.Seq)
		}
		if i > 2000 {
			t.Fatalf("%+v", l.State())
		}
	}
}

// TestGenerations: a log is rotated into trees that hang together, disk use stays
// within its bound, and what no witness has seen does not go silently.
func TestGenerations(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	h := &heard{}
	o := Options{Dir: dir, GenerationBytes: 64 << 10, MaxBytes: 400 << 10, SpoolBytes: minSpool, Raise: h.raise}
	l := opened(t, o)
	fill(t, l, 3)
	all := read(t, l)
	if n := len(l.Heads()); n != 3 && n != 2 || all[0].Seq != 0 {
		t.Fatalf("%d generations from event %d", n, all[0].Seq)
	}
	fill(t, l, 9)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	heads := l.Heads()
	if s := l.State(); s.Bytes-minSpool > o.MaxBytes+2*o.GenerationBytes || heads[0].Generation == 1 || !h.of("nobody else has seen") {
		t.Errorf("%+v, the first of %d generations is %d", s, len(heads), heads[0].Generation)
	}
	names, err := os.ReadDir(filepath.Join(dir, logs))
	if err != nil || len(names) != len(heads) {
		t.Errorf("%v: %d folders, %d generations", err, len(names), len(heads))
	}
	read(t, l)
	// The same is found by the next process.
	l = opened(t, o)
	if now := l.Heads(); !slices.EqualFunc(now, heads, func(a, b Head) bool {
		return a.Generation == b.Generation && a.FirstSeq == b.FirstSeq && a.Size == b.Size && string(a.Checkpoint) == string(b.Checkpoint)
	}) {
		t.Errorf("%d generations", len(now))
	}
	fill(t, l, 10)
	read(t, l)
}

// TestPartialTiles: the driver leaves a copy of a bundle for each of its entries,
// which would take far more than the log.
func TestPartialTiles(t *testing.T) {
	l := opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit")})
	for range 30 {
		signed(t, l, add(t, l, audit.Event{Kind: audit.Intent, Objects: many(40 << 10)}).Seq)
	}
	if s := l.State(); s.Bytes > 8<<20+6<<20 {
		t.Errorf("30 events of 40 KiB take %d KiB", (s.Bytes-8<<20)>>10)
	}
	read(t, l)
}

func many(bytes int) (all []audit.Object) {
	for range bytes / 1000 {
		all = append(all, audit.Object{Key: strings.Repeat("k", 980)})
	}
	return all
}

// witness signs checkpoints as one does.
func witness(t *testing.T, name string) func(checkpoint []byte, of note.Verifier) []byte {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := torchwood.NewCosignatureSigner(name, key)
	if err != nil {
		t.Fatal(err)
	}
	return func(checkpoint []byte, of note.Verifier) []byte {
		n, err := note.Open(checkpoint, note.VerifierList(of))
		if err != nil {
			t.Fatal(err)
		}
		signed, err := note.Sign(n, signer)
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
}

// TestCosigned: what witnesses sign is kept, the greatest, with all signatures of
// it, over a restart and in the next generation's seam; then the old one goes
// without an alarm.
func TestCosigned(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	h := &heard{}
	o := Options{Dir: dir, GenerationBytes: 60 << 10, MaxBytes: 200 << 10, SpoolBytes: minSpool, Raise: h.raise}
	l := opened(t, o)
	a, b := witness(t, "halligan.io/witness/a.bastion"), witness(t, "halligan.io/witness/b.bastion")
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	small := l.Heads()[0]
	v := func(h Head) note.Verifier {
		return l.verifier(&generation{origin: "cp-1.prod", lineage: h.Lineage, number: h.Generation})
	}
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	big := l.Heads()[0]
	for _, c := range []struct {
		by         string
		checkpoint []byte
		a, b       uint64
	}{
		{"a", a(small.Checkpoint, v(small)), 1, 0},
		{"a", a(big.Checkpoint, v(big)), 2, 0},
		{"b", b(small.Checkpoint, v(small)), 2, 1},
		{"b", b(big.Checkpoint, v(big)), 2, 2},
		{"a", a(big.Checkpoint, v(big)), 2, 2},
	} {
		if err := l.Cosigned(big.Lineage, 1, c.checkpoint, c.by); err != nil {
			t.Fatal(err)
		}
		if w := l.State().Witnessed; w["a"] != c.a || w["b"] != c.b {
			t.Fatalf("%v, want %d and %d", w, c.a, c.b)
		}
	}
	if n := strings.Count(string(l.Heads()[0].Cosigned), "\n\u2014 "); n != 3 {
		t.Errorf("%d signatures", n)
	}
	other := opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit")})
	signed(t, other, add(t, other, audit.Event{Kind: audit.Start}).Seq)
	foreign := other.Heads()[0].Checkpoint
	for _, c := range []struct {
		generation uint64
		checkpoint []byte
	}{{1, foreign}, {2, big.Checkpoint}, {1, nil}, {1, []byte("x")}} {
		if l.Cosigned(big.Lineage, c.generation, c.checkpoint, "a") == nil {
			t.Errorf("generation %d, %q", c.generation, c.checkpoint)
		}
	}
	l.Close()
	l = opened(t, o)
	if w := l.State().Witnessed; w["halligan.io/witness/a.bastion"] != 2 || w["halligan.io/witness/b.bastion"] != 2 {
		t.Errorf("%v after a restart", w)
	}
	for n := 2; n < 7; n++ {
		fill(t, l, n)
		for _, h := range l.Heads() {
			if err := l.Cosigned(h.Lineage, h.Generation, a(h.Checkpoint, v(h)), "a"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if l.Heads()[0].Generation == 1 || h.now("nobody else") {
		t.Errorf("%d, %q", l.Heads()[0].Generation, h.texts)
	}
	read(t, l)
}

// TestAnotherOrigin: an agent that gets a name ends its log and begins another one;
// nothing of the old one is lost.
func TestAnotherOrigin(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := opened(t, Options{Dir: dir, Origin: "cp-1"})
	add(t, l, audit.Event{Kind: audit.Start, Text: "old"})
	l.Close()
	h := &heard{}
	l = opened(t, Options{Dir: dir, Origin: "cp-1.prod", Raise: h.raise})
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start, Text: "new"}).Seq)
	heads := l.Heads()
	if s := l.State(); len(heads) != 2 || heads[0].Lineage == heads[1].Lineage || s.Events != 1 || s.Origin != "cp-1.prod" || !h.of("begins anew") {
		t.Fatalf("%+v, %+v", heads, s)
	}
	for i, name := range []string{"cp-1", "cp-1.prod"} {
		if !strings.HasPrefix(string(heads[i].Checkpoint), logkey.Tree(name, heads[i].Lineage, 1)+"\n1\n") {
			t.Errorf("%s", heads[i].Checkpoint)
		}
	}
	l.Close()
	// A spool of another size is made as soon as the old one is empty.
	l = opened(t, Options{Dir: dir, SpoolBytes: 1 << 20})
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	if s := l.State(); s.Events != 2 || l.spool.ring != 1<<20 {
		t.Errorf("%+v, %d", s, l.spool.ring)
	}
	l.Close()
	// How big the old log is does not end the first generation of the new one.
	l = opened(t, Options{Dir: dir, Origin: "cp-2.prod", GenerationBytes: 1, SpoolBytes: 1 << 20})
	time.Sleep(20 * time.Millisecond)
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start, Text: "first"}).Seq)
	lineage := l.spool.lineage
	for entry, err := range l.Entries(t.Context(), lineage, 1, 0, 1) {
		if err != nil || !strings.Contains(string(entry), `"seq":0`) || !strings.Contains(string(entry), `"text":"first"`) {
			t.Errorf("%v: %s", err, entry)
		}
	}
}
