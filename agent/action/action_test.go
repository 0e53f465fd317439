package action

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/halligan-io/halligan/agent/storage"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

func TestScaleEveryKindAndUndo(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	l.put(&appsv1.Deployment{ObjectMeta: labelled("shop", "web"), Spec: appsv1.DeploymentSpec{Replicas: ptr(int32(3))}})
	l.put(&appsv1.StatefulSet{ObjectMeta: labelled("shop", "db"), Spec: appsv1.StatefulSetSpec{Replicas: ptr(int32(2))}})
	l.put(&appsv1.ReplicaSet{ObjectMeta: labelled("shop", "rs"), Spec: appsv1.ReplicaSetSpec{}}) // replicas absent: 1
	l.put(&corev1.ReplicationController{ObjectMeta: labelled("shop", "rc"), Spec: corev1.ReplicationControllerSpec{Replicas: ptr(int32(4))}})
	l.put(&batchv1.Job{ObjectMeta: labelled("shop", "job")})
	l.put(&batchv1.CronJob{ObjectMeta: labelled("shop", "cron"), Spec: batchv1.CronJobSpec{Suspend: ptr(false)}})
	l.putRaw("/registry/apiextensions.k8s.io/customresourcedefinitions/crontabs.stable.example.com", []byte(crontabs))
	l.putRaw("/registry/stable.example.com/crontabs/shop/ct", []byte(`{"apiVersion":"stable.example.com/v1","kind":"CronTab","metadata":{"name":"ct","namespace":"shop","uid":"u-ct","generation":1},"spec":{"z":1.50,"size":7,"big":12345678901234567890},"unknown":{"b":1,"a":2}}`))

	const shop = "/registry/"
	for _, c := range []struct {
		target, namespace string
		to                int
		key               string
		check             func(key string) bool
	}{
		{"ds/collector", "telemetry", 0, shop + "daemonsets/telemetry/collector", func(k string) bool {
			return typedAt[appsv1.DaemonSet](l, k).Spec.Template.Spec.NodeSelector[storage.StopLabel] == "true"
		}},
		{"deploy/web", "shop", 0, shop + "deployments/shop/web", func(k string) bool { return *typedAt[appsv1.Deployment](l, k).Spec.Replicas == 0 }},
		{"statefulsets.apps/db", "shop", 5, shop + "statefulsets/shop/db", func(k string) bool { return *typedAt[appsv1.StatefulSet](l, k).Spec.Replicas == 5 }},
		{"rs/rs", "shop", 0, shop + "replicasets/shop/rs", func(k string) bool { return *typedAt[appsv1.ReplicaSet](l, k).Spec.Replicas == 0 }},
		{"rc/rc", "shop", 1, shop + "controllers/shop/rc", func(k string) bool { return *typedAt[corev1.ReplicationController](l, k).Spec.Replicas == 1 }},
		{"job/job", "shop", 0, shop + "jobs/shop/job", func(k string) bool { return *typedAt[batchv1.Job](l, k).Spec.Suspend }},
		{"cj/cron", "shop", 0, shop + "cronjobs/shop/cron", func(k string) bool { return *typedAt[batchv1.CronJob](l, k).Spec.Suspend }},
		{"ct/ct", "shop", 0, shop + "stable.example.com/crontabs/shop/ct", func(k string) bool {
			return string(l.value(k)) == `{"apiVersion":"stable.example.com/v1","kind":"CronTab","metadata":{"name":"ct","namespace":"shop","uid":"u-ct","generation":2},"spec":{"z":1.50,"size":0,"big":12345678901234567890},"unknown":{"b":1,"a":2}}`
		}},
	} {
		t.Run(strings.ReplaceAll(c.target, "/", "-"), func(t *testing.T) {
			before := l.value(c.key)
			r := l.do(resultApplied, "scale", map[string]any{"target": c.target, "namespace": c.namespace, "to": c.to})
			if !c.check(c.key) {
				t.Fatalf("not scaled: %q", l.value(c.key))
			}
			o := r.Objects[0]
			if o.Key != c.key || o.RevisionAfter <= o.RevisionBefore || o.Outcome != "applied" {
				t.Errorf("object result %v", o)
			}
			// Again is nothing to do, and leaves no record.
			n := l.records()
			if again := l.do(resultApplied, "scale", map[string]any{"target": c.target, "namespace": c.namespace, "to": c.to}); len(again.Objects) != 0 || l.records() != n {
				t.Errorf("scaling twice did %v", again)
			}
			u := l.do(resultApplied, "undo", map[string]any{"action": r.Action})
			if u.Plan.Undoes != r.Action {
				t.Errorf("undo of %s undoes %q", r.Action, u.Plan.Undoes)
			}
			if after := l.value(c.key); sansGeneration(t, before) != sansGeneration(t, after) {
				t.Errorf("undo left\n%q, was\n%q", after, before)
			}
			l.refuses(fault.Stale, "taken back already", "undo", map[string]any{"action": r.Action})
		})
	}
	l.refuses(fault.Usage, "has no replicas", "scale", map[string]any{"target": "ds/collector", "namespace": "telemetry", "to": 2})
	l.refuses(fault.Usage, "cannot be scaled", "scale", map[string]any{"target": "crd/crontabs.stable.example.com", "to": 2})
}

