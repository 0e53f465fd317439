package action

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/halligan-io/halligan/agent/journal"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var errNoLog = fault.New(fault.AuditUnavailable, "free space", "the log takes nothing")

// TestEveryActionOnRecord goes over the table: each action that changes something
// leaves its intent before its effect, and its outcome before its answer.
func TestEveryActionOnRecord(t *testing.T) {
	cases := map[string]func(l *lab) map[string]any{
		"scale": func(l *lab) map[string]any { l.put(collector()); return stopCollector },
		"delete": func(l *lab) map[string]any {
			l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "c")})
			return map[string]any{"target": "cm/c", "namespace": "telemetry"}
		},
		"revoke": func(l *lab) map[string]any {
			l.put(binding("collector", account("telemetry", "collector")))
			return map[string]any{"subject": "system:serviceaccount:telemetry:collector"}
		},
		"pause": func(l *lab) map[string]any {
			l.put(&appsv1.Deployment{ObjectMeta: labelled("telemetry", "d")})
			return map[string]any{"target": "deploy/d", "namespace": "telemetry"}
		},
		"resume": func(l *lab) map[string]any {
			l.put(&appsv1.Deployment{ObjectMeta: labelled("telemetry", "d"), Spec: appsv1.DeploymentSpec{Paused: true}})
			return map[string]any{"target": "deploy/d", "namespace": "telemetry"}
		},
		"webhook": func(l *lab) map[string]any {
			l.put(hooks("telemetry", admissionv1.Fail))
			return map[string]any{"operation": "open", "target": "telemetry"}
		},
		"label": func(l *lab) map[string]any {
			l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "c")})
			return map[string]any{"target": "cm/c", "namespace": "telemetry", "changes": []any{"a=b"}}
		},
		"annotate": func(l *lab) map[string]any {
			l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "c")})
			return map[string]any{"target": "cm/c", "namespace": "telemetry", "changes": []any{"a=b"}}
		},
		"cordon": func(l *lab) map[string]any {
			l.put(&corev1.Node{ObjectMeta: labelled("", "telemetry-1")})
			return map[string]any{"target": "telemetry-1"}
		},
		"uncordon": func(l *lab) map[string]any {
			l.put(&corev1.Node{ObjectMeta: labelled("", "telemetry-1"), Spec: corev1.NodeSpec{Unschedulable: true}})
			return map[string]any{"target": "node/telemetry-1"}
		},
		"undo": func(l *lab) map[string]any {
			l.put(collector())
			return map[string]any{"action": l.do(resultApplied, "scale", stopCollector).Action}
		},
	}
	who := responder
	who.Session, who.CA = "s-1", "SHA256:ca"
	for _, r := range table {
		if r.effect != mutate {
			continue
		}
		prepare := cases[r.name]
		if prepare == nil {
			t.Errorf("%s changes something: say here how, so that its record is looked at", r.name)
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			l := newLab(t, 1)
			l.real()
			par := prepare(l)
			p, err := l.engine.Plan(l.ctx(), who, &halliganv1.PlanRequest{Action: r.name, Parameters: parameters(t, par), Reason: "test", Incident: "INC-1"})
			if err != nil {
				t.Fatal(err)
			}
			before := l.ledger.State().Events
			at := map[string]int{}
			l.engine.steps = func(step string) { at[step] = int(l.ledger.State().Events - before) }
			res := l.engine.Apply(l.ctx(), who, toApply(p), nil)
			if res.Result != resultApplied {
				t.Fatal(res.Error)
			}
			for step, n := range map[string]int{"intent": 0, "record": 1, "write": 1, "written": 1, "outcome": 1, "end": 2} {
				if have, ok := at[step]; !ok || have != n {
					t.Errorf("at %q there are %d events, want %d", step, have, n)
				}
			}
			events := l.events(p.Id)
			in, out := events[0], events[len(events)-1]
			if in.Kind != audit.Intent || in.Actor.Person != "alice" || in.Actor.Role != "responder" || in.Actor.Fingerprint != "SHA256:alice" || in.Actor.Serial != "7" || in.Actor.CA != "SHA256:ca" ||
				in.Actor.Source == "" || in.Session != "s-1" || in.Reason != "test" || in.Incident != "INC-1" || in.Action != r.name || in.PlanSHA256 != p.Sha256 || in.Via != "etcd" ||
				!strings.Contains(string(in.Parameters), "telemetry") && !strings.Contains(string(in.Parameters), p.Undoes) || in.Undoes != p.Undoes || len(in.Objects) != len(p.Objects) || in.ObjectCount != len(p.Objects) {
				t.Errorf("intent: %+v", in)
			}
			if out.Kind != audit.Outcome || out.Of != in.ID || out.Outcome != resultApplied || out.Settled || out.Session != "s-1" || len(out.Objects) != len(p.Objects) {
				t.Errorf("outcome: %+v", out)
			}
			for i, o := range p.Objects {
				a, b := in.Objects[i], out.Objects[i]
				if a.Key != o.Key || a.UID != o.Uid || a.RevisionBefore != o.Revision || len(a.Changes) != len(o.Changes) || a.RevisionAfter != 0 || a.Outcome != "" {
					t.Errorf("intended: %+v", a)
				}
				if b.Key != o.Key || b.Outcome != journal.Applied || b.RevisionAfter != res.Objects[i].RevisionAfter || b.RevisionAfter == 0 || b.Changes != nil {
					t.Errorf("done: %+v", b)
				}
			}
			if record, err := l.engine.journal.Read(p.Id); err != nil || record.Intent != in.ID || record.Session != "s-1" {
				t.Errorf("the record stands on %+v, %v", record, err)
			}
		})
	}
}

