package mirror

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/rs/zerolog"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/internal/trust/logkey"
)

// outside is a witness as C2SP tlog-witness describes it, for logs whose keys it was
// given.
type outside struct {
	t      *testing.T
	signer *torchwood.CosignatureSigner

	mu    sync.Mutex // guards all below
	logs  map[string]note.Verifier
	heads map[string]tlog.Tree
	calls int
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	signer, err := torchwood.NewCosignatureSigner("witness.example/w", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	return &outside{t: t, signer: signer, logs: map[string]note.Verifier{}, heads: map[string]tlog.Tree{}}
}

func (o *outside) learn(tree string, key ed25519.PublicKey) {
	o.t.Helper()
	v, err := logkey.Verifier(tree, key)
	if err != nil {
		o.t.Fatal(err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.logs[tree] = v
}

func (o *outside) has(tree string) int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.heads[tree].N
}

func (o *outside) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls++
	data, err := io.ReadAll(r.Body)
	head, signed, ok := bytes.Cut(data, []byte("\n\n"))
	lines := strings.Split(string(head), "\n")
	var old int64
	if _, serr := fmt.Sscanf(lines[0], "old %d", &old); err != nil || !ok || serr != nil || r.URL.Path != "/w/add-checkpoint" || r.Method != http.MethodPost {
		http.Error(w, "malformed", http.StatusBadRequest)
		return
	}
	origin, _, _ := strings.Cut(string(signed), "\n")
	v := o.logs[origin]
	if v == nil {
		http.Error(w, "unknown log", http.StatusNotFound)
		return
	}
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil {
		http.Error(w, "not signed", http.StatusForbidden)
		return
	}
	to, err := torchwood.ParseCheckpoint(n.Text)
	if err != nil || to.N < old {
		http.Error(w, "malformed", http.StatusBadRequest)
		return
	}
	if was := o.heads[origin]; was.N != old {
		w.Header().Set("Content-Type", "text/x.tlog.size")
		w.WriteHeader(http.StatusConflict)
		_, _ = fmt.Fprintf(w, "%d\n", was.N)
		return
	}
	var proof tlog.TreeProof
	for _, line := range lines[1:] {
		h, err := tlog.ParseHash(line)
		if err != nil {
			http.Error(w, "malformed", http.StatusBadRequest)
			return
		}
		proof = append(proof, h)
	}
	if old > 0 && tlog.CheckTree(proof, to.N, to.Hash, old, o.heads[origin].Hash) != nil {
		http.Error(w, "no proof", http.StatusUnprocessableEntity)
		return
	}
	cosigned, err := note.Sign(&note.Note{Text: n.Text}, o.signer)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	o.heads[origin] = to.Tree
	_, sigs, _ := strings.Cut(string(cosigned), "\n\n")
	_, _ = io.WriteString(w, sigs)
}

// submit brings all to a witness until the test ends.
func submit(t *testing.T, m *Mirrors, own Ledger, to Outside) (problem func() string) {
	t.Helper()
	if err := to.Check(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var mu sync.Mutex
	last := "not yet"
	running.Go(func() {
		if err := m.Submit(ctx, own, to, func(p string) {
			mu.Lock()
			defer mu.Unlock()
			last = p
		}); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return last
	}
}

func within(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// TestOutside: a witness of somebody else countersigns the bastion's own log and its
// copies, and what it signed is kept beside the bastion's own.
func TestOutside(t *testing.T) {
	f := newFleet(t)
	key := newKey(t)
	m := f.open(0)
	c, err := m.Copy(origin)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Identify(f.statement(origin, key)); err != nil {
		t.Fatal(err)
	}
	l := newLog(t, origin, "00ff00ff", key, 300)
	must(t, c, l)
	own, err := ledger.Open(ledger.Options{Dir: filepath.Join(t.TempDir(), "audit"), Origin: "a.bastion", Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if _, err := own.Append(t.Context(), audit.Event{Kind: audit.Start}); err != nil {
		t.Fatal(err)
	}
	within(t, "the own log is signed", func() bool { return own.State().Signed == 1 })
	o := newOutside(t)
	server := httptest.NewServer(o)
	defer server.Close()
	tree := logkey.Tree(origin, l.lineage, 1)
	o.learn(tree, key.Public().(ed25519.PublicKey))
	to := Outside{URL: server.URL + "/w/", VKey: o.signer.Verifier().String()}
	problem := submit(t, m, own, to)
	within(t, "it has the copy", func() bool { return o.has(tree) == 300 })
	within(t, "it does not know the own log", func() bool { return strings.Contains(problem(), "a.bastion") && strings.Contains(problem(), "404") })
	file := filepath.Join(f.dir, origin, "logs", "00ff00ff.00000001", "cosigned")
	signedBy := func(file string, more ...note.Verifier) bool {
		data, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		n, err := note.Open(data, note.VerifierList(append(more, o.signer.Verifier())...))
		return err == nil && len(n.Sigs) == 1+len(more)
	}
	mine, err := logkey.WitnessVerifier("a.bastion", f.key.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	within(t, "both signatures are kept", func() bool { return signedBy(file, mine) })
	if all := f.raised(); len(all) > 0 {
		t.Error(all)
	}

	// Who was started again asks the witness what it has; the own log is known now.
	h := own.Heads()[0]
	o.learn(logkey.Tree("a.bastion", h.Lineage, 1), own.Key())
	must(t, c, l.grow(300, ""))
	m = f.open(0)
	problem = submit(t, m, own, to)
	within(t, "it has both", func() bool { return o.has(tree) == 600 && own.State().Witnessed["witness.example/w"] == 1 })
	within(t, "nothing is wrong", func() bool { return problem() == "" })

	// A copy that does not follow from what the witness has is told.
	o.mu.Lock()
	o.heads[tree] = tlog.Tree{N: 10, Hash: tlog.Hash{1}}
	o.mu.Unlock()
	submit(t, f.open(0), own, to)
	within(t, "it is told", func() bool {
		return strings.Contains(strings.Join(f.raised(), " "), "does not follow from what the witness")
	})
}

// TestOutsideHostile: what a witness answers is bounded, verified, and believed in
// nothing else.
func TestOutsideHostile(t *testing.T) {
	f := newFleet(t)
	key := newKey(t)
	m := f.open(0)
	c, err := m.Copy(origin)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Identify(f.statement(origin, key)); err != nil {
		t.Fatal(err)
	}
	must(t, c, newLog(t, origin, "00ff00ff", key, 3))
	before := snapshot(t, filepath.Join(f.dir, origin, "logs", "00ff00ff.00000001"))
	own := noLedger{}
	other := newOutside(t)
	for name, answer := range map[string]http.HandlerFunc{
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(bytes.Repeat([]byte("— x y\n"), 100_000))
		},
		"nothing": func(http.ResponseWriter, *http.Request) {},
		"another's key": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "— witness.example/w AAAAAA==\n")
		},
		"a conflict without end": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusConflict)
			_, _ = io.WriteString(w, "1\n")
		},
		"a huge conflict": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusConflict)
			_, _ = io.WriteString(w, "99999999999999999999999\n")
		},
		"elsewhere": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
	} {
		server := httptest.NewServer(answer)
		s := &submitter{m: m, own: own, to: Outside{URL: server.URL, VKey: other.signer.Verifier().String()}, verifier: other.signer.Verifier(), known: map[string]int64{}, notBefore: map[string]time.Time{},
			client: &http.Client{Timeout: submitWithin, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
		if err := s.round(t.Context()); err == nil {
			t.Errorf("%s: taken", name)
		}
		server.Close()
	}
	if snapshot(t, filepath.Join(f.dir, origin, "logs", "00ff00ff.00000001")) != before {
		t.Error("the copy has changed")
	}
	for _, bad := range []string{"", "ftp://127.0.0.1", "http://localhost:1/", "http://u:p@127.0.0.1/", "http://127.0.0.1/?x", "127.0.0.1:80"} {
		if (Outside{URL: bad, VKey: other.signer.Verifier().String()}).Check() == nil {
			t.Errorf("%q passes", bad)
		}
	}
	if (Outside{URL: "http://127.0.0.1", VKey: "x"}).Check() == nil {
		t.Error("no key passes")
	}
}

// noLedger is a log of nothing.
type noLedger struct{}

func (noLedger) Dir() string                                   { return "" }
func (noLedger) Heads() []ledger.Head                          { return nil }
func (noLedger) Changed() (<-chan struct{}, func())            { return nil, func() {} }
func (noLedger) Cosigned(string, uint64, []byte, string) error { return errors.New("none") }