// sansGeneration takes the generation out: undo counts it up, never down.
func sansGeneration(t *testing.T, value []byte) string {
	t.Helper()
	if bytes.HasPrefix(value, []byte("{")) {
		var m map[string]any
		if err := json.Unmarshal(value, &m); err != nil {
			t.Fatal(err)
		}
		m["metadata"].(map[string]any)["generation"] = 0
		return fmt.Sprint(m)
	}
	// Field 7 of metadata, a one-byte varint in all of these tests.
	for g := byte(1); g < 9; g++ {
		value = bytes.Replace(value, []byte{0x38, g}, []byte{0x38, 0}, 1)
	}
	return string(value)
}

const crontabs = `{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","metadata":{"name":"crontabs.stable.example.com","uid":"u-crd"},
"spec":{"group":"stable.example.com","scope":"Namespaced","names":{"plural":"crontabs","singular":"crontab","kind":"CronTab","shortNames":["ct"]},
"versions":[{"name":"v1","served":true,"storage":true,"schema":{"openAPIV3Schema":{"type":"object"}},"subresources":{"status":{},"scale":{"specReplicasPath":".spec.size","statusReplicasPath":".status.size"}}}]}}`

func TestPlanNamesWhatFights(t *testing.T) {
	l := newLab(t, 1)
	web := &appsv1.Deployment{ObjectMeta: labelled("shop", "web", "argocd.argoproj.io/instance", "shop"), Spec: appsv1.DeploymentSpec{Replicas: ptr(int32(3)),
		Template: corev1.PodTemplateSpec{ObjectMeta: labelled("", "", "app", "web")}}}
	web.OwnerReferences = []metav1.OwnerReference{{APIVersion: "stable.example.com/v1", Kind: "Shop", Name: "main", UID: "x", Controller: ptr(true)}}
	web.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "shop-operator", Operation: "Apply", FieldsType: "FieldsV1",
		FieldsV1: metav1.NewFieldsV1(`{"f:spec":{"f:replicas":{}}}`)}}
	l.put(web)
	l.put(&autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: labelled("shop", "web-hpa"), Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MinReplicas: ptr(int32(2)), MaxReplicas: 9,
		ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "web"}}})
	l.put(&policyv1.PodDisruptionBudget{ObjectMeta: labelled("shop", "web-pdb"), Spec: policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}}})
	p, err := l.plan("scale", map[string]any{"target": "deploy/web", "namespace": "shop", "to": 1})
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(p.Warnings, "\n")
	for _, want := range []string{"Shop/main owns it", "Argo CD", "shop-operator set its replicas", "web-hpa (2 to 9) will put the replicas back", "kube-controller-manager"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	p, err = l.plan("scale", map[string]any{"target": "deploy/web", "namespace": "shop", "to": 0})
	if err != nil {
		t.Fatal(err)
	}
	if text := strings.Join(p.Warnings, "\n"); !strings.Contains(text, "web-pdb is bypassed") || !strings.Contains(text, "rests while replicas is 0") {
		t.Errorf("warnings:\n%s", text)
	}
	if len(p.Bypassed) == 0 || len(p.Needs) == 0 || p.Sha256 == "" || p.Objects[0].Uid == "" || p.Objects[0].Changes[0].After != "0" {
		t.Errorf("plan %v", p)
	}
}

