package evidence

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/evidence"
	"github.com/halligan-io/halligan/audit/ledger"
	"github.com/halligan-io/halligan/audit/tiles"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// peer is a daemon that keeps a ledger; a bastion has copies besides, which are
// folders of others'.
type peer struct {
	halliganv1.EvidenceClient
	t       *testing.T
	name    string
	dir     string
	log     *ledger.Ledger
	witness ed25519.PrivateKey
	copies  map[string]string
	down    bool
	problem string
}

func (w *watch) peer(name string) *peer {
	w.t.Helper()
	p := &peer{t: w.t, name: name, dir: filepath.Join(w.t.TempDir(), "audit"), copies: map[string]string{}}
	p.start()
	_, p.witness, _ = ed25519.GenerateKey(nil)
	statement := w.fleet.Statement(logkey.Statement{Server: name, Log: p.log.Key(), Witness: p.witness.Public().(ed25519.PublicKey), Signed: time.Now()})
	must(w.t, os.WriteFile(filepath.Join(p.dir, "identity"), statement, 0o600))
	w.peers = append(w.peers, p)
	return p
}

func (p *peer) start() {
	p.t.Helper()
	var err error
	p.log, err = ledger.Open(ledger.Options{Dir: p.dir, Origin: p.name, Log: zerolog.Nop()})
	must(p.t, err)
	p.t.Cleanup(func() { _ = p.log.Close() })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// record appends events and waits until they are signed.
func (p *peer) record(events ...audit.Event) (last audit.Receipt) {
	p.t.Helper()
	for _, e := range events {
		var err error
		last, err = p.log.Append(p.t.Context(), e)
		must(p.t, err)
	}
	ctx, cancel := context.WithTimeout(p.t.Context(), 20*time.Second)
	defer cancel()
	must(p.t, p.log.SignedWithin(ctx, last.Seq))
	return last
}

// copyOf takes a copy of a node's log as it is now, and countersigns it.
func (p *peer) copyOf(node *peer) {
	p.t.Helper()
	dir := filepath.Join(p.t.TempDir(), node.name)
	must(p.t, os.MkdirAll(dir, 0o700))
	data, err := os.ReadFile(filepath.Join(node.dir, "identity"))
	must(p.t, err)
	must(p.t, os.WriteFile(filepath.Join(dir, "identity"), data, 0o600))
	for _, head := range node.log.Heads() {
		to := filepath.Join(dir, "logs", fmt.Sprintf("%s.%08d", head.Lineage, head.Generation))
		must(p.t, os.MkdirAll(to, 0o700))
		tree, err := tiles.Open(to)
		must(p.t, err)
		must(p.t, tree.Append(p.t.Context(), head.Checkpoint, func(yield func([]byte) bool) {
			for entry, err := range node.log.Entries(p.t.Context(), head.Lineage, head.Generation, 0, head.Size) {
				must(p.t, err)
				if !yield(entry) {
					return
				}
			}
		}))
		signer, err := torchwood.NewCosignatureSigner(logkey.WitnessName(p.name), p.witness)
		must(p.t, err)
		v, err := logkey.Verifier(logkey.Tree(node.name, head.Lineage, head.Generation), node.log.Key())
		must(p.t, err)
		n, err := note.Open(head.Checkpoint, note.VerifierList(v))
		must(p.t, err)
		signed, err := note.Sign(n, signer)
		must(p.t, err)
		must(p.t, os.WriteFile(filepath.Join(to, "cosigned"), signed, 0o600))
		must(p.t, node.log.Cosigned(head.Lineage, head.Generation, signed, p.name))
	}
	p.copies[node.name] = dir
}

func (p *peer) ListLogs(context.Context, *halliganv1.ListLogsRequest, ...grpc.CallOption) (*halliganv1.ListLogsResponse, error) {
	out := &halliganv1.ListLogsResponse{}
	for _, h := range p.log.Heads() {
		out.Logs = append(out.Logs, &halliganv1.LogInfo{Origin: p.name, Lineage: h.Lineage, Generation: h.Generation, Size: h.Size, Checkpoint: string(h.Checkpoint)})
	}
	for origin, dir := range p.copies {
		found, _ := filepath.Glob(filepath.Join(dir, "logs", "*", "checkpoint"))
		for _, name := range found {
			data, err := os.ReadFile(name)
			must(p.t, err)
			c, err := tiles.ParseCheckpoint(data)
			must(p.t, err)
			_, lineage, generation, err := logkey.ParseTree(c.Origin)
			must(p.t, err)
			out.Logs = append(out.Logs, &halliganv1.LogInfo{Origin: origin, Lineage: lineage, Generation: generation, Size: uint64(c.N), Checkpoint: string(data), Copy: true, Problem: p.problem})
		}
	}
	return out, nil
}

func (p *peer) ReadLog(_ context.Context, req *halliganv1.ReadLogRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[halliganv1.FilePart], error) {
	dir := p.dir
	if req.GetOrigin() != "" {
		dir = p.copies[req.GetOrigin()]
	}
	if dir == "" {
		return nil, api.ToStatus(fault.New(fault.NotFound, "", "there is no copy of it"))
	}
	out := &pieces{}
	return out, filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		data, err := os.ReadFile(name)
		if err == nil && (rel == "identity" || strings.HasPrefix(rel, "logs")) {
			out.parts = append(out.parts, &halliganv1.FilePart{Path: filepath.ToSlash(rel), Data: data})
		}
		return err
	})
}

