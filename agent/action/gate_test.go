package action

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// signed is a verifier that takes a token PERSON/KEY at its word.
type signed func(plan *halliganv1.Plan, who trust.Identity) error

func (s signed) Verify(tokens []string, plan *halliganv1.Plan, who trust.Identity) ([]Approved, error) {
	var out []Approved
	for _, t := range tokens {
		person, key, ok := strings.Cut(t, "/")
		if !ok {
			return nil, fault.New(fault.Refused, "ask for another", "the approval does not hold")
		}
		out = append(out, Approved{Person: person, Fingerprint: key, Serial: "1"})
	}
	if s != nil {
		return out, s(plan, who)
	}
	return out, nil
}

// under puts a policy in force, as a bundle of that version would.
func (l *lab) under(version uint64, rules trust.Rules) {
	l.t.Helper()
	p, err := trust.NewPolicy(rules)
	if err != nil {
		l.t.Fatal(err)
	}
	p.Version = version
	l.engine.policy = func() *trust.Policy { return p }
}

func (l *lab) planAs(who trust.Identity, verb string, values map[string]any) (*halliganv1.Plan, error) {
	return l.engine.Plan(l.ctx(), who, &halliganv1.PlanRequest{Action: verb, Parameters: parameters(l.t, values), Reason: "test"})
}

// apply demands the result, and a text in its error.
func (l *lab) apply(who trust.Identity, p *halliganv1.Plan, want, text string, alone bool, approvals ...string) *halliganv1.Result {
	l.t.Helper()
	req := toApply(p)
	req.Alone, req.Approvals = alone, approvals
	r := l.engine.Apply(l.ctx(), who, req, nil)
	if said := r.Error.GetMessage() + "; " + r.Error.GetNext(); r.Result != want || !strings.Contains(said, text) {
		l.t.Errorf("applied alone %v with %v: %s, %s; want %s, %q", alone, approvals, r.Result, said, want, text)
	}
	return r
}

var telemetryNeeds = []trust.ApprovalRule{{Namespaces: []string{"telemetry"}, Count: 2, Alone: true, Why: "it blinds us"}}

