package sealed_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"filippo.io/age"
	"filippo.io/torchwood"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/protobuf/proto"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/logkey"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

// world is a fleet with the clusters prod (cp-1, cp-2) and stage (cp-3).
type world struct {
	*testing.T
	*testfleet.Fleet
	bundle *bundle.Bundle
	now    time.Time
}

func newWorld(t *testing.T) *world {
	w := &world{T: t, Fleet: testfleet.New(t), now: time.Now()}
	node := func(name string, at byte) bundle.Host {
		return bundle.Host{Name: name, Address: bundle.IP{Addr: netip.AddrFrom4([4]byte{127, 0, 0, at})}, SSHPort: 2222, GRPCPort: 2223}
	}
	w.use(w.Inventory(func(i *bundle.Inventory) {
		i.Clusters = []bundle.Cluster{{Name: "prod", Nodes: []bundle.Host{node("cp-1", 1), node("cp-2", 2)}}, {Name: "stage", Nodes: []bundle.Host{node("cp-3", 3)}}}
	}))
	return w
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) use(data []byte) {
	w.Helper()
	f, err := bundle.Parse(data)
	w.must(err)
	w.bundle, err = bundle.Verify(f, nil)
	w.must(err)
}

// agent is a node's keys, its store and its log.
type agent struct {
	*world
	again    func(action, intent, sum string) error
	server   string
	dir      string
	store    *sealed.Store
	key      ed25519.PrivateKey
	host     gossh.Signer
	cert     *gossh.Certificate
	lineage  string
	entries  [][]byte
	hashes   []tlog.Hash
	identity []byte
}

func (w *world) agent(server string) *agent {
	w.Helper()
	a := &agent{world: w, server: server, dir: filepath.Join(w.TempDir(), "audit"), lineage: "0a1b2c3d", again: func(string, string, string) error { return errors.New("not now") }}
	a.open()
	_, a.key, _ = ed25519.GenerateKey(nil)
	keyFile, certFile := w.HostFiles(server, testfleet.Now())
	data, err := os.ReadFile(keyFile)
	w.must(err)
	a.host, err = gossh.ParsePrivateKey(data)
	w.must(err)
	data, err = os.ReadFile(certFile)
	w.must(err)
	pub, _, _, _, err := gossh.ParseAuthorizedKey(data)
	w.must(err)
	a.cert = pub.(*gossh.Certificate)
	a.state(a.store.Recipient(), w.now)
	return a
}

func (a *agent) open() {
	a.Helper()
	var err error
	a.store, err = sealed.Open(sealed.Options{Dir: a.dir, Server: a.server, Bundle: func() *bundle.Bundle { return a.bundle }, Now: func() time.Time { return a.now },
		Again: func(action, intent, sum string) error { return a.again(action, intent, sum) }})
	a.must(err)
	a.Cleanup(a.store.Close)
}

func (a *agent) state(recipient string, at time.Time) {
	a.Helper()
	var err error
	a.identity, err = logkey.Sign(logkey.Statement{Server: a.server, Log: a.key.Public().(ed25519.PublicKey), Age: recipient, Signed: at}, a.host, a.cert)
	a.must(err)
}

// log appends an event.
func (a *agent) log(e audit.Event) int {
	a.Helper()
	e.Version, e.Seq, e.Origin, e.Time = audit.Version, uint64(len(a.entries)), a.server, a.now.UTC()
	if e.ID == "" {
		e.ID = fmt.Sprintf("e%d", e.Seq)
	}
	data, err := json.Marshal(e)
	a.must(err)
	more, err := tlog.StoredHashes(int64(len(a.entries)), data, a.reader())
	a.must(err)
	a.entries, a.hashes = append(a.entries, data), append(a.hashes, more...)
	return len(a.entries) - 1
}

func (a *agent) reader() tlog.HashReader {
	return tlog.HashReaderFunc(func(at []int64) (out []tlog.Hash, err error) {
		for _, i := range at {
			out = append(out, a.hashes[i])
		}
		return out, nil
	})
}