// TestAuditRefuses: nothing is changed or revealed that cannot be recorded. Reading
// goes on, and so does stopping.
func TestAuditRefuses(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	l.put(&corev1.Secret{ObjectMeta: labelled("telemetry", "s"), Data: map[string][]byte{"p": []byte("hunter2")}})
	before := l.value(key)
	log := l.log
	log.refuse = func(audit.Event) error { return errNoLog }
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // and it is not used up
		r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
		if r.Result != resultFailed || r.Error.GetCode() != string(fault.AuditUnavailable) || r.Error.Next == "" || !bytes.Equal(before, l.value(key)) || l.records() != 0 {
			t.Fatalf("without a log: %v, %d records", r, l.records())
		}
	}
	get := func(reveal bool) (text string, err error) {
		_, err = l.engine.Get(l.ctx(), by("carol", trust.Commander), &halliganv1.GetRequest{Reason: "test", Parameters: parameters(t, map[string]any{"target": "secret/s", "namespace": "telemetry", "full": true, "reveal": reveal})},
			func(o *halliganv1.Object) error { text += o.Json; return nil })
		return text, err
	}
	if text, err := get(true); !fault.Is(err, fault.AuditUnavailable) || text != "" || l.records() != 0 {
		t.Errorf("revealed: %q, %v", text, err)
	}
	if text, err := get(false); err != nil || text == "" {
		t.Errorf("a read is refused: %v", err)
	}
	log.refuse = nil
	if r := l.engine.Apply(l.ctx(), responder, toApply(p), nil); r.Result != resultApplied {
		t.Errorf("when it is mended: %v", r.Error)
	}
	if text, err := get(true); err != nil || !strings.Contains(text, "aHVudGVyMg") {
		t.Errorf("%q, %v", text, err)
	}
	all := log.all()
	secret := all[len(all)-1]
	if secret.Kind != audit.Secret || secret.Actor.Person != "carol" || secret.Reason != "test" || secret.Objects[0].Key != "/registry/secrets/telemetry/s" {
		t.Errorf("the event of a reveal: %+v", secret)
	}
	if strings.Contains(fmt.Sprint(all), "hunter2") || strings.Contains(fmt.Sprint(all), "aHVudGVyMg") {
		t.Error("a secret is in the log")
	}
}

// TestStopOnRecord: who stopped an action is on record, unless nothing can be; it
// stops all the same.
func TestStopOnRecord(t *testing.T) {
	for _, broken := range []bool{false, true} {
		l := newLab(t, 1)
		for i := range 40 {
			l.put(&corev1.ConfigMap{ObjectMeta: labelled("a", fmt.Sprint("c", i), "x", "y")})
		}
		log := l.log
		l.engine.pace = Pace{PerSecond: 50, Most: 2}
		p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "a", "selector": "x=y"})
		if err != nil {
			t.Fatal(err)
		}
		var once sync.Once
		r := l.engine.Apply(l.ctx(), responder, toApply(p), func(*halliganv1.Progress) {
			once.Do(func() {
				log.mu.Lock()
				if broken {
					log.refuse = func(audit.Event) error { return errNoLog }
				}
				log.mu.Unlock()
				if err := l.engine.Stop(by("erin", trust.Commander), p.Id); err != nil {
					t.Error(err)
				}
				log.mu.Lock()
				log.refuse = nil
				log.mu.Unlock()
			})
		})
		if r.Result != resultPartial || r.Error.GetCode() != string(fault.Cancelled) {
			t.Fatalf("%s, %v", r.Result, r.Error)
		}
		var stops, outcomes int
		for _, e := range l.events(p.Id) {
			switch {
			case e.Action == trust.ActionStop && e.Kind == audit.Intent && e.Actor.Person == "erin":
				stops++
			case e.Action == "delete" && e.Kind == audit.Outcome && e.Text == "stopped by erin" && e.Outcome == resultPartial:
				outcomes++
			}
		}
		if outcomes != 1 || (stops == 1) == broken {
			t.Errorf("broken %v: %d stops, %d outcomes", broken, stops, outcomes)
		}
	}
}