// watch is a fleet under audit.
type watch struct {
	t      *testing.T
	fleet  *testfleet.Fleet
	bundle *bundle.Bundle
	peers  []*peer
	state  string
}

func newWatch(t *testing.T) *watch {
	t.Helper()
	w := &watch{t: t, fleet: testfleet.New(t), state: filepath.Join(t.TempDir(), "state")}
	file, err := bundle.Parse(w.fleet.Bundle())
	must(t, err)
	w.bundle, err = bundle.Verify(file, nil)
	must(t, err)
	return w
}

// each calls do for the daemons, bastions or nodes.
func (w *watch) each(bastions bool) func(context.Context, func(context.Context, Daemon)) (map[string]error, error) {
	return func(ctx context.Context, do func(context.Context, Daemon)) (map[string]error, error) {
		failed := map[string]error{}
		var asking sync.WaitGroup
		for _, p := range w.peers {
			switch {
			case strings.HasSuffix(p.name, ".bastion") != bastions:
			case p.down:
				failed[p.name] = fault.New(fault.Unreachable, "wait", "%s is down", p.name)
			default:
				asking.Go(func() { do(ctx, Daemon{Name: p.name, EvidenceClient: p}) })
			}
		}
		asking.Wait()
		return failed, nil
	}
}

// output is what a command that still runs has written.
type output struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (o *output) Write(data []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(data)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// run runs the line that halligan would, and returns its status.
func (w *watch) run(ctx context.Context, out, errs *output, args ...string) int {
	terminal := verb.Terminal{In: strings.NewReader(""), Out: out, Err: errs, Env: func(string) string { return "" }, Now: time.Now}
	return verb.New(terminal, verb.Options{Commands: func(v *verb.Verbs) []*cobra.Command {
		c := Command(Surroundings{Out: out, Err: errs, Env: v.Env, Now: time.Now, PrintJSON: v.PrintJSON,
			Bundle: func() (*bundle.Bundle, error) { return w.bundle, nil },
			State:  func() (string, error) { return w.state, nil },
			Nodes:  w.each(false), Bastions: w.each(true)})
		c.PersistentFlags().String("node", "", "")
		return []*cobra.Command{c}
	}}).Run(ctx, append([]string{"audit"}, args...))
}

// want runs a line, and demands its status and what it says.
func (w *watch) want(status int, words []string, args ...string) string {
	w.t.Helper()
	var o, e output
	got := w.run(w.t.Context(), &o, &e, args...)
	out, errs := o.String(), e.String()
	if got != status {
		w.t.Errorf("audit %s: status %d, want %d: %s%s", strings.Join(args, " "), got, status, out, errs)
	}
	for _, word := range words {
		if !strings.Contains(out+errs, word) {
			w.t.Errorf("audit %s does not say %q: %s%s", strings.Join(args, " "), word, out, errs)
		}
	}
	return out
}

func TestAudit(t *testing.T) {
	w := newWatch(t)
	node, other, a := w.peer("cp-1.prod"), w.peer("cp-2.prod"), w.peer("a.bastion")
	alice := &audit.Actor{Person: "alice", Role: "responder"}
	other.record(audit.Event{Kind: audit.Start})
	a.record(audit.Event{Kind: audit.Relay, Actor: alice, Target: "cp-1.prod"})
	intent := node.record(audit.Event{Kind: audit.Intent, Actor: alice, Action: "scale", PlanID: "20261123-120000-aaaaaaaa", Incident: "INC-7", Reason: "it floods\x1b[2J the\nAPI",
		Objects: []audit.Object{{Key: "/registry/deployments/shop/web"}}})
	node.record(audit.Event{Kind: audit.Outcome, Of: intent.ID, Actor: alice, Action: "scale", Outcome: "applied"})
	a.copyOf(node)
	a.copyOf(other)
	node.record(audit.Event{Kind: audit.Logout, Actor: alice})

	dir := filepath.Join(t.TempDir(), "kept")
	w.want(0, []string{"cp-1.prod  3 new events\n", "cp-2.prod  1 new events\n", "a.bastion  1 new events\n"}, "fetch", dir)
	w.want(0, []string{"cp-1.prod  0 new events\n"}, "fetch", dir)
	w.want(0, []string{"verified: 3 logs, 5 events, of which no witness has seen 2", "countersigned by a.bastion: the events before 2", "no witness has seen the last 1 events, from 2 on"}, "verify", dir)
	var report evidence.Report
	must(t, json.Unmarshal([]byte(w.want(0, nil, "verify", dir, "-o", "json")), &report))
	if !report.OK() || len(report.Logs) != 3 {
		t.Errorf("%+v", report)
	}
	key := report.Logs[1].Generations[0].VKey

	// Shown is what was fetched by the way, and inert.
	shown := w.want(0, []string{"alice", `it floods\x1b[2J the\nAPI`, "applied", "incident=INC-7", "id=" + intent.ID}, "show", "--incident", "INC-7")
	if strings.Count(shown, "\n") != 2 || strings.Contains(shown, "\x1b") {
		t.Errorf("%q", shown)
	}
	for _, tt := range []struct {
		args  []string
		lines int
	}{{[]string{dir}, 5}, {[]string{"--person", "alice"}, 4}, {[]string{"--object", "shop/web", dir}, 2}, {[]string{"--kind", "intent,logout"}, 2}, {[]string{"--node", "cp-2"}, 1},
		{[]string{"--since", "1h", "--last", "2"}, 2}, {[]string{"--until", "2026-01-01"}, 0}, {[]string{"--incident", "INC-7", "-o", "json"}, 2}} {
		if out := w.want(0, nil, append([]string{"show"}, tt.args...)...); strings.Count(out, "\n") != tt.lines {
			t.Errorf("show %v: %q", tt.args, out)
		}
	}
	var shownEvent audit.Event
	must(t, json.Unmarshal([]byte(w.want(0, nil, "show", dir, "-o", "json", "--kind", "intent")), &shownEvent))
	if shownEvent.ID != intent.ID {
		t.Errorf("%+v", shownEvent)
	}

	// A proof, and what it proves.
	proof, event := filepath.Join(t.TempDir(), "proof"), filepath.Join(t.TempDir(), "event")
	w.want(0, nil, "prove", intent.ID, "--out", proof, "--event", event)
	w.want(0, []string{"c2sp.org/tlog-proof@v1"}, "prove", intent.ID, dir)
	check := []string{"verify", "--proof", proof, "--event", event, "--identity-file", filepath.Join(dir, "cp-1.prod", "identity"), "--identity-file", filepath.Join(dir, "a.bastion", "identity")}
	w.want(0, []string{"verified: it is event 0 of halligan.io/log/cp-1.prod/", "countersigned by halligan.io/witness/a.bastion"}, check...)
	w.want(0, []string{`"tree"`}, append(check, "-o", "json")...)
	data, err := os.ReadFile(event)
	must(t, err)
	must(t, os.WriteFile(event, bytes.Replace(data, []byte("alice"), []byte("mallo"), 1), 0o600))
	w.want(1, []string{"the proof does not hold"}, check...)
	w.want(1, []string{"no event has the ID"}, "prove", "nothing", dir)
	w.want(2, []string{intent.ID + " (intent)"}, "prove", "20261123-120000-aaaaaaaa", dir)
	w.want(2, []string{"no events of the kind", "refusal"}, "show", "--kind", "refused", dir)

	// Wrong usage, and nobody to believe.
	for _, args := range [][]string{{"nothing"}, {"fetch"}, {"verify", dir, dir}, {"verify", "--proof", proof}, {"verify", filepath.Join(dir, "absent")}, {"show", "--since", "yesterday"},
		{"show", "--follow", dir}, {"verify", dir, "--yes"}, {"fetch", dir, "--incident", "x"}, {"verify", dir, "--key", "nonsense"}, {"prove"}, {"verify", "--proof", "x", "--event", "y", dir}} {
		w.want(2, nil, args...)
	}
	all := w.bundle
	w.bundle = nil
	w.want(2, []string{"nothing says whom to believe"}, "verify", dir)
	w.want(0, []string{"signed by its key, for which the key vouches"}, "verify", filepath.Join(dir, "cp-1.prod"), "--key", key)
	w.bundle = all

	// A changed byte is named.
	changed := filepath.Join(t.TempDir(), "changed")
	must(t, os.CopyFS(changed, os.DirFS(dir)))
	bundles, _ := filepath.Glob(filepath.Join(changed, "cp-1.prod", "logs", "*", "tile", "entries", "000.p", "3"))
	data, err = os.ReadFile(bundles[0])
	must(t, err)
	must(t, os.WriteFile(bundles[0], bytes.Replace(data, []byte(`"applied"`), []byte(`"failed!"`), 1), 0o600))
	w.want(1, []string{"BAD  cp-1.prod/logs/", "tile/entries/000.p/3: event 1: ", "the evidence does not hold"}, "verify", changed)
	if out := w.want(1, []string{"note: not verified: "}, "show", changed, "--node", "cp-1"); strings.Count(out, "\n") != 1 {
		t.Errorf("what does not hold was shown: %q", out)
	}

	// A node that is down: its log from the copy, with less.
	node.down = true
	fresh := filepath.Join(t.TempDir(), "fresh")
	w.want(0, []string{"cp-1.prod  2 new events, from the copy of a.bastion", "cp-1.prod is down"}, "fetch", fresh)
	w.want(0, []string{"verified: 3 logs, 4 events"}, "verify", fresh)
	for _, p := range w.peers {
		p.down = true
	}
	w.want(8, []string{"no evidence could be fetched"}, "fetch", fresh)
	w.want(8, nil, "show")
}

// TestRewritten: a node whose log is another than bastions have seen, or than was
// fetched before, is told of, and both are kept.
func TestRewritten(t *testing.T) {
	w := newWatch(t)
	node, a := w.peer("cp-1.prod"), w.peer("a.bastion")
	a.record(audit.Event{Kind: audit.Start})
	node.record(audit.Event{Kind: audit.Start}, audit.Event{Kind: audit.Alarm, Text: "one"})
	must(t, node.log.Close())
	before := filepath.Join(t.TempDir(), "before")
	must(t, os.CopyFS(before, os.DirFS(node.dir)))
	node.start()
	node.record(audit.Event{Kind: audit.Alarm, Text: "two"}, audit.Event{Kind: audit.Alarm, Text: "three"})
	a.copyOf(node)
	kept := filepath.Join(t.TempDir(), "kept")
	w.want(0, nil, "fetch", kept)

	// Root puts back what was before, and goes on from there.
	must(t, node.log.Close())
	must(t, os.RemoveAll(node.dir))
	must(t, os.CopyFS(node.dir, os.DirFS(before)))
	must(t, filepath.WalkDir(node.dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			return os.Chmod(name, 0o700)
		}
		if err == nil {
			return os.Chmod(name, 0o600)
		}
		return err
	}))
	node.start()
	node.record(audit.Event{Kind: audit.Alarm, Text: "another story"})
	a.problem = "it was cut"

	w.want(1, []string{"the log that cp-1.prod shows is not the one that was here", "rolled back", "a.bastion says of the log of cp-1.prod: it was cut"}, "fetch", kept)
	w.want(1, []string{"forked"}, "verify", kept)
	out := w.want(1, []string{"not verified"}, "show", kept, "--kind", "alarm")
	for _, text := range []string{"two", "three"} {
		if !strings.Contains(out, text) {
			t.Errorf("%q is lost: %s", text, out)
		}
	}
	// Who comes only now hears of it from the bastion.
	fresh := filepath.Join(t.TempDir(), "fresh")
	w.want(1, []string{"the log of cp-1.prod is not the one that a.bastion has seen: it has"}, "fetch", fresh)
	w.want(1, []string{"forked"}, "verify", fresh)
}