func TestRevoke(t *testing.T) {
	l := newLab(t, 1)
	only := l.put(binding("collector", account("telemetry", "collector")))
	shared := l.put(&rbacv1.RoleBinding{ObjectMeta: labelled("shop", "readers"), RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "reader"},
		Subjects: []rbacv1.Subject{user("alice"), account("telemetry", "collector"), group("ops"), account("other", "collector"), user("system:serviceaccount:telemetry:collector")}})
	other := l.put(binding("other", account("other", "collector"), group("system:serviceaccounts:telemetry")))
	harmless := binding("system:discovery", group("system:authenticated"))
	harmless.RoleRef.Name = "system:discovery"
	l.put(harmless)
	// A name excuses nothing, and a subject without a namespace is of the
	// binding's own.
	posing := l.put(&rbacv1.RoleBinding{ObjectMeta: labelled("telemetry", "system:discovery"), RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "admin"},
		Subjects: []rbacv1.Subject{group("system:serviceaccounts:telemetry"), {Kind: rbacv1.ServiceAccountKind, Name: "collector"}}})
	l.put(&rbacv1.RoleBinding{ObjectMeta: labelled("shop", "own"), RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "admin"},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "collector"}}})
	sa := l.put(&corev1.ServiceAccount{ObjectMeta: labelled("telemetry", "collector")})
	l.put(binding("both-user", user("eve")))
	l.put(binding("both-group", group("eve")))
	sharedBefore, otherBefore, onlyBefore, saBefore := l.value(shared), l.value(other), l.value(only), l.value(sa)

	const subject = "system:serviceaccount:telemetry:collector"
	r := l.do(resultApplied, "revoke", map[string]any{"subject": subject, "hard": true})
	if l.value(only) != nil || l.value(sa) != nil {
		t.Error("the emptied binding or the account is still there")
	}
	left := typedAt[rbacv1.RoleBinding](l, shared).Subjects
	if fmt.Sprint(left) != fmt.Sprint([]rbacv1.Subject{user("alice"), group("ops"), account("other", "collector")}) {
		t.Errorf("left: %v", left)
	}
	if !bytes.Equal(l.value(other), otherBefore) {
		t.Error("a binding that does not name the subject was changed")
	}
	warnings := strings.Join(r.Plan.Warnings, "\n")
	if len(typedAt[rbacv1.RoleBinding](l, posing).Subjects) != 1 {
		t.Error("the subject without a namespace kept its rights")
	}
	if !strings.Contains(warnings, "group system:serviceaccounts:telemetry through clusterrolebindings") ||
		!strings.Contains(warnings, "through rolebindings.rbac.authorization.k8s.io/system:discovery in namespace telemetry") ||
		strings.Contains(warnings, "clusterrolebindings.rbac.authorization.k8s.io/system:discovery") {
		t.Errorf("warnings:\n%s", warnings)
	}

	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if !bytes.Equal(l.value(shared), sharedBefore) || !bytes.Equal(l.value(only), onlyBefore) || !bytes.Equal(l.value(sa), saBefore) {
		t.Error("undo did not put the very same bytes back")
	}

	// Adding authority back is for the same person, and for an unchanged object.
	r = l.do(resultApplied, "revoke", map[string]any{"subject": subject})
	s, _ := structpb.NewStruct(map[string]any{"action": r.Action})
	_, err := l.engine.Plan(l.ctx(), by("dave", trust.Responder), &halliganv1.PlanRequest{Action: "undo", Parameters: s, Reason: "x"})
	if !fault.Is(err, fault.Refused) {
		t.Errorf("another responder's undo: %v", err)
	}
	p, err := l.engine.Plan(l.ctx(), by("carol", trust.Commander), &halliganv1.PlanRequest{Action: "undo", Parameters: s, Reason: "x"})
	if err != nil || !p.AddsAuthority || p.ApprovalsNeeded != 1 || p.AloneAllowed || !strings.Contains(p.ApprovalReason, "adds authority") {
		t.Errorf("a commander's undo of somebody else's revoke: %v, %v", p, err)
	}
	l.putRaw(shared, l.value(shared))
	u := l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if warnings := strings.Join(u.Plan.Warnings, "\n"); !strings.Contains(warnings, "left alone: rolebindings.rbac.authorization.k8s.io/readers was changed since") || l.value(only) == nil {
		t.Errorf("undo with one conflict: %s", warnings)
	}

	l.refuses(fault.Usage, "names a user in 1 places and a group in 1", "revoke", map[string]any{"subject": "eve"})
	l.do(resultApplied, "revoke", map[string]any{"subject": "group:eve"})
	l.do(resultApplied, "revoke", map[string]any{"subject": "eve"})
	l.refuses(fault.Refused, "how administrators get in", "revoke", map[string]any{"subject": "system:masters"})
	l.refuses(fault.Refused, "how administrators get in", "revoke", map[string]any{"subject": "group:system:masters"})
	for _, bad := range []string{"", "system:serviceaccount:x", "system:serviceaccount::x", "system:serviceaccount:a:b:c", "a\x1b[2Jb", "system:serviceaccount:a:../b"} {
		l.refuses(fault.Usage, "subject", "revoke", map[string]any{"subject": bad})
	}
	if r := l.do(resultApplied, "revoke", map[string]any{"subject": "nobody"}); len(r.Objects) != 0 {
		t.Errorf("revoking nobody: %v", r)
	}
	l.refuses(fault.Usage, "--hard", "revoke", map[string]any{"subject": "group:ops", "hard": true})
}