func TestApprovals(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	before := l.value(key)
	l.under(7, trust.Rules{Approvals: telemetryNeeds})
	l.engine.name = "prod"
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	if p.ApprovalsNeeded != 2 || p.ApprovalReason != "it blinds us" || !p.AloneAllowed || p.AddsAuthority || len(p.Nonce) != 32 ||
		p.ClusterName != "prod" || p.PolicyVersion != 7 || p.Expires.AsTime().Sub(p.Created.AsTime()) != time.Hour {
		t.Errorf("%v", p)
	}
	// Without a verifier nobody can approve, and without approvals one waits.
	l.apply(responder, p, resultAwaiting, "needs 2 approvals by other people and has 0: it blinds us", false)
	r := l.apply(responder, p, resultAwaiting, fmt.Sprintf("halligan approve --node cp-1 %s; then run: halligan apply %s --approval FILE, or --alone", p.Id, p.Id), false)
	if r.Error.Code != string(fault.AwaitingApproval) || r.Plan.GetId() != p.Id {
		t.Errorf("%v", r)
	}
	l.apply(responder, p, resultRefused, "without a bundle", false, "bob/k1", "eve/k2")

	var seen []string
	l.engine.approvals = signed(func(plan *halliganv1.Plan, who trust.Identity) error {
		seen = append(seen, plan.Id+" "+plan.Sha256+" "+who.Person)
		plan.Nonce = "a verifier has its own copy"
		return nil
	})
	for _, tokens := range [][]string{{"bob/k1"}, {"bob/k1", "bob/k2"}, {"bob/k1", "eve/k1"}, {"bob/k1", "alice/k2"}, {"bob/k1", "eve/SHA256:alice"}, {"bob/k1", "/k2"}, {"bob/k1", "eve/"}} {
		l.apply(responder, p, resultAwaiting, "has 1", false, tokens...)
	}
	l.apply(responder, p, resultRefused, "does not hold", false, "bob/k1", "garbage")
	l.apply(responder, p, resultFailed, "with approvals nobody is alone", true, "bob/k1", "eve/k2")
	l.apply(by("bob", trust.Responder), p, resultRefused, "was made by alice", false, "bob/k1", "eve/k2")
	if !bytes.Equal(l.value(key), before) || l.records() != 0 {
		t.Fatalf("something happened without approvals: %d records", l.records())
	}

	// Who may look at it meanwhile.
	approver := by("bob", trust.Approver)
	for _, c := range []struct {
		who  trust.Identity
		want fault.Code
	}{
		{responder, ""}, {approver, ""}, {by("dave", trust.Responder), fault.NotFound}, {by("carol", trust.Commander), fault.NotFound}, {by("alice", trust.None), fault.Refused},
	} {
		if got, err := l.engine.ShowPlan(l.ctx(), c.who, p.Id); fault.CodeOf(err) != c.want || err == nil && got.Sha256 != p.Sha256 {
			t.Errorf("%s as %s sees %v, %v", c.who.Person, c.who.Role, got, err)
		}
	}
	narrow := approver
	narrow.Scope.Namespaces = []string{"shop"}
	if _, err := l.engine.ShowPlan(l.ctx(), narrow, p.Id); !fault.Is(err, fault.Refused) {
		t.Errorf("an approver for another namespace: %v", err)
	}
	if _, err := l.engine.ShowPlan(l.ctx(), approver, p.Id[:12]); !fault.Is(err, fault.NotFound) {
		t.Errorf("a part of an ID: %v", err)
	}
	// An approver does nothing else.
	if st, err := l.engine.Status(l.ctx(), approver); err != nil || st.Role != "approver" || st.Cluster != "prod" {
		t.Errorf("%v, %v", st, err)
	}
	_, planned := l.planAs(approver, "scale", stopCollector)
	_, got := l.engine.Get(l.ctx(), approver, nil, nil)
	for _, err := range []error{planned, got, l.engine.History(l.ctx(), approver, &halliganv1.HistoryRequest{}, nil), l.engine.Stop(approver, p.Id)} {
		if !fault.Is(err, fault.Refused) {
			t.Errorf("an approver did more: %v", err)
		}
	}

	l.apply(responder, p, resultApplied, "", false, "bob/k1", "eve/k2")
	if bytes.Equal(l.value(key), before) || !slices.Contains(seen, p.Id+" "+p.Sha256+" alice") {
		t.Errorf("not applied as approved: %v", seen)
	}
	l.apply(responder, p, resultStale, "was applied already", false, "bob/k1", "eve/k2")
	var entry *halliganv1.HistoryEntry
	if err := l.engine.History(l.ctx(), responder, &halliganv1.HistoryRequest{ActionId: p.Id}, func(h *halliganv1.HistoryEntry) error { entry = h; return nil }); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(entry.ApprovedBy, []string{"bob", "eve"}) || entry.Alone || entry.Door != "ssh" || entry.Source != "192.0.2.7:4242" || entry.Credential != "person, SHA256:alice, serial 7" {
		t.Errorf("history: %v", entry)
	}
	record, err := l.engine.journal.Read(p.Id)
	if err != nil || record.Nonce != p.Nonce || len(record.ApprovedBy) != 2 {
		t.Errorf("record: %+v, %v", record, err)
	}
}