// TestOutcomeIsOwed: an outcome that the log does not take is recorded when it does,
// by this process or by the next one, once.
func TestOutcomeIsOwed(t *testing.T) {
	for _, restart := range []bool{false, true} {
		l := newLab(t, 1)
		l.put(collector())
		log := l.log
		log.refuse = func(e audit.Event) error {
			if e.Kind == audit.Outcome {
				return errNoLog
			}
			return nil
		}
		p, err := l.plan("scale", stopCollector)
		if err != nil {
			t.Fatal(err)
		}
		r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
		if r.Result != resultApplied || r.Error.GetCode() != string(fault.AuditUnavailable) || len(l.events(p.Id)) != 1 {
			t.Fatalf("%v", r)
		}
		log.refuse = nil
		if restart {
			l.engine.journal.Close()
			l.start(nil)
		}
		l.recover(time.Second)
		events := l.events(p.Id)
		if len(events) != 2 || events[1].Kind != audit.Outcome || events[1].Of != events[0].ID || events[1].Outcome != resultApplied || events[1].Settled != restart ||
			events[1].Objects[0].RevisionAfter != r.Objects[0].RevisionAfter || events[1].Actor.Person != "alice" {
			t.Errorf("restart %v: %+v", restart, events)
		}
	}
}

// TestIntentsOfBefore: what the log says of a process that ended is completed, and
// nothing is made up.
func TestIntentsOfBefore(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	log := l.log
	old, _ := log.Append(l.ctx(), audit.Event{Kind: audit.Intent, Action: "scale", PlanID: "20260101-000000-gone"})
	log.events[old.Seq].Time = time.Now().Add(-100 * time.Hour)
	never, _ := log.Append(l.ctx(), audit.Event{Kind: audit.Intent, Action: "scale", PlanID: "20260102-000000-never"})
	panicked, _ := log.Append(l.ctx(), audit.Event{Kind: audit.Intent, Action: "scale", PlanID: "20260103-000000-panic"})
	_, _ = log.Append(l.ctx(), audit.Event{Kind: audit.Outcome, Of: panicked.ID, Outcome: resultUnknown, PlanID: "20260103-000000-panic"})
	held := audit.Event{Version: audit.Version, ID: "held-1", Kind: audit.Intent, Action: "delete", PlanID: "20260104-000000-held"}
	payload := fmt.Sprintf(`{"v":1,"id":%q,"kind":"intent","action":"delete","planId":%q,"time":%q}`, held.ID, held.PlanID, time.Now().Format(time.RFC3339))
	_, _ = log.Append(l.ctx(), audit.Event{Kind: audit.Adopted, Payload: payload})
	_, _ = log.Append(l.ctx(), audit.Event{Kind: audit.Read, Text: `"kind":"intent"`})
	done := l.do(resultApplied, "scale", stopCollector)
	before := len(log.all())
	l.engine.past, l.engine.closed, l.engine.told = log.past(), false, map[string]bool{}
	l.recover(time.Second)
	want := map[string]string{old.ID: resultUnknown, never.ID: notApplied, panicked.ID: notApplied, "held-1": notApplied}
	for _, e := range log.all()[before:] {
		if e.Kind != audit.Outcome || !e.Settled || e.Outcome != want[e.Of] {
			t.Errorf("%+v", e)
		}
		delete(want, e.Of)
	}
	if len(want) > 0 || len(l.events(done.Action)) != 2 {
		t.Errorf("left open: %v", want)
	}
	// Another process finds nothing more to say.
	before = len(log.all())
	l.engine.journal.Close()
	l.start(nil)
	l.recover(time.Second)
	if all := l.events(""); len(all) != before {
		t.Errorf("said again: %+v", all[before:])
	}
}

