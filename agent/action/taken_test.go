package action

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/audit/sealed"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// pair is two engines on one etcd: one does, and what it sealed and logged is
// brought to the other. That the evidence holds is audit/sealed's to verify, and is
// taken for granted here.
type pair struct {
	*lab
	one, two *Engine
	oneLog   *lines
	sealed   string // folder
}

func newPair(t *testing.T) *pair {
	p := &pair{lab: newLab(t, 1), sealed: filepath.Join(t.TempDir(), "audit")}
	store, err := sealed.Open(sealed.Options{Dir: p.sealed, Server: "cp-1.prod", Bundle: func() *bundle.Bundle { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	p.options.Journal.Close()
	p.log = openLines(t, p.logFile)
	p.start(func(o *Options) { o.Cluster, o.Sealed = "prod", store.Seal })
	p.one, p.oneLog = p.engine, p.log
	p.dir, p.logFile = p.dir+"2", p.logFile+"2"
	p.start(func(o *Options) { o.Node, o.Cluster, o.Take = "cp-2", "prod", p.take })
	p.two = p.engine
	return p
}

// take returns what the evidence, which is the action's ID here, is of.
func (p *pair) take(e *halliganv1.SealedEvidence) (*sealed.Taken, error) {
	id := string(e.GetSealed())
	text, err := os.ReadFile(filepath.Join(p.sealed, "age-key"))
	if err != nil {
		return nil, err
	}
	keys, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	file, err := os.ReadFile(filepath.Join(p.sealed, "sealed", id+".age"))
	if err != nil {
		return nil, err
	}
	record, err := sealed.Read(bytes.NewReader(file), keys...)
	if err != nil {
		return nil, err
	}
	t := &sealed.Taken{Record: record, Met: true}
	for _, ev := range p.oneLog.of(id) {
		switch ev.Kind {
		case audit.Intent:
			t.Intent = ev
		case audit.Outcome:
			t.Outcome = ev
			fallthrough
		case audit.Objects:
			t.Objects = append(t.Objects, ev.Objects...)
		}
	}
	if sum := sha256.Sum256(file); t.Outcome.Images != hex.EncodeToString(sum[:]) {
		return nil, errors.New("the outcome does not have the hash")
	}
	return t, nil
}

// on makes one engine the lab's.
func (p *pair) on(e *Engine) *pair {
	p.engine = e
	return p
}

// undo plans it at the second one with evidence.
func (p *pair) undo(who trust.Identity, id string) (*halliganv1.Plan, error) {
	return p.two.Undo(p.ctx(), who, &halliganv1.UndoRequest{ActionId: id, Reason: "test", Evidence: &halliganv1.SealedEvidence{Sealed: []byte(id)}})
}

func (p *pair) apply(who trust.Identity, plan *halliganv1.Plan) {
	p.t.Helper()
	if r := p.two.Apply(p.ctx(), who, toApply(plan), nil); r.Result != resultApplied {
		p.t.Fatal(r.Result, r.Error)
	}
}

func (p *pair) refused(code fault.Code, text string, who trust.Identity, id string) {
	p.t.Helper()
	if _, err := p.undo(who, id); fault.CodeOf(err) != code || !strings.Contains(fmt.Sprint(err), text) {
		p.t.Errorf("%v (%s), want %s with %q", err, fault.CodeOf(err), code, text)
	}
}

// TestUndoOfALostNode: who did it takes it back at another node, with what was
// sealed, under the rules of every undo; the other node knows less, and so puts less
// back without a commander.
func TestUndoOfALostNode(t *testing.T) {
	p := newPair(t)
	key := p.put(collector())
	config := p.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "c"), Data: map[string]string{"a": "b"}})
	bytesOf := p.value(config)
	scaled := p.on(p.one).do(resultApplied, "scale", stopCollector).Action
	deleted := p.do(resultApplied, "delete", map[string]any{"target": "cm/c", "namespace": "telemetry"}).Action

	p.on(p.two).refuses(fault.NotFound, "no action", undoName, map[string]any{"action": scaled})
	p.refused(fault.Refused, "adds authority", by("bob", trust.Responder), scaled)
	p.two.now = func() time.Time { return time.Now().Add(25 * time.Hour) }
	p.refused(fault.Refused, "adds authority", responder, scaled)
	p.two.now = time.Now

	plan, err := p.undo(responder, scaled)
	if err != nil {
		t.Fatal(err)
	}
	if plan.Undoes != scaled || plan.Node != "cp-2" || plan.ApprovalsNeeded != 0 || !strings.Contains(strings.Join(plan.Warnings, "\n"), "done on cp-1.prod") {
		t.Errorf("%+v", plan)
	}
	p.apply(responder, plan)
	if selector := typedAt[appsv1.DaemonSet](p.lab, key).Spec.Template.Spec.NodeSelector; len(selector) != 1 {
		t.Errorf("it was not put back: %v", selector)
	}
	p.refused(fault.Stale, "taken back already", responder, scaled)
	// Its own undo is on record here, but not what that took back.
	p.refuses(fault.Refused, "has no record of, adds authority", undoName, map[string]any{"action": plan.Id})

	if plan, err = p.undo(responder, deleted); err != nil {
		t.Fatal(err)
	}
	p.apply(responder, plan)
	if !bytes.Equal(p.value(config), bytesOf) {
		t.Error("it is not what it was")
	}
}