// prove returns an event with its proof, under a checkpoint of all events.
func (a *agent) prove(i int) *halliganv1.ProvenEvent {
	a.Helper()
	size := int64(len(a.entries))
	root, err := tlog.TreeHash(size, a.reader())
	a.must(err)
	tree := logkey.Tree(a.server, a.lineage, 1)
	vkey, err := logkey.VKey(tree, a.key.Public().(ed25519.PublicKey))
	a.must(err)
	signer, err := note.NewSigner("PRIVATE+KEY+" + tree + "+" + strings.Split(vkey, "+")[1] + "+" + base64.StdEncoding.EncodeToString(append([]byte{1}, a.key.Seed()...)))
	a.must(err)
	checkpoint, err := note.Sign(&note.Note{Text: torchwood.Checkpoint{Origin: tree, Tree: tlog.Tree{N: size, Hash: root}}.String()}, signer)
	a.must(err)
	proof, err := tlog.ProveRecord(size, int64(i), a.reader())
	a.must(err)
	return &halliganv1.ProvenEvent{Event: a.entries[i], Proof: torchwood.FormatProof(int64(i), proof, checkpoint)}
}

const action = "20261123-114502-k3xq7mab"

func (a *agent) plan(change func(*halliganv1.Plan)) *halliganv1.Plan {
	a.Helper()
	node, cluster, _ := strings.Cut(a.server, ".")
	p := &halliganv1.Plan{Id: action, Action: "scale", Actor: "alice", Role: "responder", Reason: "storm", Node: node, ClusterName: cluster, Cluster: "cdf8",
		Objects: []*halliganv1.PlannedObject{{Key: "/registry/deployments/telemetry/collector", Resource: "deployments.apps", Uid: "u-1", Revision: 7, Operation: "update"}}}
	if change != nil {
		change(p)
	}
	var err error
	p.Sha256, err = api.PlanSHA256(p)
	a.must(err)
	return p
}

type image struct {
	Index int    `json:"index"`
	Key   string `json:"key"`
	Value []byte `json:"value"`
}

// recordOf is a record as the journal has it.
func recordOf(p *halliganv1.Plan, values ...string) io.Reader {
	var b bytes.Buffer
	intent, err := api.CanonicalJSON(p)
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(&b, `{"sum":"00000000","intent":%s,"access":{"door":"ssh","intent":"intent"}}`+"\n", intent)
	for i, v := range values {
		img, _ := json.Marshal(image{i, "/registry/deployments/telemetry/collector", []byte(v)})
		fmt.Fprintf(&b, `{"sum":"00000000","image":%s}`+"\n"+`{"sum":"00000000","note":{"index":0}}`+"\n", img)
	}
	return &b
}

// apply seals and logs an action and returns its evidence.
func (a *agent) apply(plan *halliganv1.Plan) *halliganv1.SealedEvidence {
	a.Helper()
	sum, err := a.store.Seal(plan.Id, recordOf(plan, "before"))
	a.must(err)
	file, err := os.ReadFile(filepath.Join(a.dir, "sealed", plan.Id+".age"))
	a.must(err)
	if is := sha256.Sum256(file); hex.EncodeToString(is[:]) != sum {
		a.Fatal("the file does not have the hash")
	}
	a.log(audit.Event{Kind: audit.Start})
	intent := a.log(audit.Event{ID: "intent", Kind: audit.Intent, Actor: &audit.Actor{Person: plan.Actor, Role: plan.Role}, PlanID: plan.Id, PlanSHA256: plan.Sha256})
	outcome := a.log(audit.Event{Kind: audit.Outcome, Of: "intent", PlanID: plan.Id, Outcome: "applied", Images: sum,
		Objects: []audit.Object{{Key: plan.Objects[0].Key, UID: "u-1", RevisionBefore: 7, RevisionAfter: 9, Outcome: "applied"}}})
	a.log(audit.Event{Kind: audit.Read})
	return &halliganv1.SealedEvidence{Identity: a.identity, Sealed: file, Events: []*halliganv1.ProvenEvent{a.prove(intent), a.prove(outcome)}}
}