func TestDelete(t *testing.T) {
	l := newLab(t, 1)
	const many = 700
	before := map[string]string{}
	for i := range many {
		key := l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", fmt.Sprintf("run-%04d", i), "app", "runaway"), Data: map[string]string{"n": fmt.Sprint(i)}})
		before[key] = string(l.value(key))
	}
	keep := l.put(&corev1.ConfigMap{ObjectMeta: labelled("telemetry", "keep", "app", "web")})
	lease, err := l.raw.Grant(l.ctx(), 600)
	if err != nil {
		t.Fatal(err)
	}
	event := l.put(&corev1.Event{ObjectMeta: labelled("telemetry", "e1")}, clientv3.WithLease(lease.ID))

	// The pace of many: progress is told, the order of steps kept per object.
	p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "app=runaway"})
	if err != nil || len(p.Objects) != many {
		t.Fatalf("plan: %v, %d objects", err, len(p.Objects))
	}
	var told []int64
	r := l.engine.Apply(l.ctx(), responder, toApply(p), func(g *halliganv1.Progress) { told = append(told, g.Done) })
	if r.Result != resultApplied || len(told) == 0 || told[len(told)-1] != many {
		t.Fatalf("%s %v, progress %v", r.Result, r.Error, told)
	}
	if n, err := l.raw.Get(l.ctx(), "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || n.Count != 1 || l.value(keep) == nil {
		t.Fatalf("left: %v %v", n, err)
	}
	// One key per transaction: every deletion has a revision of its own.
	revisions := map[int64]bool{}
	for _, o := range r.Objects {
		revisions[o.RevisionAfter] = true
	}
	if len(revisions) != many {
		t.Errorf("%d revisions for %d deletions", len(revisions), many)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	for key, value := range before {
		if string(l.value(key)) != value {
			t.Fatalf("%s is not as it was", key)
		}
	}

	// By name, with a lease that undo keeps.
	r = l.do(resultApplied, "delete", map[string]any{"target": "ev/e1", "namespace": "telemetry"})
	if l.value(event) != nil {
		t.Error("the event is still there")
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if kv, err := l.raw.Get(l.ctx(), event); err != nil || len(kv.Kvs) != 1 || kv.Kvs[0].Lease != int64(lease.ID) {
		t.Errorf("the event came back as %v, %v", kv, err)
	}
	r = l.do(resultApplied, "delete", map[string]any{"target": "ev/e1", "namespace": "telemetry"})
	if _, err := l.raw.Revoke(l.ctx(), lease.ID); err != nil {
		t.Fatal(err)
	}
	if u := l.do(resultApplied, "undo", map[string]any{"action": r.Action}); len(u.Objects) != 0 || l.value(event) != nil {
		t.Errorf("an event whose lease ran out came back: %v", u)
	}

	// A Secret can be deleted, but never made through etcd.
	l.put(&corev1.Secret{ObjectMeta: labelled("telemetry", "s"), Data: map[string][]byte{"k": []byte("v")}})
	r = l.do(resultApplied, "delete", map[string]any{"target": "secret/s", "namespace": "telemetry"})
	l.refuses(fault.Refused, "never created through etcd", "undo", map[string]any{"action": r.Action})

	for _, c := range []struct {
		code fault.Code
		text string
		par  map[string]any
	}{
		{fault.Refused, "orphan", map[string]any{"target": "ns/telemetry"}},
		{fault.Usage, "every object of a kind", map[string]any{"target": "cm", "namespace": "telemetry"}},
		{fault.Usage, "every object of a kind", map[string]any{"target": "cm", "namespace": "telemetry", "selector": ""}},
		{fault.Usage, "takes everything", map[string]any{"target": "cm", "namespace": "telemetry", "selector": " "}},
		{fault.Usage, "takes everything", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "!nosuch"}},
		{fault.Usage, "takes everything", map[string]any{"target": "cm", "namespace": "telemetry", "selector": "nosuch!=x,a notin (b)"}},
		{fault.Usage, "unknown field", map[string]any{"target": "cm/x", "namespace": "telemetry", "nameſpace": "evil"}},
		{fault.Usage, "more than 16384", map[string]any{"target": "cm/x", "namespace": "telemetry", "selector": strings.Repeat("x", 20_000)}},
		{fault.Usage, "live in namespaces", map[string]any{"target": "cm", "selector": "a=b"}},
		{fault.Usage, "exclude each other", map[string]any{"target": "cm", "namespace": "a", "allNamespaces": true, "selector": "a=b"}},
		{fault.Usage, "exclude each other", map[string]any{"target": "cm/x", "namespace": "a", "selector": "a=b"}},
		{fault.Usage, "selector", map[string]any{"target": "cm", "namespace": "a", "selector": "a in"}},
		{fault.Usage, "not in namespaces", map[string]any{"target": "pv", "namespace": "a", "selector": "a=b"}},
	} {
		l.refuses(c.code, c.text, "delete", c.par)
	}
}

func TestBadTargets(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	for i, g := range []string{"one.example.com", "two.example.com"} {
		l.putRaw("/registry/apiextensions.k8s.io/customresourcedefinitions/widgets."+g, []byte(strings.NewReplacer(
			"stable.example.com", g, "crontabs", "widgets", "crontab", "widget", "CronTab", "Widget", `"ct"`, `"wd"`, "u-crd", fmt.Sprint("u", i)).Replace(crontabs)))
	}
	scale := func(target, ns string, to any) map[string]any {
		return map[string]any{"target": target, "namespace": ns, "to": to}
	}
	for _, c := range []struct {
		code fault.Code
		text string
		par  map[string]any
	}{
		{fault.Usage, "", scale("frobnicators/x", "a", 0)},
		{fault.NotFound, "there is one in namespace telemetry", scale("ds/collector", "wrong", 0)},
		{fault.NotFound, "halligan get daemonsets", scale("ds/nobody", "telemetry", 0)},
		{fault.Usage, "widgets.", scale("wd/x", "a", 0)},
		{fault.Usage, `\x1b`, scale("ds/a\x1b[31m", "telemetry", 0)},
		{fault.Usage, "", scale("ds/a/../b", "telemetry", 0)},
		{fault.Usage, "", scale("ds/collector", "tele\nmetry", 0)},
		{fault.Usage, "", scale("ds/collector", "a/b", 0)},
		{fault.Usage, "-1 replicas", scale("ds/collector", "telemetry", -1)},
		{fault.Usage, "cannot be meant", scale("ds/collector", "telemetry", 1e9)},
		{fault.Usage, "to", scale("ds/collector", "telemetry", 1e40)},
		{fault.Usage, "to", scale("ds/collector", "telemetry", 0.5)},
		{fault.Usage, "to", scale("ds/collector", "telemetry", "zero")},
		{fault.Usage, "missing", map[string]any{"target": "ds/collector", "namespace": "telemetry"}},
		{fault.Usage, "unknown field", map[string]any{"target": "ds/collector", "namespace": "telemetry", "to": 0, "force": true}},
		{fault.Usage, "one object at a time", scale("ds", "telemetry", 0)},
		{fault.Usage, "", scale("", "telemetry", 0)},
	} {
		l.refuses(c.code, c.text, "scale", c.par)
	}
	l.refuses(fault.Usage, "unknown action", "explode", nil)
	l.refuses(fault.Usage, "only reads", "get", nil)
	l.refuses(fault.NotFound, "no action", "undo", map[string]any{"action": "2026"})
	if l.records() != 0 {
		t.Error("a refused plan left a record")
	}
}