func TestFollow(t *testing.T) {
	was := again
	again = 20 * time.Millisecond
	defer func() { again = was }()
	w := newWatch(t)
	node := w.peer("cp-1.prod")
	node.record(audit.Event{Kind: audit.Alarm, Text: "before"})
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	var out, errs output
	done := make(chan int, 1)
	go func() { done <- w.run(ctx, &out, &errs, "show", "--follow", "--kind", "alarm") }()
	// wait returns when the text was shown.
	wait := func(text string) {
		for !strings.Contains(out.String(), text) && ctx.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
	}
	wait("before")
	for i := range 3 {
		text := fmt.Sprint("then ", i)
		node.record(audit.Event{Kind: audit.Alarm, Text: text}, audit.Event{Kind: audit.Start})
		wait(text)
	}
	stop()
	status := <-done
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if status != 0 || len(lines) != 4 || !strings.HasSuffix(lines[3], "then 2") {
		t.Errorf("status %d: %q %q", status, lines, errs.String())
	}
}

// TestConflictOnce: what bastions say of each lineage of a log is told once.
func TestConflictOnce(t *testing.T) {
	f := &fetching{}
	f.conflict("%s says so", "a.bastion")
	f.conflict("%s says so", "a.bastion")
	f.conflict("%s says so", "b.bastion")
	if len(f.conflicts) != 2 {
		t.Errorf("%q", f.conflicts)
	}
}