// TestReplayedEvidence: that an action was taken back where it was done the other
// node cannot know; so what came back and was deleted by others stays so.
func TestReplayedEvidence(t *testing.T) {
	p := newPair(t)
	config := p.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "c")})
	deleted := p.on(p.one).do(resultApplied, "delete", map[string]any{"target": "cm/c", "namespace": "telemetry"}).Action
	p.do(resultApplied, undoName, map[string]any{"action": deleted})
	if plan, err := p.undo(responder, deleted); err != nil || len(plan.Objects) != 0 {
		t.Errorf("it is there: %v, %v", plan, err)
	}
	if _, err := p.raw.Delete(p.ctx(), config); err != nil {
		t.Fatal(err)
	}
	p.refused(fault.Stale, "was made again and deleted by somebody", responder, deleted)
	plan, err := p.undo(by("carol", trust.Commander), deleted)
	if err != nil || plan.ApprovalsNeeded == 0 || !plan.AddsAuthority {
		t.Errorf("a commander: %v, %v", plan, err)
	}
}

// TestStrangeEvidence: what does not fit together is not planned.
func TestStrangeEvidence(t *testing.T) {
	p := newPair(t)
	p.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "c"), Data: map[string]string{"a": "b"}})
	id := p.on(p.one).do(resultApplied, "delete", map[string]any{"target": "cm/c", "namespace": "telemetry"}).Action
	image := func(change func(m map[string]any)) func(*sealed.Taken) {
		return func(s *sealed.Taken) {
			var m map[string]any
			if err := json.Unmarshal(s.Images[0], &m); err != nil {
				t.Fatal(err)
			}
			change(m)
			s.Images[0], _ = json.Marshal(m)
		}
	}
	for name, c := range map[string]struct {
		change func(*sealed.Taken)
		code   fault.Code
		want   string
	}{
		"another value":   {image(func(m map[string]any) { m["value"] = []byte("x") }), fault.Refused, "does not have its hash"},
		"another key":     {image(func(m map[string]any) { m["key"] = "/registry/secrets/x/y" }), fault.Refused, "of no object of the plan"},
		"another index":   {image(func(m map[string]any) { m["index"] = 1 }), fault.Refused, "of no object of the plan"},
		"no image":        {func(s *sealed.Taken) { s.Images = nil }, "", ""},
		"another object":  {func(s *sealed.Taken) { s.Objects[0].Key = "/registry/secrets/x/y" }, fault.Refused, "not in the plan"},
		"not known":       {func(s *sealed.Taken) { s.Outcome.Outcome = resultUnknown }, fault.Refused, "does not tell what became"},
		"another cluster": {func(s *sealed.Taken) { s.Plan.Cluster = "beef" }, fault.Refused, "another cluster's etcd"},
		"another action":  {func(s *sealed.Taken) { s.Plan.Id = "20260101-000000-aaaaaaaa" }, fault.Usage, "the evidence is of"},
		"another person":  {func(s *sealed.Taken) { s.Intent.Actor.Person = "bob" }, fault.Refused, "the log says that bob did it"},
		"an automation":   {func(s *sealed.Taken) { s.Intent.Actor.Credential = string(trust.Automation) }, fault.Refused, "adds authority"},
		"long ago":        {func(s *sealed.Taken) { s.Intent.Time = time.Now().Add(-48 * time.Hour) }, fault.Refused, "adds authority"},
		"a log not met":   {func(s *sealed.Taken) { s.Met = false }, fault.Refused, "has not met"},
		"found out later": {func(s *sealed.Taken) { s.Outcome.Settled = true }, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			p.two.opens = func(e *halliganv1.SealedEvidence) (*sealed.Taken, error) {
				s, err := p.take(e)
				if err == nil {
					actor := *s.Intent.Actor
					s.Intent.Actor = &actor
					c.change(s)
				}
				return s, err
			}
			plan, err := p.undo(responder, id)
			if fault.CodeOf(err) != c.code || !strings.Contains(fmt.Sprint(err), c.want) && c.want != "" {
				t.Errorf("%v (%s), want %s with %q", err, fault.CodeOf(err), c.code, c.want)
			}
			if name == "no image" && len(plan.GetObjects()) != 0 {
				t.Error("planned without an image")
			}
		})
	}
	p.two.opens = nil
	p.refused(fault.Refused, "takes back no action of another node", responder, id)
}

// TestSealedWhenSettled: an action whose outcome is found out by a later process can
// be taken back elsewhere, too.
func TestSealedWhenSettled(t *testing.T) {
	p := newPair(t)
	key := p.put(collector())
	seal := p.one.sealed
	p.one.sealed = nil // as if it was killed before the outcome
	id := p.on(p.one).do(resultApplied, "scale", stopCollector).Action
	p.refused(fault.Failed, "no such file", responder, id)
	p.one.sealed = seal
	record, err := p.one.journal.Read(id)
	if err != nil {
		t.Fatal(err)
	}
	p.one.oweSettled(record, audit.ActorOf(responder))
	if err := p.one.pay(p.ctx()); err != nil {
		t.Fatal(err)
	}
	plan, err := p.undo(responder, id)
	if err != nil {
		t.Fatal(err)
	}
	p.apply(responder, plan)
	if selector := typedAt[appsv1.DaemonSet](p.lab, key).Spec.Template.Spec.NodeSelector; len(selector) != 1 {
		t.Errorf("it was not put back: %v", selector)
	}
}