func TestStalePlans(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	stop := map[string]any{"target": "ds/collector", "namespace": "telemetry", "to": 0}
	plan := func() *halliganv1.Plan {
		p, err := l.plan("scale", stop)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	stale := func(p *halliganv1.Plan, sha, text string) {
		t.Helper()
		before := l.value(key)
		r := l.engine.Apply(l.ctx(), responder, &halliganv1.ApplyRequest{PlanId: p.Id, PlanSha256: sha}, nil)
		if r.Result != resultStale || r.Error.Code != string(fault.Stale) || !strings.Contains(r.Error.Message, text) {
			t.Errorf("%s: %v, want %q", r.Result, r.Error, text)
		}
		if !bytes.Equal(before, l.value(key)) || l.records() != 0 {
			t.Error("a stale plan wrote something")
		}
	}

	p := plan()
	l.put(collector())
	stale(p, p.Sha256, "was changed since the plan")

	p = plan()
	other := collector()
	other.UID = "another"
	if _, err := l.raw.Delete(l.ctx(), key); err != nil {
		t.Fatal(err)
	}
	r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
	if r.Result != resultStale || !strings.Contains(r.Error.Message, "was deleted since") {
		t.Errorf("%v", r)
	}
	l.put(other)

	p = plan()
	stale(p, strings.Repeat("0", 64), "is not the one with the hash")

	// Used once only, by its owner only, with a reason only.
	s, _ := structpb.NewStruct(stop)
	if r := l.engine.Apply(l.ctx(), by("dave", trust.Responder), toApply(p), nil); r.Result != resultRefused {
		t.Errorf("another person's plan: %v", r)
	}
	bare, err := l.engine.Plan(l.ctx(), responder, &halliganv1.PlanRequest{Action: "scale", Parameters: s})
	if err != nil {
		t.Fatal(err)
	}
	if r := l.engine.Apply(l.ctx(), responder, toApply(bare), nil); r.Error.GetCode() != string(fault.Usage) {
		t.Errorf("no reason: %v", r)
	}
	l.engine.planTTL = -time.Second
	expired := plan()
	stale(expired, expired.Sha256, "expired")
	l.engine.planTTL = time.Minute

	// Two actions on one object at once: one is done, one is stale.
	var wg sync.WaitGroup
	results := make([]string, 8)
	plans := make([]*halliganv1.Plan, len(results))
	for i := range plans {
		plans[i] = plan()
	}
	for i := range results {
		wg.Go(func() { results[i] = l.engine.Apply(l.ctx(), responder, toApply(plans[i]), nil).Result })
	}
	wg.Wait()
	done := 0
	for _, r := range results {
		switch r {
		case resultApplied:
			done++
		case resultStale:
		default:
			t.Errorf("one of two actions at once: %s", r)
		}
	}
	if done != 1 || l.records() != 1 {
		t.Errorf("%v, %d records", results, l.records())
	}
	again := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
	if again.Result != resultStale {
		t.Errorf("a plan of before: %v", again)
	}
}

func TestUndoOfWhatChangedSince(t *testing.T) {
	l := newLab(t, 1)
	web := &appsv1.Deployment{ObjectMeta: labelled("shop", "web"), Spec: appsv1.DeploymentSpec{Replicas: ptr(int32(3))}}
	key := l.put(web)
	r := l.do(resultApplied, "scale", map[string]any{"target": "deploy/web", "namespace": "shop", "to": 0})
	// A controller writes its status: the undo keeps that.
	now := typedAt[appsv1.Deployment](l, key)
	now.Status.ObservedGeneration = 2
	now.Annotations = map[string]string{"new": "yes"}
	l.put(now)
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	after := typedAt[appsv1.Deployment](l, key)
	if *after.Spec.Replicas != 3 || after.Status.ObservedGeneration != 2 || after.Annotations["new"] != "yes" || after.Generation != 3 {
		t.Errorf("after undo: %+v", after)
	}
	// Somebody else scaled: the undo leaves it alone.
	r = l.do(resultApplied, "scale", map[string]any{"target": "deploy/web", "namespace": "shop", "to": 0})
	now = typedAt[appsv1.Deployment](l, key)
	now.Spec.Replicas = ptr(int32(5))
	l.put(now)
	l.refuses(fault.Stale, "spec.replicas", "undo", map[string]any{"action": r.Action})
	// Deleted, or made again: the undo says so.
	if _, err := l.raw.Delete(l.ctx(), key); err != nil {
		t.Fatal(err)
	}
	l.refuses(fault.Stale, "was deleted since", "undo", map[string]any{"action": r.Action})
	web.UID, web.ResourceVersion = "another", ""
	l.put(web)
	l.refuses(fault.Stale, "was made again", "undo", map[string]any{"action": r.Action})
}

func TestUnreadableValues(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(collector())
	good := l.value(key)
	cbor := append([]byte{0xd9, 0xd9, 0xf7, 0xa1}, "x"...)
	for name, c := range map[string]struct {
		value []byte
		code  fault.Code
	}{
		"garbage":   {[]byte("\x00\x01garbage"), fault.Undecodable},
		"empty":     {[]byte{}, fault.Undecodable},
		"truncated": {good[:len(good)/2], fault.Undecodable},
		"cbor":      {cbor, fault.Undecodable},
		"encrypted": {[]byte("k8s:enc:aescbc:v1:lost:xxxxxxxxxxxxxxxxxxxx"), fault.Encrypted},
		"other":     {bytes.Replace(good, []byte("collector"), []byte("collectoR"), 1), fault.Undecodable},
	} {
		l.putRaw(key, c.value)
		l.refuses(c.code, "", "scale", map[string]any{"target": "ds/collector", "namespace": "telemetry", "to": 0})
		if !bytes.Equal(l.value(key), c.value) {
			t.Errorf("%s: the value was changed", name)
		}
		// A list goes on around it and says so.
		s, _ := structpb.NewStruct(map[string]any{"target": "ds", "namespace": "telemetry"})
		sum, err := l.engine.Get(l.ctx(), responder, &halliganv1.GetRequest{Parameters: s, Reason: "test"}, func(*halliganv1.Object) error { return nil })
		if err != nil || sum.Undecodable != 1 {
			t.Errorf("%s: list: %v, %v", name, sum, err)
		}
	}
	if l.records() != 0 {
		t.Error("an unreadable value left a record")
	}
	// What breaks every LIST can be removed, with its bytes kept; the way back
	// would break them again.
	l.putRaw(key, cbor)
	r := l.do(resultApplied, "delete", map[string]any{"target": "ds/collector", "namespace": "telemetry"})
	if l.value(key) != nil {
		t.Error("the unreadable value is still there")
	}
	record, err := l.engine.journal.Read(r.Action)
	if err != nil {
		t.Fatal(err)
	}
	if kept, err := l.engine.journal.Value(r.Action, record.Images[0]); err != nil || !bytes.Equal(kept, cbor) {
		t.Errorf("kept %q, %v", kept, err)
	}
	l.refuses(fault.Refused, "break every LIST", "undo", map[string]any{"action": r.Action})

	// Nothing comes back into a namespace that is gone.
	l.put(&corev1.ConfigMap{ObjectMeta: labelled("temporary", "c")})
	r = l.do(resultApplied, "delete", map[string]any{"target": "cm/c", "namespace": "temporary"})
	if _, err := l.raw.Delete(l.ctx(), "/registry/namespaces/temporary"); err != nil {
		t.Fatal(err)
	}
	l.refuses(fault.Stale, "lost its namespace", "undo", map[string]any{"action": r.Action})
}

func TestCapsAndLocalPolicy(t *testing.T) {
	l := newLab(t, 1)
	for i := range 5 {
		l.put(&corev1.ConfigMap{ObjectMeta: labelled("a", fmt.Sprint("c", i), "x", "y")})
	}
	cut := l.tighten
	some := map[string]any{"target": "cm", "namespace": "a", "selector": "x=y"}
	cut("version: 1\ncaps: {objectsPerAction: 4}\n")
	l.refuses(fault.Refused, "more than 4 objects", "delete", some)
	cut("version: 1\ncaps: {objectsPerHour: 6}\n")
	r := l.do(resultApplied, "delete", some)
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	l.refuses(fault.Refused, "cap of 6", "delete", some)
	cut("version: 1\n")
	r = l.do(resultApplied, "delete", some)
	cut("version: 1\nprotect:\n- {namespaces: [a], why: it is ours}\n")
	l.refuses(fault.Refused, "it is ours", "undo", map[string]any{"action": r.Action})
	cut("version: 1\n")
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})

	// The gate: roles below the row's get nothing, whatever the call.
	for _, who := range []trust.Identity{{}, {Person: "x"}, by("x", trust.None), by("", trust.Commander), by("x", trust.Observer)} {
		s, _ := structpb.NewStruct(some)
		if _, err := l.engine.Plan(l.ctx(), who, &halliganv1.PlanRequest{Action: "delete", Parameters: s, Reason: "x"}); !fault.Is(err, fault.Refused) {
			t.Errorf("%+v planned a deletion: %v", who, err)
		}
		_, err := l.engine.Get(l.ctx(), who, &halliganv1.GetRequest{Parameters: s, Reason: "test"}, func(*halliganv1.Object) error { return nil })
		herr := l.engine.History(l.ctx(), who, &halliganv1.HistoryRequest{}, func(*halliganv1.HistoryEntry) error { return nil })
		if seen := who.May(trust.Observer); seen != (err == nil) || seen != (herr == nil) {
			t.Errorf("%+v: get %v, history %v", who, err, herr)
		}
	}
}

