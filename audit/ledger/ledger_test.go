package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/tlog"
	"k8s.io/klog/v2"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

func TestMain(m *testing.M) {
	flag.Parse()
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	slog.SetDefault(slog.New(slog.DiscardHandler))
	if dir := os.Getenv("LEDGER_CHILD"); dir != "" {
		child(dir)
		return
	}
	os.Exit(m.Run())
}

const minute = time.Minute

var ann = &audit.Actor{Person: "ann", Role: trust.Responder.String(), Credential: string(trust.Person), Fingerprint: "SHA256:a"}

func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("not within 30 s: %s", what)
}

// opened opens a log that tries again soon.
func opened(t testing.TB, o Options) *Ledger {
	t.Helper()
	if o.Origin == "" {
		o.Origin = "cp-1.prod"
	}
	l, err := open(o, 20*time.Millisecond, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func add(t testing.TB, l *Ledger, e audit.Event) audit.Receipt {
	t.Helper()
	r, err := l.Append(within(t, minute), e)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func signed(t testing.TB, l *Ledger, seq uint64) {
	t.Helper()
	if err := l.SignedWithin(within(t, minute), seq); err != nil {
		t.Fatalf("%v: %+v", err, l.State())
	}
}

// read returns every event of the log that a checkpoint covers, after others than
// we have verified each generation, and the seams between them hold.
func read(t testing.TB, l *Ledger) (all []audit.Event) {
	t.Helper()
	var before *Head
	for _, h := range l.Heads() {
		outsiders(t, l, h)
		var these []audit.Event
		for entry, err := range l.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
			if err != nil {
				t.Fatal(err)
			}
			var e audit.Event
			if err := json.Unmarshal(entry, &e); err != nil {
				t.Fatal(err)
			}
			if want := h.FirstSeq + uint64(len(these)); e.Seq != want {
				t.Fatalf("event %d stands where %d should", e.Seq, want)
			}
			these = append(these, e)
		}
		if len(these) != int(h.Size) {
			t.Fatalf("%d of %d entries", len(these), h.Size)
		}
		if before != nil && before.Lineage == h.Lineage {
			c, err := tiles.ParseCheckpoint([]byte(these[0].Previous))
			if err != nil || these[0].Kind != audit.Seam || c.N != int64(before.Size) || h.FirstSeq != before.FirstSeq+before.Size || h.Generation != before.Generation+1 {
				t.Fatalf("seam to generation %d: %v, %+v", h.Generation, err, these[0])
			}
			if old, err := tiles.ParseCheckpoint(before.Checkpoint); err != nil || old.Hash != c.Hash {
				t.Fatalf("the seam to generation %d is of another tree", h.Generation)
			}
		}
		before, all = &h, append(all, these...)
	}
	return all
}

// outsiders verifies a generation with tessera's fsck and torchwood's client.
func outsiders(t testing.TB, l *Ledger, h Head) {
	t.Helper()
	dir := filepath.Join(l.Dir(), logs, tiles.Folder(h.Lineage, h.Generation))
	name := logkey.Tree(l.State().Origin, h.Lineage, h.Generation)
	v, err := logkey.Verifier(name, l.Key())
	if err != nil {
		t.Fatal(err)
	}
	hashes := func(bundle []byte) (all [][]byte, err error) {
		var b api.EntryBundle
		if err := b.UnmarshalText(bundle); err != nil {
			return nil, err
		}
		for _, e := range b.Entries {
			h := tlog.RecordHash(e)
			all = append(all, h[:])
		}
		return all, nil
	}
	if err := fsck.New(name, v, client.FileFetcher{Root: dir}, hashes, fsck.Opts{}).Check(t.Context()); err != nil {
		t.Fatalf("fsck of generation %d: %v", h.Generation, err)
	}
	c, _, err := torchwood.VerifyCheckpoint(h.Checkpoint, torchwood.ThresholdPolicy(2, torchwood.OriginPolicy(name), torchwood.SingleVerifierPolicy(v)))
	if err != nil || c.N != int64(h.Size) {
		t.Fatalf("torchwood: %v, %d entries of %d", err, c.N, h.Size)
	}
	f, err := torchwood.NewTileFS(os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	reader, err := torchwood.NewClient(f)
	if err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for range reader.AllEntries(t.Context(), c.Tree, 0) {
		n++
	}
	if err := reader.Err(); err != nil || n != c.N {
		t.Fatalf("torchwood reads %d entries of %d: %v", n, c.N, err)
	}
}

// heard collects alarms.
type heard struct {
	mu    sync.Mutex // guards texts
	texts []string
}

func (h *heard) raise(e alarm.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.texts = append(h.texts, string(e.Kind)+": "+e.Text)
}

// of reports whether something was said, or is within a moment.
func (h *heard) of(text string) bool {
	for range 100 {
		if h.now(text) {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

func (h *heard) now(text string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.ContainsFunc(h.texts, func(s string) bool { return strings.HasPrefix(s, "audit: ") && strings.Contains(s, text) })
}

// TestAppend: events are in the tree in order, over several processes' lives, and
// a checkpoint covers each within moments.
func TestAppend(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	for life := range 3 {
		l := opened(t, Options{Dir: dir})
		if at := l.LastTime(); at.IsZero() != (life == 0) || at.After(time.Now()) {
			t.Errorf("the newest event is of %v", at)
		}
		changed, end := l.Changed()
		l.Note(audit.Event{Kind: audit.Start})
		for i := range 2 {
			r := add(t, l, audit.Event{Kind: audit.Intent, Text: fmt.Sprint(i)})
			if r.Where != audit.Local || r.Seq != uint64(life*3+i+1) {
				t.Fatalf("%+v", r)
			}
			signed(t, l, r.Seq)
			<-changed
		}
		end()
		if s := l.State(); s.Events != uint64(life*3+3) || s.Signed != s.Events || s.Reserve != 2048 || s.Problem != "" || s.Refused != "" || s.Origin != "cp-1.prod" || s.Generation != 1 {
			t.Errorf("%+v", s)
		}
		if err := errors.Join(l.Close(), l.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Append(t.Context(), audit.Event{}); !fault.Is(err, fault.AuditUnavailable) {
			t.Errorf("after its end: %v", err)
		}
		all := read(t, l)
		for _, e := range all {
			if e.Origin != "cp-1.prod" || e.Version != audit.Version || e.Uptime == 0 || e.Boot == "" || e.ID == "" {
				t.Errorf("%+v", e)
			}
		}
		if len(all) != life*3+3 {
			t.Errorf("%d events", len(all))
		}
	}
	for _, name := range []string{".", logs, keyFile, hashKeyFile, spoolFile} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
}

// TestAppenders: many at once are one log, in which each finds its events in its
// own order.
func TestAppenders(t *testing.T) {
	l := opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit"), SpoolBytes: minSpool})
	const appenders, each = 24, 40
	var all sync.WaitGroup
	for a := range appenders {
		all.Go(func() {
			for i := range each {
				r, err := l.Append(within(t, minute), audit.Event{Kind: audit.Intent, Text: fmt.Sprint(i), Session: fmt.Sprint(a), Reason: strings.Repeat("x", 1000)})
				if err != nil || r.Where != audit.Local {
					t.Error(err)
					return
				}
				if i%10 == 0 {
					l.Note(audit.Event{Kind: audit.Read, Session: fmt.Sprint(a), Target: fmt.Sprint(a, i)})
				}
			}
		})
	}
	all.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	ids, next, notes, intents := map[string]bool{}, map[string]int{}, 0, 0
	for _, e := range read(t, l) {
		if ids[e.ID] {
			t.Fatalf("%s is there twice", e.ID)
		}
		ids[e.ID] = true
		switch e.Kind {
		case audit.Read:
			notes++
		case audit.Intent:
			if e.Text != fmt.Sprint(next[e.Session]) {
				t.Fatalf("event %s of %s comes when %d is due", e.Text, e.Session, next[e.Session])
			}
			next[e.Session]++
			intents++
		}
	}
	if lost := l.State().Lost; intents != appenders*each || notes+int(lost) != appenders*each/10 {
		t.Errorf("%d events, %d notes, %d lost", intents, notes, lost)
	}
}

// TestHostile: whatever is in an event, however long, it is recorded, fits, says
// what was cut, and is JSON without control characters.
func TestHostile(t *testing.T) {
	l := opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit")})
	long := strings.Repeat("\x1b]0;\u202e<script>\r\n\xff\"", 1<<16)
	var fill func(v reflect.Value)
	fill = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.String:
			v.SetString(long)
		case reflect.Pointer:
			v.Set(reflect.New(v.Type().Elem()))
			fill(v.Elem())
		case reflect.Struct:
			for i := range v.NumField() {
				if v.Field(i).CanSet() {
					fill(v.Field(i))
				}
			}
		case reflect.Slice:
			if v.Type().Elem().Kind() != reflect.Uint8 {
				v.Set(reflect.MakeSlice(v.Type(), 40, 40))
				for i := range 40 {
					fill(v.Index(i))
				}
			}
		}
	}
	var worst audit.Event
	fill(reflect.ValueOf(&worst).Elem())
	worst.ID, worst.Boot, worst.Origin, worst.Previous, worst.Payload, worst.Receipts, worst.Cut = "", "", "", "", "", nil, nil // the log's own
	worst.Kind, worst.Parameters = audit.Intent, json.RawMessage("{not json"+long)
	one := audit.Event{Kind: audit.Intent, Actor: ann, Reason: strings.Repeat("é", 1<<19), Parameters: json.RawMessage(` {"a": "b"} `), Objects: []audit.Object{{Key: "/registry/a", Changes: []audit.Change{{Path: "spec", Before: "1", After: "2"}}}}}
	many := one
	many.Objects = nil
	for i := range 5000 {
		many.Objects = append(many.Objects, audit.Object{Key: fmt.Sprintf("/registry/pods/ns/pod-%d", i)})
	}
	for _, e := range []audit.Event{worst, one, many} {
		add(t, l, e)
	}
	if one.Reason != strings.Repeat("é", 1<<19) || len(many.Objects) != 5000 {
		t.Error("the caller's event was changed")
	}
	signed(t, l, 2)
	all := read(t, l)
	for i, cut := range []string{"reason", "reason", "objects"} {
		if !slices.Contains(all[i].Cut, cut) {
			t.Errorf("%d: %q", i, all[i].Cut)
		}
	}
	if e := all[1]; len(e.Reason) != maxText || string(e.Parameters) != `{"a":"b"}` || len(e.Objects) != 1 || len(e.Objects[0].Changes) != 1 || !slices.Equal(e.Cut, []string{"reason"}) {
		t.Errorf("%+v", e)
	}
	if e := all[2]; e.ObjectCount != 5000 || len(e.Objects) < 300 {
		t.Errorf("%d objects of %d", len(e.Objects), e.ObjectCount)
	}
	for i := range l.Heads()[0].Size {
		for entry := range l.Entries(t.Context(), l.Heads()[0].Lineage, 1, i, i+1) {
			if len(entry) > audit.MaxEvent || strings.ContainsAny(string(entry), "\x1b\r\n<>") {
				t.Errorf("entry %d, %d bytes", i, len(entry))
			}
		}
	}
	for _, limit := range []int{audit.MaxEvent, maxHeldBytes, unit - recordHead} {
		if data, err := fit(worst, limit); err != nil || len(data) > limit {
			t.Errorf("%d bytes in %d: %v", len(data), limit, err)
		}
	}
	if h, other := l.Hash([]byte("s3cret")), opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit")}); h != l.Hash([]byte("s3cret")) || h == l.Hash([]byte("S3cret")) || h == other.Hash([]byte("s3cret")) {
		t.Error("hashes of secrets")
	}
}

// TestBursts: who asks the same thing all the time gets one line that says so.
func TestBursts(t *testing.T) {
	l := opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit")})
	for i := range 500 {
		l.Note(audit.Event{Kind: audit.Read, Action: "Get", Actor: ann, Outcome: "ok", Text: fmt.Sprint(i)})
		l.Note(audit.Event{Kind: audit.Refusal, Action: fmt.Sprint(i), Actor: ann})
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	reads, stand, refusals := 0, 0, 0
	for _, e := range read(t, l) {
		switch {
		case e.Kind == audit.Refusal:
			refusals++
		case e.Count > 0:
			stand += e.Count
		default:
			reads++
		}
	}
	if reads < burstFree || reads > 3*burstFree || reads+stand != 500 || refusals != 500 {
		t.Errorf("%d of 500 reads one by one, %d as counts, %d refusals", reads, stand, refusals)
	}
}

// TestClockSetBack: events never go back in time, not over a restart either, and
// the tree goes on although its newest checkpoint is from the future.
func TestClockSetBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	now := time.Now().Add(100 * time.Hour).UTC()
	l := opened(t, Options{Dir: dir, Now: func() time.Time { return now }})
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	now = now.Add(-200 * time.Hour)
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	future := time.Now().Add(1000 * time.Hour)
	if err := os.Chtimes(filepath.Join(dir, logs, tiles.Folder(l.Heads()[0].Lineage, 1), "checkpoint"), future, future); err != nil {
		t.Fatal(err)
	}
	l = opened(t, Options{Dir: dir})
	if at := l.LastTime(); !at.Equal(now.Add(200 * time.Hour).Round(0)) {
		t.Errorf("the newest event is of %v", at)
	}
	signed(t, l, add(t, l, audit.Event{Kind: audit.Start}).Seq)
	all := read(t, l)
	for i := range all[1:] {
		if all[i+1].Time.Before(all[i].Time) || all[i+1].Uptime < all[i].Uptime {
			t.Errorf("%v after %v", all[i+1].Time, all[i].Time)
		}
	}
}

// TestRefusesToOpen: what others may read or write, or have open.
func TestRefusesToOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	l := opened(t, Options{Dir: dir})
	if _, err := Open(Options{Dir: dir, Origin: "cp-1.prod"}); !errors.Is(err, errLocked) {
		t.Errorf("a second process: %v", err)
	}
	l.Close()
	for _, name := range []string{".", logs, keyFile, hashKeyFile, spoolFile} {
		path := filepath.Join(dir, name)
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, st.Mode().Perm()|0o044); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Options{Dir: dir, Origin: "cp-1.prod"}); err == nil || !strings.Contains(err.Error(), "chmod") {
			t.Errorf("%s open to others: %v", name, err)
		}
		if err := os.Chmod(path, st.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	for _, origin := range []string{"", "a/b", "a b", "a+b", "a\nb"} {
		if _, err := Open(Options{Dir: dir, Origin: origin}); err == nil {
			t.Errorf("origin %q", origin)
		}
	}
}

// bastions hold events, or do not.
type bastions struct {
	mu   sync.Mutex // guards all below
	err  error
	held map[string]string
}

func (b *bastions) Hold(_ context.Context, id string, event []byte) ([]string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return nil, b.err
	}
	b.held[id] = string(event)
	return []string{"one", "two"}, nil
}

// TestHeld: what the local log cannot take is kept by bastions, or refused, and is
// adopted when the log works again.
func TestHeld(t *testing.T) {
	var broken sync.Map
	b := &bastions{held: map[string]string{}}
	var l *Ledger
	h := &heard{}
	l = opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit"), Hold: b, Raise: h.raise, Steps: func(step string) {
		if _, is := broken.Load("spool"); is && strings.HasPrefix(step, "spool write") {
			l.spool.f.Close() // every write fails from here on
		}
	}})
	add(t, l, audit.Event{Kind: audit.Start})
	broken.Store("spool", true)
	changed, end := l.Changed()
	defer end()
	r := add(t, l, audit.Event{Kind: audit.Intent, Actor: ann, Reason: strings.Repeat("\"\x1b", 1<<16), Session: "s", Drill: true})
	if s := l.State(); r.Where != audit.Remote || r.ID == "" || s.Refused == "" || s.Reserve != 0 || s.Events != 1 || !h.of("cannot be recorded") {
		t.Fatalf("%+v, %+v", r, s)
	}
	<-changed
	room, err := l.Reserve(audit.Event{Kind: audit.Intent, Actor: ann})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := room.Append(t.Context(), audit.Event{Kind: audit.Outcome, Of: r.ID}); err != nil || r.Where != audit.Remote {
		t.Fatalf("%+v, %v", r, err)
	}
	room.Release()
	b.mu.Lock()
	b.err = errors.New("one bastion answers")
	b.mu.Unlock()
	if _, err := l.Append(t.Context(), audit.Event{Kind: audit.Intent}); !fault.Is(err, fault.AuditUnavailable) || !strings.Contains(err.Error(), "one bastion answers") {
		t.Errorf("%v", err)
	}
	l.Note(audit.Event{Kind: audit.Read})

	broken.Delete("spool")
	f, err := os.OpenFile(l.path(spoolFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	l.spool.f = f
	l.mu.Unlock()
	eventually(t, "both are adopted", func() bool { return l.State().Signed >= 4 })
	byKind := map[audit.Kind][]audit.Event{}
	for _, e := range read(t, l) {
		byKind[e.Kind] = append(byKind[e.Kind], e)
	}
	adopted := byKind[audit.Adopted]
	if len(adopted) != 2 || len(byKind[audit.Lost]) != 1 || byKind[audit.Lost][0].Count != 1 || l.State().Refused != "" {
		t.Fatalf("%+v", byKind)
	}
	for _, e := range adopted {
		var inner audit.Event
		if err := json.Unmarshal([]byte(e.Payload), &inner); err != nil || b.held[inner.ID] != e.Payload || !slices.Equal(e.Receipts, []string{"one", "two"}) || inner.Origin != "cp-1.prod" {
			t.Errorf("%v: %+v", err, e)
		}
	}
	if !adopted[0].Drill || adopted[0].Session != "s" || adopted[0].Actor.Person != "ann" || adopted[1].Of != r.ID {
		t.Errorf("%+v", adopted)
	}
}

// TestHeldOverStuckDisk: what bastions keep while a write hangs is adopted when that
// ends, however long it takes.
func TestHeldOverStuckDisk(t *testing.T) {
	l := opened(t, Options{Dir: filepath.Join(t.TempDir(), "audit"), Hold: &bastions{held: map[string]string{}}})
	add(t, l, audit.Event{Kind: audit.Start})
	hang := func(since time.Time) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.writing = since
	}
	hang(time.Now().Add(-2 * patience))
	r := add(t, l, audit.Event{Kind: audit.Intent, Actor: ann})
	if r.Where != audit.Remote {
		t.Fatalf("%+v", r)
	}
	l.mu.Lock()
	l.catchUp() // as each round does
	kept := len(l.held)
	l.mu.Unlock()
	if kept != 1 {
		t.Fatal("an event that bastions hold was forgotten")
	}
	hang(time.Time{})
	wake(l.keepWake)
	eventually(t, "it is adopted", func() bool { return l.State().Signed == 2 })
	if all := read(t, l); all[1].Kind != audit.Adopted || !strings.Contains(all[1].Payload, r.ID) {
		t.Errorf("%+v", all)
	}
}