// TestStoppedBeforeTheEnd: that somebody has stopped an action is not its outcome, and
// that is told when it is found out.
func TestStoppedBeforeTheEnd(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	log := l.log
	intent, _ := log.Append(l.ctx(), audit.Event{Kind: audit.Intent, Action: p.Action, PlanID: p.Id})
	record, err := l.engine.journal.Begin(journal.Access{Intent: intent.ID}, p, 0)
	if err != nil {
		t.Fatal(err)
	}
	record.Release()
	stopped, _ := log.Append(l.ctx(), audit.Event{Kind: audit.Intent, Action: trust.ActionStop, PlanID: p.Id})
	_, _ = log.Append(l.ctx(), audit.Event{Kind: audit.Outcome, Of: stopped.ID, Action: trust.ActionStop, PlanID: p.Id, Outcome: "ok"})
	again, _ := log.Append(l.ctx(), audit.Event{Kind: audit.Intent, Action: trust.ActionStop, PlanID: p.Id})
	before := len(log.all())
	l.engine.past, l.engine.closed, l.engine.told = log.past(), false, map[string]bool{}
	for _, step := range []func(context.Context) error{func(ctx context.Context) error { return l.engine.closeIntents(ctx, nil) }, func(ctx context.Context) error { return l.engine.settleOne(ctx, p.Id) }, l.engine.pay} {
		if err := step(l.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]string{intent.ID: resultFailed, again.ID: resultUnknown}
	for _, e := range log.all()[before:] {
		if !e.Settled || e.Outcome != want[e.Of] {
			t.Errorf("%+v", e)
		}
		delete(want, e.Of)
	}
	if len(want) > 0 {
		t.Errorf("left open: %v", want)
	}
}

// TestSettledOfHeldIntent: what came of an action is recorded although only bastions
// have its intent.
func TestSettledOfHeldIntent(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	record, err := l.engine.journal.Begin(journal.Access{Intent: "held-1"}, p, 0)
	if err != nil {
		t.Fatal(err)
	}
	record.Release()
	l.engine.past, l.engine.closed, l.engine.told = l.log.past(), false, map[string]bool{}
	l.recover(time.Second)
	if all := l.events(p.Id); len(all) != 1 || all[0].Of != "held-1" || all[0].Outcome != resultFailed || !all[0].Settled {
		t.Errorf("%+v", all)
	}
}

// TestManyObjectsOnRecord: what does not fit into one event follows in others, and
// each object is there once.
func TestManyObjectsOnRecord(t *testing.T) {
	l := newLab(t, 1)
	l.real()
	const many = 700
	name := strings.Repeat("n", 120)
	for i := range many {
		l.put(&corev1.ConfigMap{ObjectMeta: labelled("a", fmt.Sprint(name, i), "x", "y")})
	}
	p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "a", "selector": "x=y"})
	if err != nil {
		t.Fatal(err)
	}
	if r := l.engine.Apply(l.ctx(), responder, toApply(p), nil); r.Result != resultApplied {
		t.Fatal(r.Error)
	}
	events := l.events(p.Id)
	seen := map[string]bool{}
	for i, e := range events[1:] {
		if last := i == len(events)-2; (e.Kind == audit.Outcome) != last || (e.Kind == audit.Objects) == last || e.Of != events[0].ID || e.ObjectCount != many {
			t.Errorf("event %d: %s of %s", i, e.Kind, e.Of)
		}
		for _, o := range e.Objects {
			if seen[o.Key] || o.Outcome != journal.Applied || o.RevisionAfter == 0 {
				t.Errorf("%+v", o)
			}
			seen[o.Key] = true
		}
	}
	if len(seen) != many || len(events) < 4 || len(events[0].Objects) == 0 || len(events[0].Objects) == many {
		t.Errorf("%d objects in %d events", len(seen), len(events))
	}
}