// TestTake: an agent opens what another one of its cluster has sealed, whose log
// tells of it, and nothing else, whoever brings it.
func TestTake(t *testing.T) {
	w := newWorld(t)
	one, two, elsewhere := w.agent("cp-1.prod"), w.agent("cp-2.prod"), w.agent("cp-3.stage")
	if n := one.store.Meet([][]byte{two.identity, elsewhere.identity, one.identity, []byte("x")}); n != 1 {
		t.Fatalf("it met %d others", n)
	}
	good := one.apply(one.plan(nil))
	taken, err := two.store.Take(good)
	if err != nil {
		t.Fatal(err)
	}
	if taken.Met {
		t.Error("nobody has told the one of the other")
	}
	two.store.Meet([][]byte{one.identity})
	if taken, err = two.store.Take(good); err != nil || !taken.Met {
		t.Fatal("it does not know whom it has met: ", err)
	}
	var img image
	if err := json.Unmarshal(taken.Images[0], &img); err != nil || len(taken.Images) != 1 || string(img.Value) != "before" {
		t.Errorf("%v, %q", err, taken.Images)
	}
	if taken.Server() != "cp-1.prod" || taken.Intent.Actor.Person != "alice" || taken.Outcome.Outcome != "applied" || taken.Objects[0].RevisionAfter != 9 || taken.Plan.Id != action {
		t.Errorf("%+v", taken)
	}
	if _, err := one.store.Take(good); err != nil {
		t.Errorf("its own: %v", err)
	}

	// resealed is what anybody can make who knows the recipients.
	resealed := func(plan *halliganv1.Plan) []byte {
		t.Helper()
		mallory := w.agent("cp-9.prod")
		mallory.store.Meet([][]byte{two.identity})
		_, err := mallory.store.Seal(plan.Id, recordOf(plan, "another"))
		w.must(err)
		file, err := os.ReadFile(filepath.Join(mallory.dir, "sealed", plan.Id+".age"))
		w.must(err)
		return file
	}
	// logged is the evidence of what an agent logs and seals as it likes.
	logged := func(a *agent, plan *halliganv1.Plan, file []byte, change func(intent, outcome *audit.Event)) *halliganv1.SealedEvidence {
		t.Helper()
		sum := sha256.Sum256(file)
		intent := audit.Event{ID: fmt.Sprint("intent-", len(a.entries)), Kind: audit.Intent, Actor: &audit.Actor{Person: plan.Actor}, PlanID: plan.Id, PlanSHA256: plan.Sha256}
		outcome := audit.Event{Kind: audit.Outcome, Of: intent.ID, PlanID: plan.Id, Outcome: "applied", Images: hex.EncodeToString(sum[:])}
		if change != nil {
			change(&intent, &outcome)
		}
		i, o := a.log(intent), a.log(outcome)
		return &halliganv1.SealedEvidence{Identity: a.identity, Sealed: file, Events: []*halliganv1.ProvenEvent{a.prove(i), a.prove(o)}}
	}
	with := func(change func(*halliganv1.SealedEvidence)) *halliganv1.SealedEvidence {
		e := proto.CloneOf(good)
		change(e)
		return e
	}
	stranger := w.agent("cp-1.prod") // whose log has another key
	_, err = stranger.store.Seal(action, recordOf(stranger.plan(nil), "before"))
	w.must(err)
	lonely, err := os.ReadFile(filepath.Join(stranger.dir, "sealed", action+".age"))
	w.must(err)
	other := one.plan(func(p *halliganv1.Plan) { p.Objects[0].Key = "/registry/clusterrolebindings/root" })
	elsewhere.store.Meet([][]byte{elsewhere.identity})
	foreign := elsewhere.plan(nil)
	bob := one.plan(func(p *halliganv1.Plan) { p.Actor = "bob" })
	for name, c := range map[string]struct {
		evidence *halliganv1.SealedEvidence
		want     string
	}{
		"nothing":                          {&halliganv1.SealedEvidence{}, "the statement of a log's key does not hold"},
		"a byte of the file":               {with(func(e *halliganv1.SealedEvidence) { e.Sealed[len(e.Sealed)-1] ^= 1 }), "no event of the log has the hash"},
		"another file to the same keys":    {with(func(e *halliganv1.SealedEvidence) { e.Sealed = resealed(one.plan(nil)) }), "no event of the log has the hash"},
		"no file":                          {with(func(e *halliganv1.SealedEvidence) { e.Sealed = nil }), "no event of the log has the hash"},
		"a byte of an event":               {with(func(e *halliganv1.SealedEvidence) { e.Events[1].Event[40] ^= 1 }), "does not hold for this event"},
		"a byte of a proof":                {with(func(e *halliganv1.SealedEvidence) { e.Events[1].Proof[40] ^= 1 }), ""},
		"a byte of the statement":          {with(func(e *halliganv1.SealedEvidence) { e.Identity[30] ^= 1 }), ""},
		"the statement of another":         {with(func(e *halliganv1.SealedEvidence) { e.Identity = two.identity }), ""},
		"another log key, well stated":     {with(func(e *halliganv1.SealedEvidence) { e.Identity = stranger.identity }), "does not hold"},
		"no intent":                        {with(func(e *halliganv1.SealedEvidence) { e.Events[0] = e.Events[1] }), "no intent"},
		"no outcome":                       {with(func(e *halliganv1.SealedEvidence) { e.Events = e.Events[:1] }), "1 events are not"},
		"two intents":                      {with(func(e *halliganv1.SealedEvidence) { e.Events = append(e.Events, e.Events[0]) }), "two intents"},
		"an event that has no place in it": {with(func(e *halliganv1.SealedEvidence) { e.Events = append(e.Events, one.prove(0)) }), "no place"},
		"too many events": {with(func(e *halliganv1.SealedEvidence) {
			for len(e.Events) < 100 {
				e.Events = append(e.Events, e.Events[1])
			}
		}), "100 events are not"},
		"another cluster":             {logged(elsewhere, foreign, resealed(foreign), nil), "it is of another cluster than prod"},
		"another plan than logged":    {logged(one, one.plan(nil), resealed(other), nil), "another plan than that of the intent"},
		"planned on another node":     {logged(one, two.plan(nil), resealed(two.plan(nil)), nil), "planned on another node"},
		"done by somebody else":       {logged(one, bob, resealed(bob), func(i, _ *audit.Event) { i.Actor.Person = "alice" }), "somebody else"},
		"an outcome of another":       {logged(one, other, resealed(other), func(_, o *audit.Event) { o.Of = "intent" }), "do not belong together"},
		"an event of another version": {logged(one, other, resealed(other), func(_, o *audit.Event) { o.Outcome = ""; o.Kind = "rumour" }), "no place"},
		"not sealed to this agent":    {logged(one, one.plan(nil), lonely, nil), "cannot be opened"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := two.store.Take(c.evidence)
			if err == nil || !strings.Contains(err.Error(), c.want) || !fault.Is(err, fault.Refused) && !fault.Is(err, fault.Unauthenticated) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	t.Run("a lapsed certificate", func(t *testing.T) {
		w.now = w.now.Add(30 * 24 * time.Hour)
		defer func() { w.now = w.now.Add(-30 * 24 * time.Hour) }()
		if _, err := two.store.Take(good); err != nil {
			t.Error(err)
		}
	})
	t.Run("a revoked host key", func(t *testing.T) {
		w.use(w.Revoke(func(r *bundle.Revocations) { r.Keys = []string{gossh.FingerprintSHA256(one.host.PublicKey())} }))
		if _, err := two.store.Take(good); !fault.Is(err, fault.Unauthenticated) {
			t.Error(err)
		}
	})
}

// TestAgain: who joins can open what was sealed before, once the log has the new
// file's hash.
func TestAgain(t *testing.T) {
	w := newWorld(t)
	one, two := w.agent("cp-1.prod"), w.agent("cp-2.prod")
	evidence := one.apply(one.plan(nil))
	if _, err := two.store.Take(evidence); err == nil {
		t.Fatal("it is opened by an agent that it was not sealed to")
	}
	name := filepath.Join(one.dir, "sealed", action+".age")
	at := w.now.Add(-47 * time.Hour)
	w.must(os.Chtimes(name, at, at))
	changed, end := one.store.Changed()
	defer end()
	var more int
	one.again = func(id, intent, sum string) error {
		if id != action || intent != "intent" {
			t.Errorf("%s stands on %s", id, intent)
		}
		more = one.log(audit.Event{Kind: audit.Objects, Of: intent, PlanID: id, Images: sum})
		return nil
	}
	one.store.Meet([][]byte{two.identity})
	select {
	case <-changed:
	case <-time.After(20 * time.Second):
		t.Fatal("it was not sealed once more")
	}
	var err error
	evidence.Sealed, err = os.ReadFile(name)
	w.must(err)
	if _, err := two.store.Take(evidence); err == nil {
		t.Error("the log was not asked for the new hash")
	}
	evidence.Events = append(evidence.Events, one.prove(more))
	if taken, err := two.store.Take(evidence); err != nil || len(taken.Images) != 1 || len(taken.Objects) != 1 {
		t.Error(taken, err)
	}
	if st, err := os.Stat(name); err != nil || st.ModTime().After(at.Add(time.Second)) {
		t.Error("it lives longer for it")
	}
}

// TestMeet: who is sealed to.
func TestMeet(t *testing.T) {
	w := newWorld(t)
	one, two := w.agent("cp-1.prod"), w.agent("cp-2.prod")
	if n := one.store.Meet([][]byte{two.identity}); n != 1 {
		t.Fatal(n)
	}
	opens := func(keys ...age.Identity) bool {
		t.Helper()
		_, err := one.store.Seal(action, recordOf(one.plan(nil), "before"))
		w.must(err)
		f, err := os.Open(filepath.Join(one.dir, "sealed", action+".age"))
		w.must(err)
		defer f.Close()
		r, err := sealed.Read(f, keys...)
		return err == nil && r.Plan.Id == action
	}
	later, err := age.GenerateX25519Identity()
	w.must(err)
	if opens(later) {
		t.Error("a stranger opens it")
	}
	// A newer statement counts, an older one does not come back, a restart forgets nobody.
	older := two.identity
	two.state(later.Recipient().String(), w.now.Add(time.Minute))
	one.store.Meet([][]byte{two.identity})
	one.store.Meet([][]byte{older})
	one.open()
	if !opens(later) {
		t.Error("its new key does not open it")
	}
	// The offline key of the policy.
	offline, err := age.GenerateX25519Identity()
	w.must(err)
	w.use(w.Policy(func(p *bundle.Policy) { p.Recovery = []bundle.Recipient{{X25519Recipient: offline.Recipient()}} }))
	if !opens(offline) {
		t.Error("the offline key does not open it")
	}
	// A node whose host was revoked.
	w.use(w.Revoke(func(r *bundle.Revocations) { r.Keys = []string{gossh.FingerprintSHA256(two.host.PublicKey())} }))
	if opens(later) {
		t.Error("a node that was revoked opens it")
	}
	w.use(w.Revoke(func(r *bundle.Revocations) { r.Keys = nil }))
	if n := one.store.Meet([][]byte{two.identity}); n != 1 || !opens(later) {
		t.Errorf("%d known", n)
	}
	// A node that left the inventory.
	w.use(w.Inventory(func(i *bundle.Inventory) { i.Clusters[0].Nodes = i.Clusters[0].Nodes[:1] }))
	if n := one.store.Meet([][]byte{two.identity}); n != 0 || opens(later) {
		t.Errorf("%d known: a node that left opens it", n)
	}
}

// TestMeetMany: what a bastion can have an agent verify is bounded, however many
// statements it brings.
func TestMeetMany(t *testing.T) {
	w := newWorld(t)
	two := w.agent("cp-2.prod")
	verified := 0
	one, err := sealed.Open(sealed.Options{Dir: filepath.Join(t.TempDir(), "audit"), Server: "cp-1.prod", Bundle: func() *bundle.Bundle { verified++; return w.bundle }, Now: func() time.Time { verified++; return w.now }})
	w.must(err)
	defer one.Close()
	forged := bytes.Replace(two.identity, []byte("\nage age1"), []byte("\nage age1q"), 1)
	var many [][]byte
	for range 500 {
		many = append(many, forged)
	}
	verified = 0
	if n := one.Meet(many); n != 0 || verified > 3 {
		t.Errorf("%d are believed, after %d looks at clock and bundle", n, verified)
	}
	if n := one.Meet([][]byte{two.identity}); n != 1 {
		t.Errorf("%d known after", n)
	}
}

// TestSend: each witness is sent each file until it has it, over restarts.
func TestSend(t *testing.T) {
	w := newWorld(t)
	one := w.agent("cp-1.prod")
	changed, end := one.store.Changed()
	defer end()
	sum, err := one.store.Seal(action, recordOf(one.plan(nil), "before"))
	w.must(err)
	select {
	case <-changed:
	default:
		t.Error("nobody was told")
	}
	unsent := func(witness string, want int) {
		t.Helper()
		files := one.store.Unsent(witness)
		if len(files) != want || want > 0 && (files[0].Action != action || files[0].SHA256 != sum) {
			t.Errorf("%s: %+v", witness, files)
		}
	}
	unsent("a.bastion", 1)
	one.store.Stored("a.bastion", action, "another hash")
	unsent("a.bastion", 1)
	one.store.Stored("a.bastion", action, sum)
	one.store.Stored("a.bastion", "20261123-114502-aaaaaaaa", sum)
	unsent("a.bastion", 0)
	unsent("b.bastion", 1)
	one.open()
	unsent("a.bastion", 0)
	unsent("b.bastion", 1)
	w.must(os.Remove(filepath.Join(one.dir, "sent")))
	one.open()
	unsent("a.bastion", 1)
	if _, err := one.store.Seal(action, iotest.ErrReader(errors.New("the record is damaged"))); err == nil || one.store.Problem() == "" {
		t.Error("sealed what cannot be read")
	}
	unsent("b.bastion", 1)
	if left, _ := filepath.Glob(filepath.Join(one.dir, "sealed", ".*")); len(left) > 0 {
		t.Error(left)
	}
	if _, err := one.store.Seal("../x", recordOf(one.plan(nil))); err == nil {
		t.Error("any name will do")
	}
}

// TestExpire: before-images end by policy, and within their room.
func TestExpire(t *testing.T) {
	w := newWorld(t)
	w.use(w.Policy(func(p *bundle.Policy) { p.KeepImages = bundle.Duration(48 * time.Hour) }))
	one := w.agent("cp-1.prod")
	write := func(id string, age time.Duration) {
		t.Helper()
		_, err := one.store.Seal(id, recordOf(one.plan(nil), "before"))
		w.must(err)
		at := w.now.Add(-age)
		w.must(os.Chtimes(filepath.Join(one.dir, "sealed", id+".age"), at, at))
	}
	there := func(want ...string) {
		t.Helper()
		var is []string
		for _, f := range one.store.Unsent("w") {
			is = append(is, f.Action)
		}
		if strings.Join(is, " ") != strings.Join(want, " ") {
			t.Errorf("%v, want %v", is, want)
		}
	}
	write("a", 49*time.Hour)
	write("b", 47*time.Hour)
	write("c", time.Hour)
	one.open()
	there("b", "c")
	// A clock that is far ahead makes the bundle stale, and ends nothing.
	now := w.now
	w.now = now.Add(30 * 24 * time.Hour)
	one.open()
	there("b", "c")
	w.now = now
	w.must(os.WriteFile(filepath.Join(one.dir, "sealed", ".x.1.tmp"), nil, 0o600))
	one.open()
	if _, err := os.Stat(filepath.Join(one.dir, "sealed", ".x.1.tmp")); err == nil {
		t.Error("what a killed process left is there")
	}
	w.must(os.WriteFile(filepath.Join(one.dir, "sealed", "notes.txt"), nil, 0o600))
	if n, err := sealed.Expire(one.dir, w.now.Add(-2*time.Hour)); n != 1 || err != nil {
		t.Error(n, err)
	}
	if n, err := sealed.Expire(t.TempDir(), w.now); n != 0 || err != nil {
		t.Error(n, err)
	}
	if _, err := os.Stat(filepath.Join(one.dir, "sealed", "notes.txt")); err != nil {
		t.Error("removed what is not ours")
	}
	st, err := os.Stat(filepath.Join(one.dir, "sealed", "c.age"))
	w.must(err)
	small, err := sealed.Open(sealed.Options{Dir: one.dir, Server: one.server, Bundle: func() *bundle.Bundle { return nil }, MaxBytes: 2*st.Size() + 64})
	w.must(err)
	defer small.Close()
	for _, id := range []string{"d", "e"} {
		_, err := small.Seal(id, recordOf(one.plan(nil), "before"))
		w.must(err)
	}
	if _, err := os.Stat(filepath.Join(one.dir, "sealed", "c.age")); err == nil {
		t.Error("more than there is room for")
	}
}

// TestKey: the agent's own key is private and stays.
func TestKey(t *testing.T) {
	w := newWorld(t)
	one := w.agent("cp-1.prod")
	was, file := one.store.Recipient(), filepath.Join(one.dir, "age-key")
	one.open()
	if one.store.Recipient() != was {
		t.Error("another key")
	}
	w.must(os.Chmod(file, 0o644))
	o := sealed.Options{Dir: one.dir, Server: one.server, Bundle: func() *bundle.Bundle { return nil }}
	if _, err := sealed.Open(o); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Error(err)
	}
	w.must(os.Chmod(file, 0o600))
	w.must(os.WriteFile(file, []byte("AGE-SECRET-KEY-1QQ"), 0o600))
	if _, err := sealed.Open(o); err == nil || strings.Contains(err.Error(), "1QQ") {
		t.Error(err)
	}
}

// TestRead: what is no sealed file is refused in bounded memory.
func TestRead(t *testing.T) {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for _, plain := range []string{"", "x", "{}", "\x1f\x8b\x08"} {
		var file bytes.Buffer
		to, err := age.Encrypt(&file, key.Recipient())
		if err == nil {
			_, err = to.Write([]byte(plain))
		}
		if err = errors.Join(err, to.Close()); err != nil {
			t.Fatal(err)
		}
		if _, err := sealed.Read(&file, key); !fault.Is(err, fault.Refused) {
			t.Errorf("%q: %v", plain, err)
		}
	}
}