// TestVerifySeesTheReversal: what somebody puts back between the write and the
// look is not called done, by the short way and by the long one.
func TestVerifySeesTheReversal(t *testing.T) {
	for _, bindings := range []int{1, smallAction + 4} {
		l := newLab(t, 1)
		var keys []string
		for i := range bindings {
			keys = append(keys, l.put(binding(fmt.Sprint("b", i), account("telemetry", "collector"), user("alice"))))
		}
		before := l.value(keys[0])
		var once sync.Once
		l.engine.steps = func(step string) {
			if step == "written" {
				once.Do(func() {
					for _, k := range keys { // in the long way several may be on their way: all are put back
						for bytes.Equal(l.value(k), before) && k == keys[0] {
							time.Sleep(time.Millisecond)
						}
					}
					l.putRaw(keys[0], before)
				})
			}
		}
		p, err := l.plan("revoke", map[string]any{"subject": "system:serviceaccount:telemetry:collector"})
		if err != nil {
			t.Fatal(err)
		}
		r := l.engine.Apply(l.ctx(), responder, toApply(p), nil)
		if r.Result != resultUnverified || r.Error.GetCode() != string(fault.Unverified) {
			t.Errorf("%d bindings: %s, %v", bindings, r.Result, r.Error)
		}
	}
}