// TestApprovalEndsMeanwhile: what was good when the application began is looked
// at again before the intent is written.
func TestApprovalEndsMeanwhile(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	before := l.value(key)
	l.under(7, trust.Rules{Approvals: telemetryNeeds})
	calls := 0
	l.engine.approvals = signed(func(*halliganv1.Plan, trust.Identity) error {
		if calls++; calls > 1 {
			return fault.New(fault.Refused, "ask for another", "the certificate of bob was revoked")
		}
		return nil
	})
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	l.apply(responder, p, resultRefused, "was revoked", false, "bob/k1", "eve/k2")
	if !bytes.Equal(l.value(key), before) || l.records() != 0 || calls != 2 {
		t.Errorf("%d calls, %d records", calls, l.records())
	}
}

func TestAlone(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	before := l.value(key)
	var alarms []alarm.Event
	l.engine.alarm = func(e alarm.Event) {
		if !bytes.Equal(l.value(key), before) {
			t.Error("the alarm comes after the effect")
		}
		alarms = append(alarms, e)
	}
	l.under(7, trust.Rules{Approvals: telemetryNeeds, AloneCaps: trust.Caps{ObjectsPerAction: 2, ObjectsPerHour: 3}})
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	r := l.apply(responder, p, resultApplied, "", true)
	if len(alarms) != 1 || alarms[0].Kind != alarm.Alone || alarms[0].Person != "alice" || !strings.Contains(alarms[0].Text, p.Id) || !strings.Contains(alarms[0].Text, "it blinds us") {
		t.Errorf("alarms: %v", alarms)
	}
	var entries []*halliganv1.HistoryEntry
	if err := l.engine.History(l.ctx(), responder, &halliganv1.HistoryRequest{}, func(h *halliganv1.HistoryEntry) error { entries = append(entries, h); return nil }); err != nil || len(entries) != 1 || !entries[0].Alone {
		t.Errorf("%v, %v", entries, err)
	}
	// Taking it back is in the same namespace, and an undo of one's own.
	p, err = l.plan("undo", map[string]any{"action": r.Action})
	if err != nil {
		t.Fatal(err)
	}
	l.engine.alarm = func(e alarm.Event) { alarms = append(alarms, e) }
	l.apply(responder, p, resultApplied, "", true)

	// Caps for one who is alone, of an action and of an hour.
	for i := range 5 {
		l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprint("c", i), "n"+fmt.Sprint(min(i, 2)), "", "all", "")})
	}
	three := map[string]any{"target": "cm", "namespace": "telemetry", "selector": "n2"}
	if p, err = l.plan("delete", three); err != nil || p.AloneAllowed {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(responder, p, resultRefused, "at most 2 objects", true)
	for _, n := range []string{"n0", "n1"} {
		if p, err = l.plan("delete", map[string]any{"target": "cm", "namespace": "telemetry", "selector": n}); err != nil {
			t.Fatal(err)
		}
		l.apply(responder, p, resultApplied, "", true)
	}
	l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "c9", "n9", "")})
	if p, err = l.plan("delete", map[string]any{"target": "cm/c9", "namespace": "telemetry"}); err != nil {
		t.Fatal(err)
	}
	l.apply(responder, p, resultRefused, "the cap of 3", true)
	n := len(alarms)
	l.engine.approvals = signed(nil)
	l.apply(responder, p, resultApplied, "", false, "bob/k1", "eve/k2") // with others the cap is the usual one
	if len(alarms) != n {
		t.Errorf("an alarm for what others approved: %v", alarms[n:])
	}

	// A rule that does not allow it, and a machine.
	l.under(8, trust.Rules{Approvals: []trust.ApprovalRule{{Actions: []string{"delete"}, Count: 1, Why: "two pairs of eyes"}}})
	if p, err = l.plan("delete", three); err != nil || p.AloneAllowed {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(responder, p, resultRefused, "lets nobody do this alone: two pairs of eyes", true)
	l.under(9, trust.Rules{Approvals: telemetryNeeds})
	robot := by("ci", trust.Responder)
	robot.Kind = trust.Automation
	if p, err = l.planAs(robot, "scale", stopCollector); err != nil || p.AloneAllowed {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(robot, p, resultRefused, "alone", true)
	// Nor does it go alone with the plan of the person whose name it has.
	if p, err = l.plan("scale", stopCollector); err != nil || !p.AloneAllowed {
		t.Fatalf("%v, %v", p, err)
	}
	robot.Person = responder.Person
	l.apply(robot, p, resultRefused, "with this credential nobody goes alone", true)
	if p, err = l.planAs(responder, "scale", map[string]any{"target": "cm/x", "namespace": "telemetry"}); err == nil {
		t.Errorf("%v", p)
	}
}

// TestStaleBundle: past the time of its bundle an agent wants a second person,
// or one who says to be alone; it locks nobody out, and reads go on.
func TestStaleBundle(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	fresh := true
	l.engine.fresh = func() bool { return fresh }
	l.engine.approvals = signed(nil)
	old, err := l.plan("scale", stopCollector)
	if err != nil || old.ApprovalsNeeded != 0 {
		t.Fatalf("%v, %v", old, err)
	}
	fresh = false
	l.apply(responder, old, resultStale, "plan again", false)
	p, err := l.plan("scale", stopCollector)
	if err != nil || p.ApprovalsNeeded != 1 || !p.AloneAllowed || !strings.Contains(p.ApprovalReason, "stale") {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(responder, p, resultAwaiting, "stale", false)
	if _, err := l.engine.Get(l.ctx(), responder, &halliganv1.GetRequest{Parameters: parameters(t, map[string]any{"target": "ds/collector", "namespace": "telemetry"}), Reason: "test"}, func(*halliganv1.Object) error { return nil }); err != nil {
		t.Error(err)
	}
	r := l.apply(responder, p, resultApplied, "", true)
	if p, err = l.plan("undo", map[string]any{"action": r.Action}); err != nil || p.ApprovalsNeeded != 1 || p.AddsAuthority {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(responder, p, resultApplied, "", false, "bob/k1")
}

// TestDecidedAgain: what changed between the plan and its application counts.
func TestDecidedAgain(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	l.under(7, trust.Rules{})
	p, err := l.plan("scale", stopCollector)
	if err != nil {
		t.Fatal(err)
	}
	narrow := responder
	for _, scope := range []trust.Scope{{Namespaces: []string{"shop"}}, {Actions: []string{"get"}}, {Nodes: []string{"cp-2"}}, {Drill: true}} {
		narrow.Scope = scope
		l.apply(narrow, p, resultRefused, "the credential of alice is for "+scope.String(), false)
		if _, err := l.planAs(narrow, "scale", stopCollector); !fault.Is(err, fault.Refused) {
			t.Errorf("planned with %s: %v", scope, err)
		}
	}
	narrow.Scope = trust.Scope{Namespaces: []string{"shop"}}
	for target, namespace := range map[string]string{"ds/collector": "telemetry", "ds": "telemetry", "nodes": ""} {
		if _, err := l.engine.Get(l.ctx(), narrow, &halliganv1.GetRequest{Parameters: parameters(t, map[string]any{"target": target, "namespace": namespace}), Reason: "test"}, nil); !fault.Is(err, fault.Refused) {
			t.Errorf("get %s with a credential for another namespace: %v", target, err)
		}
	}
	console := responder
	console.Door, console.Role = trust.Console, trust.Commander
	if _, err := l.planAs(console, "scale", stopCollector); !fault.Is(err, fault.Refused) {
		t.Errorf("a commander at the console: %v", err)
	}
	l.under(8, trust.Rules{Protect: []trust.Rule{{Namespaces: []string{"telemetry"}, Why: "since today"}}})
	l.apply(responder, p, resultStale, "policy 8 is in force", false)
	l.under(7, trust.Rules{Actions: map[string]trust.ActionRule{"scale": {Role: "commander"}}})
	l.apply(responder, p, resultRefused, "needs the role commander", false)
	for _, a := range l.engine.Describe() {
		if want := map[string]string{"scale": "commander", "delete": "responder", "get": "observer"}[a.Name]; want != "" && a.Role != want {
			t.Errorf("%s is described for the role %s", a.Name, a.Role)
		}
	}
	l.under(7, trust.Rules{})
	r := l.apply(responder, p, resultApplied, "", false)

	// A narrowed credential recalls its own deeds only.
	for who, want := range map[string]int{"dave": 0, "alice": 1} {
		id, n := by(who, trust.Observer), 0
		id.Scope.Namespaces = []string{"telemetry"}
		if err := l.engine.History(l.ctx(), id, &halliganv1.HistoryRequest{}, func(*halliganv1.HistoryEntry) error { n++; return nil }); err != nil || n != want {
			t.Errorf("%s recalls %d deeds, %v", who, n, err)
		}
		err := l.engine.History(l.ctx(), id, &halliganv1.HistoryRequest{ActionId: r.Action}, func(*halliganv1.HistoryEntry) error { return nil })
		if (err == nil) != (want == 1) || err != nil && !fault.Is(err, fault.Refused) {
			t.Errorf("%s recalls %s: %v", who, r.Action, err)
		}
	}
}

// TestUndoAddsAuthority: whoever did it takes it back within a day; all else is
// for a commander whom somebody else approves, and never for one alone.
func TestUndoAddsAuthority(t *testing.T) {
	l := newLab(t, 1)
	now := time.Now()
	l.engine.now = func() time.Time { return now }
	l.engine.approvals = signed(nil)
	carol := by("carol", trust.Commander)
	scaled := l.put(collector())
	bound := l.put(binding("collector", account("telemetry", "collector"), user("bob")))
	for name, c := range map[string]struct {
		key, verb  string
		parameters map[string]any
	}{
		"scale":  {scaled, "scale", stopCollector},
		"revoke": {bound, "revoke", map[string]any{"subject": "system:serviceaccount:telemetry:collector"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := sansGeneration(t, l.value(c.key))
			r := l.do(resultApplied, c.verb, c.parameters)
			undo := map[string]any{"action": r.Action}
			if p, err := l.plan("undo", undo); err != nil || p.AddsAuthority || p.ApprovalsNeeded != 0 {
				t.Errorf("one's own: %v, %v", p, err)
			}
			refused := func(who trust.Identity, what string) {
				t.Helper()
				if _, err := l.planAs(who, "undo", undo); !fault.Is(err, fault.Refused) || !strings.Contains(err.Error(), "adds authority") {
					t.Errorf("%s: %v", what, err)
				}
			}
			refused(by("dave", trust.Responder), "another responder")
			robot := responder
			robot.Kind = trust.Automation
			refused(robot, "automation of the same name")
			now = now.Add(undoOwn + time.Minute)
			refused(responder, "one's own, a day later")
			p, err := l.planAs(carol, "undo", undo)
			if err != nil || !p.AddsAuthority || p.ApprovalsNeeded != 1 || p.AloneAllowed || !strings.Contains(strings.Join(p.Warnings, "\n"), "which alice did") {
				t.Fatalf("a commander: %v, %v", p, err)
			}
			l.apply(carol, p, resultAwaiting, "adds authority", false)
			l.apply(carol, p, resultRefused, "lets nobody do this alone", true)
			l.apply(carol, p, resultAwaiting, "has 0", false, "carol/k1")
			if sansGeneration(t, l.value(c.key)) == before {
				t.Fatal("it was taken back all the same")
			}
			l.apply(carol, p, resultApplied, "", false, "bob/k1")
			if sansGeneration(t, l.value(c.key)) != before {
				t.Errorf("%q, was %q", l.value(c.key), before)
			}
		})
	}
}

// TestUndoShowsWhatItGives: who approves that a binding comes back sees for whom
// and to what, which is nowhere else any more.
func TestUndoShowsWhatItGives(t *testing.T) {
	l := newLab(t, 1)
	many := make([]rbacv1.Subject, 0, 64)
	for i := range 64 {
		many = append(many, user(fmt.Sprint("user-", i)))
	}
	l.put(binding("collector", append(many, account("telemetry", "evil"))...))
	l.put(&rbacv1.ClusterRole{ObjectMeta: labelled("", "collector", "rbac.authorization.k8s.io/aggregate-to-admin", "true"), Rules: []rbacv1.PolicyRule{{Verbs: []string{"*"}, APIGroups: []string{"*"}, Resources: []string{"*"}}}})
	for target, want := range map[string]string{
		"clusterrolebinding/collector": `roleRef: {"apiGroup":"rbac.authorization.k8s.io","kind":"ClusterRole","name":"collector"}` + "\n" + `subjects[0]: {"kind":"User"`,
		"clusterrole/collector":        `rules[0]: {"verbs":["*"],"apiGroups":["*"],"resources":["*"]}`,
	} {
		r := l.do(resultApplied, "delete", map[string]any{"target": target})
		p, err := l.planAs(by("carol", trust.Commander), "undo", map[string]any{"action": r.Action})
		if err != nil || !p.AddsAuthority || len(p.Objects) != 1 {
			t.Fatalf("%v, %v", p, err)
		}
		var shown []string
		for _, c := range p.Objects[0].Changes {
			shown = append(shown, c.Path+": "+c.After)
		}
		all := strings.Join(shown, "\n")
		if !strings.Contains(all, want) || strings.Contains(target, "binding") != strings.Contains(all, `subjects[64]: {"kind":"ServiceAccount","name":"evil","namespace":"telemetry"}`) ||
			strings.Contains(target, "role/") != strings.Contains(all, "metadata.labels: {") {
			t.Errorf("%s shows %s", target, all)
		}
		l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	}
}

// TestUndoShowsPods: who approves that a workload comes back sees what it runs, and
// as whom; rights come first, and all of it is bounded.
func TestUndoShowsPods(t *testing.T) {
	l := newLab(t, 1)
	pod := corev1.PodSpec{ServiceAccountName: "cluster-admin", HostPID: true, Containers: []corev1.Container{{Name: "c", Image: "evil:1", SecurityContext: &corev1.SecurityContext{Privileged: ptr(true)}}}}
	template := corev1.PodTemplateSpec{Spec: pod}
	l.put(&appsv1.Deployment{ObjectMeta: labelled("shop", "web"), Spec: appsv1.DeploymentSpec{Template: template}})
	l.put(&batchv1.CronJob{ObjectMeta: labelled("shop", "night"), Spec: batchv1.CronJobSpec{JobTemplate: batchv1.JobTemplateSpec{Spec: batchv1.JobSpec{Template: template}}}})
	l.put(&corev1.Pod{ObjectMeta: labelled("shop", "bare"), Spec: pod})
	l.put(&corev1.ConfigMap{ObjectMeta: labelled("shop", "plain"), Data: map[string]string{"a": "b"}})
	carol := by("carol", trust.Commander)
	shown := func(p *halliganv1.Plan) string {
		var lines []string
		for _, c := range p.Objects[0].Changes {
			lines = append(lines, c.Path+": "+c.After)
		}
		return strings.Join(lines, "\n")
	}
	for target, at := range map[string]string{"deploy/web": "spec.template.spec", "cj/night": "spec.jobTemplate.spec.template.spec", "pod/bare": "spec", "cm/plain": ""} {
		undo := map[string]any{"action": l.do(resultApplied, "delete", map[string]any{"target": target, "namespace": "shop"}).Action}
		p, err := l.plan("undo", undo)
		if err != nil || len(p.Objects) != 1 || len(p.Objects[0].Changes) != 0 {
			t.Fatalf("one's own: %v, %v", p, err)
		}
		if p, err = l.planAs(carol, "undo", undo); err != nil || !p.AddsAuthority || len(p.Objects) != 1 {
			t.Fatalf("%v, %v", p, err)
		}
		all := shown(p)
		if at == "" {
			if all != "" {
				t.Error(all)
			}
			continue
		}
		for _, want := range []string{at + `.serviceAccountName: "cluster-admin"`, at + ".hostPID: true", at + `.containers[0]: {`, `"image":"evil:1"`, `"privileged":true`} {
			if !strings.Contains(all, want) {
				t.Errorf("%s: no %s in\n%s", target, want, all)
			}
		}
	}
	// Too much is not shown, which is said.
	for i := range 4 {
		big := template.DeepCopy()
		big.Annotations = map[string]string{"a": strings.Repeat("x", 100<<10)}
		l.put(&appsv1.Deployment{ObjectMeta: labelled("shop", fmt.Sprint("big-", i), "size", "big"), Spec: appsv1.DeploymentSpec{Template: *big}})
	}
	r := l.do(resultApplied, "delete", map[string]any{"target": "deploy", "namespace": "shop", "selector": "size=big"})
	p, err := l.planAs(carol, "undo", map[string]any{"action": r.Action})
	if err != nil || !strings.Contains(strings.Join(p.Warnings, "\n"), "not all that this gives is shown") {
		t.Fatalf("%v, %v", p, err)
	}
	size := 0
	for _, o := range p.Objects {
		for _, c := range o.Changes {
			size += len(c.Path) + len(c.After)
		}
	}
	if size > maxGiven || len(p.Objects) != 4 {
		t.Errorf("%d bytes of %d objects", size, len(p.Objects))
	}
}

// TestUndoOfWhatCameAndWent: the binding that one took away may have been made
// again and deleted by somebody else, before or after the undo was planned. To put
// it back is for a commander then, with an approval; also where etcd forgot.
func TestUndoOfWhatCameAndWent(t *testing.T) {
	l := newLab(t, 1)
	l.engine.approvals = signed(nil)
	key := l.put(binding("collector", account("telemetry", "collector")))
	before := l.value(key)
	remove := map[string]any{"target": "clusterrolebinding/collector"}
	comeAndGo := func() {
		t.Helper()
		l.putRaw(key, before)
		if _, err := l.raw.Delete(l.ctx(), key); err != nil {
			t.Fatal(err)
		}
	}
	undo := map[string]any{"action": l.do(resultApplied, "delete", remove).Action}
	p, err := l.plan("undo", undo)
	if err != nil || p.AddsAuthority {
		t.Fatalf("%v, %v", p, err)
	}
	comeAndGo()
	l.apply(responder, p, resultStale, "made again and deleted since the plan", false)
	l.refuses(fault.Stale, "a commander can take it back", "undo", undo)
	carol := by("carol", trust.Commander)
	first := undo
	if p, err = l.planAs(carol, "undo", undo); err != nil || p.ApprovalsNeeded != 1 {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(carol, p, resultApplied, "", false, "bob/k1")

	// A commander's own, of which etcd tells nothing any more.
	if p, err = l.planAs(carol, "delete", remove); err != nil {
		t.Fatal(err)
	}
	undo = map[string]any{"action": l.apply(carol, p, resultApplied, "", false).Action}
	l.compact(unseen)
	if p, err = l.planAs(carol, "undo", undo); err != nil || !p.AddsAuthority || p.ApprovalsNeeded != 1 || !strings.Contains(strings.Join(p.Warnings, "\n"), "etcd's history was compacted before this agent looked") {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(carol, p, resultAwaiting, "adds authority", false)
	l.apply(carol, p, resultApplied, "", false, "bob/k1")
	if !bytes.Equal(l.value(key), before) {
		t.Error("it is not as it was")
	}
	l.refuses(fault.Stale, "taken back already", "undo", first)
}

// TestDeletingWhatForbids is allowed, told, and held to the rule that asks for a
// second person.
func TestDeletingWhatForbids(t *testing.T) {
	l := newLab(t, 1)
	l.put(&corev1.ResourceQuota{ObjectMeta: labelled("shop", "q")})
	remove := map[string]any{"target": "quota/q", "namespace": "shop"}
	p, err := l.plan("delete", remove)
	if err != nil || p.ApprovalsNeeded != 0 || !strings.Contains(strings.Join(p.Objects[0].Warnings, "\n"), "is allowed once it is gone") {
		t.Fatalf("%v, %v", p, err)
	}
	l.under(7, trust.Rules{Approvals: []trust.ApprovalRule{{Actions: []string{"delete"}, Resources: []string{"resourcequotas"}, Count: 1, Alone: true, Why: "what it forbids would be allowed"}}})
	if p, err = l.plan("delete", remove); err != nil || p.ApprovalsNeeded != 1 || !p.AloneAllowed {
		t.Fatalf("%v, %v", p, err)
	}
}

// TestKeptServiceAccount: what revoke refuses, deleting the ServiceAccount does not
// get either.
func TestKeptServiceAccount(t *testing.T) {
	l := newLab(t, 1)
	l.under(7, trust.Rules{KeepSubjects: []trust.SubjectRule{{Subjects: []string{"system:serviceaccount:ops:*"}, Why: "they run the cluster"}}})
	for _, ns := range []string{"ops", "shop"} {
		l.put(&corev1.ServiceAccount{ObjectMeta: labelled(ns, "robot", "app", "robot")})
	}
	l.refuses(fault.Refused, "they run the cluster", "revoke", map[string]any{"subject": "system:serviceaccount:ops:robot"})
	l.refuses(fault.Refused, "they run the cluster", "delete", map[string]any{"target": "sa/robot", "namespace": "ops"})
	l.refuses(fault.Refused, "they run the cluster", "delete", map[string]any{"target": "sa", "allNamespaces": true, "selector": "app=robot"})
	l.do(resultApplied, "delete", map[string]any{"target": "sa/robot", "namespace": "shop"})
}

// TestDoingItAgain: an approval is used once. Taking back that something was taken
// back does it again, and needs what the first time needed.
func TestDoingItAgain(t *testing.T) {
	l := newLab(t, 1)
	l.engine.approvals = signed(nil)
	l.put(collector())
	l.put(&corev1.ConfigMap{ObjectMeta: labelled("shop", "c")})
	for _, c := range []struct {
		verb string
		par  map[string]any
	}{{"scale", stopCollector}, {"delete", map[string]any{"target": "cm/c", "namespace": "shop"}}} {
		l.under(7, trust.Rules{Approvals: []trust.ApprovalRule{{Actions: []string{c.verb}, Count: 1, Why: "two pairs of eyes"}}})
		id, needs := "", []uint32{1, 0, 1, 0}
		for i, want := range needs {
			verb, par := c.verb, c.par
			if i > 0 {
				verb, par = "undo", map[string]any{"action": id}
			}
			p, err := l.plan(verb, par)
			if err != nil || p.ApprovalsNeeded != want || p.AddsAuthority {
				t.Fatalf("%s, step %d: %v, %v", c.verb, i, p, err)
			}
			var approvals []string
			if want > 0 {
				l.apply(responder, p, resultAwaiting, "two pairs of eyes", false)
				approvals = []string{"bob/k1"}
			}
			id = l.apply(responder, p, resultApplied, "", false, approvals...).Action
		}
		// Step 3 took the second doing back; for whom the verb is no more, so is that.
		l.under(7, trust.Rules{Actions: map[string]trust.ActionRule{c.verb: {Role: "commander"}}})
		l.refuses(fault.Refused, "needs the role commander", "undo", map[string]any{"action": id})
	}
}