// TestSealedBesideTheEffect: nothing waits for the sealing before the effect, and its
// hash is in the outcome.
func TestSealedBesideTheEffect(t *testing.T) {
	l := newLab(t, 1)
	l.real()
	key := l.put(collector())
	var content []byte
	fails, waits := error(nil), true
	l.engine.sealed = func(id string, record io.Reader) (string, error) {
		for deadline := time.Now().Add(10 * time.Second); waits && !bytes.Contains(l.value(key), []byte("halligan")); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				return "", errors.New("the effect waits for the sealing")
			}
		}
		var err error
		if content, err = io.ReadAll(record); err != nil {
			return "", err
		}
		sum := sha256.Sum256(content)
		return hex.EncodeToString(sum[:]), fails
	}
	r := l.do(resultApplied, "scale", stopCollector)
	record, err := os.ReadFile(filepath.Join(l.dir, "actions", r.Action+".jsonl"))
	if err != nil || len(content) == 0 || !bytes.HasPrefix(record, content) || bytes.Count(content, []byte("\n")) != 2 {
		t.Errorf("sealed are %d bytes, %v", len(content), err)
	}
	events := l.events(r.Action)
	if sum := sha256.Sum256(content); len(events) != 2 || events[1].Images != hex.EncodeToString(sum[:]) {
		t.Errorf("%+v", events)
	}
	// Whatever the sealing does is none of the action's business.
	fails, waits = errors.New("no room"), false
	r = l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if events := l.events(r.Action); len(events) != 2 || events[1].Images != "" {
		t.Errorf("%+v", events)
	}
	l.engine.sealed = func(string, io.Reader) (string, error) { panic("a bug") }
	l.do(resultApplied, "scale", stopCollector)
	// Of many objects all images are in it.
	for i := range 40 {
		l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprint("c", i), "x", "y")})
	}
	l.engine.sealed = func(_ string, record io.Reader) (_ string, err error) {
		content, err = io.ReadAll(record)
		return "sum", err
	}
	r = l.do(resultApplied, "delete", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "x=y"})
	if n := bytes.Count(content, []byte(`"image":`)); n != 40 || l.events(r.Action)[1].Images != "sum" {
		t.Errorf("%d images", n)
	}
}

// TestRescueOnFullDisk: what is kept for a full disk is for people in a role that can
// act.
func TestRescueOnFullDisk(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	l.engine.journal.Close()
	dir := t.TempDir()
	if err := unix.Mount("halligan-test", dir, "tmpfs", 0, "size=20m,mode=0700"); err != nil {
		t.Fatalf("mounting a tmpfs (the tests run as root): %v", err)
	}
	l.dir = filepath.Join(dir, "state")
	l.start(nil)
	t.Cleanup(func() {
		l.engine.journal.Close()
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	l.recover(time.Second) // makes the slots
	free, _ := l.engine.journal.Space()
	if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, free-1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	machine := responder
	machine.Kind = trust.Automation
	for _, who := range []trust.Identity{machine, responder} {
		p, err := l.planAs(who, "scale", stopCollector)
		if err != nil {
			t.Fatal(err)
		}
		r := l.engine.Apply(l.ctx(), who, toApply(p), nil)
		if human := who.Kind == trust.Person; (r.Result == resultApplied) != human || !human && r.Error.GetCode() != string(fault.AuditUnavailable) {
			t.Errorf("%s: %v", who.Kind, r)
		}
	}
	if !bytes.Contains(l.value(key), []byte("halligan")) || l.engine.journal.Slots() != 15 {
		t.Errorf("%d slots", l.engine.journal.Slots())
	}
	if st, err := l.engine.Status(l.ctx(), responder); err != nil || st.StateSlots != 15 || !strings.HasPrefix(st.ReadOnly, "all but 15 small actions of responders and commanders") {
		t.Errorf("status: %v, %v", st, err)
	}
}

// recover runs Recover until all is settled, with a write that is not seen given up
// after the time.
func (l *lab) recover(settle time.Duration) {
	l.t.Helper()
	l.engine.settle = settle
	ctx, cancel := context.WithTimeout(l.ctx(), 20*time.Second)
	var done sync.WaitGroup
	done.Go(func() { l.engine.Recover(ctx) })
	defer done.Wait()
	defer cancel()
	if err := l.engine.Settled(ctx); err != nil {
		l.t.Fatal(err)
	}
	for l.engine.journal.Slots() == 0 && ctx.Err() == nil {
		time.Sleep(5 * time.Millisecond)
	}
}

// paired demands that each intent of the log has one outcome that is final, after it,
// and that there is no outcome of anything else.
func paired(t *testing.T, events []audit.Event) {
	t.Helper()
	final := map[string]int{}
	for _, e := range events {
		switch e.Kind {
		case audit.Intent:
			final[e.ID] = 0
		case audit.Outcome:
			n, ok := final[e.Of]
			if !ok || n > 0 {
				t.Errorf("outcome %s of %q, which has %d", e.Outcome, e.Of, n)
			}
			if e.Outcome != resultUnknown || e.Settled {
				final[e.Of]++
			}
		}
	}
	for id, n := range final {
		if n != 1 {
			i := slices.IndexFunc(events, func(e audit.Event) bool { return e.ID == id })
			t.Errorf("intent %s has %d outcomes: %+v", id, n, events[i])
		}
	}
}