// TestStop ends a long action by hand: what was done is on record and can be
// undone, the rest was not touched.
func TestStop(t *testing.T) {
	l := newLab(t, 1)
	const many = 200
	for i := range many {
		l.put(&corev1.ConfigMap{ObjectMeta: labelled("a", fmt.Sprint("c", i), "x", "y")})
	}
	l.engine.pace = Pace{PerSecond: 100, Most: 2}
	p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "a", "selector": "x=y"})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.engine.Stop(responder, p.Id); !fault.Is(err, fault.NotFound) {
		t.Errorf("stopping what does not run: %v", err)
	}
	var once sync.Once
	r := l.engine.Apply(l.ctx(), responder, toApply(p), func(*halliganv1.Progress) {
		once.Do(func() {
			drill, narrow := by("dave", trust.Commander), by("dave", trust.Commander)
			drill.Scope.Drill, narrow.Scope.Namespaces = true, []string{"b"}
			for _, who := range []trust.Identity{by("dave", trust.Responder), by(responder.Person, trust.Observer), drill, narrow} {
				if err := l.engine.Stop(who, p.Id); !fault.Is(err, fault.Refused) {
					t.Errorf("%v stopped it: %v", who, err)
				}
			}
			if err := l.engine.Stop(responder, p.Id); err != nil {
				t.Error(err)
			}
		})
	})
	if r.Result != resultPartial || r.Error.GetCode() != string(fault.Cancelled) {
		t.Fatalf("%s, %v", r.Result, r.Error)
	}
	for _, o := range r.Objects {
		if gone := l.value(o.Key) == nil; gone != (o.Outcome == "applied") {
			t.Errorf("%s: gone %v, outcome %s", o.Key, gone, o.Outcome)
		}
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if n, err := l.raw.Get(l.ctx(), "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || n.Count != many {
		t.Errorf("after undo %v, %v", n, err)
	}
}

func TestCapsHoldAtOnce(t *testing.T) {
	l := newLab(t, 1)
	l.tighten("version: 1\ncaps: {objectsPerHour: 5}\n")
	var plans []*halliganv1.Plan
	for i := range 8 {
		for j := range 5 {
			l.put(&corev1.ConfigMap{ObjectMeta: labelled("a", fmt.Sprint("c", i, j), "x", fmt.Sprint(i))})
		}
		p, err := l.plan("delete", map[string]any{"target": "cm", "namespace": "a", "selector": fmt.Sprint("x=", i)})
		if err != nil {
			t.Fatal(err)
		}
		plans = append(plans, p)
	}
	l.engine.asked = time.Time{} // as after a while: each asks etcd which cluster it is
	var wg sync.WaitGroup
	for _, p := range plans {
		wg.Go(func() { l.engine.Apply(l.ctx(), responder, toApply(p), nil) })
	}
	wg.Wait()
	if n, err := l.raw.Get(l.ctx(), "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || n.Count != 35 {
		t.Errorf("%d of 40 are left, %v", n.Count, err)
	}
}

// TestLongNames: names of RBAC kinds have no limit but that of a request (four
// times the name in that of a creation), and must not make a plan too
// large to be sent.
func TestLongNames(t *testing.T) {
	l := newLab(t, 1)
	for i := range 14 {
		b := &rbacv1.RoleBinding{ObjectMeta: labelled("telemetry", fmt.Sprint(strings.Repeat("x", 350_000), i)), Subjects: []rbacv1.Subject{account("telemetry", "collector")}}
		b.UID = types.UID(fmt.Sprint("uid-", i))
		l.put(b)
	}
	r := l.do(resultApplied, "revoke", map[string]any{"subject": "system:serviceaccount:telemetry:collector"})
	if n := proto.Size(r); n > 64<<10 {
		t.Errorf("the result has %d bytes", n)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
}

func TestUndoOfAService(t *testing.T) {
	l := newLab(t, 1)
	web := &corev1.Service{ObjectMeta: labelled("shop", "web"), Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.0.0.7"}, Ports: []corev1.ServicePort{{Port: 80, NodePort: 30080, Protocol: "TCP"}}}}
	key := l.put(web)
	r := l.do(resultApplied, "delete", map[string]any{"target": "svc/web", "namespace": "shop"})
	l.put(&corev1.Service{ObjectMeta: labelled("other", "thief"), Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.0.0.7"}}})
	l.refuses(fault.Stale, "thief in namespace other got", "undo", map[string]any{"action": r.Action})
	if _, err := l.raw.Delete(l.ctx(), "/registry/services/specs/other/thief"); err != nil {
		t.Fatal(err)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if l.value(key) == nil {
		t.Error("not back")
	}
}

func TestGet(t *testing.T) {
	l := newLab(t, 1)
	l.put(collector())
	l.put(&corev1.Secret{ObjectMeta: labelled("telemetry", "s"), Data: map[string][]byte{"k": []byte("hunter2")}})
	get := func(who trust.Identity, par map[string]any) ([]*halliganv1.Object, error) {
		s, _ := structpb.NewStruct(par)
		var out []*halliganv1.Object
		_, err := l.engine.Get(l.ctx(), who, &halliganv1.GetRequest{Parameters: s, Reason: "test"}, func(o *halliganv1.Object) error { out = append(out, o); return nil })
		return out, err
	}
	one, err := get(responder, map[string]any{"target": "ds/collector", "namespace": "telemetry"})
	if err != nil || len(one) != 1 || !strings.Contains(one[0].Json, `"kubernetes.io/os":"linux"`) {
		t.Errorf("%v %v", one, err)
	}
	secret, err := get(responder, map[string]any{"target": "secret/s", "namespace": "telemetry"})
	if err != nil || strings.Contains(secret[0].Json, "aHVudGVyMg") {
		t.Errorf("%v %v", secret, err)
	}
	all, err := get(responder, map[string]any{"target": "secrets", "allNamespaces": true, "full": true})
	if err != nil || len(all) != 1 || strings.Contains(all[0].Json, "aHVudGVyMg") {
		t.Errorf("%v %v", all, err)
	}
	if _, err := get(responder, map[string]any{"target": "secret/s", "namespace": "telemetry", "reveal": true}); !fault.Is(err, fault.Refused) {
		t.Errorf("a responder revealed: %v", err)
	}
	commander := by("carol", trust.Commander)
	if _, err := get(commander, map[string]any{"target": "secrets", "namespace": "telemetry", "reveal": true}); !fault.Is(err, fault.Usage) {
		t.Errorf("all Secrets revealed: %v", err)
	}
	_, err = l.engine.Get(l.ctx(), commander, &halliganv1.GetRequest{Parameters: parameters(t, map[string]any{"target": "secret/s", "namespace": "telemetry", "reveal": true})}, nil)
	if !fault.Is(err, fault.Usage) {
		t.Errorf("revealed without a reason: %v", err)
	}
	shown, err := get(commander, map[string]any{"target": "secret/s", "namespace": "telemetry", "reveal": true})
	if err != nil || !strings.Contains(shown[0].Json, "aHVudGVyMg") {
		t.Errorf("%v %v", shown, err)
	}
	var seen []*halliganv1.HistoryEntry
	if err := l.engine.History(l.ctx(), commander, &halliganv1.HistoryRequest{}, func(h *halliganv1.HistoryEntry) error { seen = append(seen, h); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 1 || !strings.Contains(seen[0].Summary, "reveal secret/s") || seen[0].Actor != "carol" {
		t.Errorf("history of the reveal: %v", seen)
	}
}

// TestLargeValue: near etcd's limit an edit that would pass it is refused, and a
// delete works and can be taken back.
func TestLargeValue(t *testing.T) {
	l := newLab(t, 1)
	big := collector()
	big.Annotations = map[string]string{"pad": strings.Repeat("x", 1536*1024-2300)}
	key := l.put(big)
	l.refuses(fault.TooLarge, "", "scale", map[string]any{"target": "ds/collector", "namespace": "telemetry", "to": 0})
	before := l.value(key)
	r := l.do(resultApplied, "delete", map[string]any{"target": "ds/collector", "namespace": "telemetry"})
	if l.value(key) != nil {
		t.Error("still there")
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if !bytes.Equal(before, l.value(key)) {
		t.Error("not as it was")
	}
}
