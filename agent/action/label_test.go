package action

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

func marks(target, namespace string, changes ...any) map[string]any {
	return map[string]any{"target": target, "namespace": namespace, "changes": changes}
}

func TestLabelAndAnnotate(t *testing.T) {
	l := newLab(t, 1)
	node := l.put(&corev1.Node{ObjectMeta: labelled("", "worker", "a", "1", "b", "2")})
	before := l.value(node)
	r := l.do(resultApplied, "label", marks("node/worker", "", "topology.kubernetes.io/zone=z1", "a-", "b=3", "c-"))
	if got := typedAt[corev1.Node](l, node).Labels; fmt.Sprint(got) != "map[b:3 topology.kubernetes.io/zone:z1]" {
		t.Fatalf("labels %v", got)
	}
	var diff []string
	for _, c := range r.Plan.Objects[0].Changes {
		diff = append(diff, c.Path+" "+c.Before+">"+c.After)
	}
	if want := `metadata.labels[topology.kubernetes.io/zone] >"z1";metadata.labels[a] "1">;metadata.labels[b] "2">"3"`; strings.Join(diff, ";") != want {
		t.Errorf("diff %q", diff)
	}
	if p := l.do(resultApplied, "label", marks("node/worker", "", "b=3", "a-")).Plan; len(p.Objects) != 0 || !strings.Contains(p.Summary, "nothing to do") {
		t.Errorf("labelled twice: %v", p)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if after := l.value(node); string(after) != string(before) {
		t.Errorf("undo left\n%q, was\n%q", after, before)
	}

	web := &appsv1.Deployment{ObjectMeta: labelled("shop", "web", "argocd.argoproj.io/instance", "shop")}
	key := l.put(web)
	r = l.do(resultApplied, "annotate", marks("deploy/web", "shop", "argocd.argoproj.io/skip-reconcile=true", "note=a=b, \x1b[31m", "Example.com/Upper="))
	now := typedAt[appsv1.Deployment](l, key)
	if now.Annotations["argocd.argoproj.io/skip-reconcile"] != "true" || now.Annotations["note"] != "a=b, \x1b[31m" || now.Generation != 2 || len(now.Annotations) != 3 {
		t.Errorf("annotated %v, generation %d", now.Annotations, now.Generation)
	}
	if !strings.Contains(strings.Join(r.Plan.Warnings, ""), "Argo CD") {
		t.Errorf("warnings %q", r.Plan.Warnings)
	}
	now.Annotations["note"] = "of somebody else"
	l.put(now)
	l.refuses(fault.Stale, "metadata.annotations[note] was changed", "undo", map[string]any{"action": r.Action})

	l.put(&corev1.Secret{ObjectMeta: labelled("shop", "s")})
	l.put(&corev1.ConfigMap{ObjectMeta: labelled("shop", "full"), Data: map[string]string{"x": "y"}})
	full := &corev1.ConfigMap{ObjectMeta: labelled("shop", "full")}
	full.Annotations = map[string]string{"x": strings.Repeat("y", 256<<10-8)}
	l.put(full)
	l.refuses(fault.TooLarge, "more annotations", "annotate", marks("cm/full", "shop", "note=more than that"))
	for _, verb := range []string{"label", "annotate"} {
		for _, c := range []struct {
			code      fault.Code
			text      string
			parameter map[string]any
		}{
			{fault.Refused, "not changed through etcd", marks("secret/s", "shop", "a=b")},
			{fault.Refused, "network or DNS", marks("deploy/coredns", "kube-system", "a=b")},
			{fault.Usage, "no " + map[string]string{"label": "labels", "annotate": "annotations"}[verb], marks("deploy/web", "shop")},
			{fault.Usage, "neither sets", marks("deploy/web", "shop", "a")},
			{fault.Usage, "neither sets", marks("deploy/web", "shop", "")},
			{fault.Usage, "key cannot be", marks("deploy/web", "shop", "-")},
			{fault.Usage, "key cannot be", marks("deploy/web", "shop", "=b")},
			{fault.Usage, "key cannot be", marks("deploy/web", "shop", "a b=c")},
			{fault.Usage, "key cannot be", marks("deploy/web", "shop", "a/b/c=d")},
			{fault.Usage, "key cannot be", marks("deploy/web", "shop", "a\n=d")},
			{fault.Usage, "key cannot be", marks("deploy/web", "shop", strings.Repeat("a", 64)+"=d")},
			{fault.Usage, "twice", marks("deploy/web", "shop", "a=b", "a-")},
			{fault.Usage, "more than", marks("deploy/web", "shop", slices.Repeat([]any{"a=b"}, maxMarks+1)...)},
			{fault.Usage, "not contents", marks("deploy/web", "shop", "a="+strings.Repeat("b", maxParameters))},
			{fault.Usage, "does not fit", map[string]any{"target": "deploy/web", "namespace": "shop", "changes": "a=b"}},
			{fault.Usage, "does not fit", map[string]any{"target": "deploy/web", "namespace": "shop", "changes": []any{1}}},
			{fault.Usage, "one object at a time", marks("deploy", "shop", "a=b")},
			{fault.NotFound, "", marks("deploy/wep", "shop", "a=b")},
			{fault.Usage, "", marks("deploy/web", "", "a=b")},
		} {
			l.refuses(c.code, c.text, verb, c.parameter)
		}
	}
	l.refuses(fault.Usage, "value cannot be", "label", marks("deploy/web", "shop", "a=b c"))
	l.refuses(fault.Usage, "value cannot be", "label", marks("deploy/web", "shop", "a="+strings.Repeat("b", 64)))
	if _, err := l.planAs(by("olga", trust.Observer), "label", marks("deploy/web", "shop", "a=b")); !fault.Is(err, fault.Refused) {
		t.Errorf("an observer labels: %v", err)
	}
}

// TestMarksThatGrant: what gives rights to somebody takes a commander and another
// person, whether it is set or removed.
func TestMarksThatGrant(t *testing.T) {
	l := newLab(t, 1)
	l.put(&corev1.Node{ObjectMeta: labelled("", "worker", "node-role.kubernetes.io/worker", "")})
	l.put(&corev1.Namespace{ObjectMeta: labelled("", "shop")})
	l.put(&corev1.Pod{ObjectMeta: labelled("shop", "p")})
	l.put(&corev1.ServiceAccount{ObjectMeta: labelled("shop", "sa")})
	l.put(&rbacv1.ClusterRole{ObjectMeta: labelled("", "reader")})
	l.put(hooks("guard"))
	l.engine.approvals = signed(nil)
	carol := by("carol", trust.Commander)
	for _, c := range []struct{ target, namespace, change string }{
		{"node/worker", "", "node-role.kubernetes.io/control-plane="},
		{"node/worker", "", "node-role.kubernetes.io/worker-"},
		{"node/worker", "", "node-restriction.kubernetes.io/pci=true"},
		{"node/worker", "", "topology.kubernetes.io/zoned=x"},
		{"ns/shop", "", "pod-security.kubernetes.io/enforce=privileged"},
		{"ns/shop", "", "pod-security.kubernetes.io/enforce-"},
		{"ns/shop", "", "openshift.io/sa.scc.uid-range=0/1"},
		{"ns/shop", "", "field.cattle.io/projectId=p-1"},
		{"ns/shop", "", "kubernetes.io/metadata.name=kube-system"},
		{"pod/p", "shop", "azure.workload.identity/use=true"},
		{"pod/p", "shop", "iam.amazonaws.com/role=admin"},
		{"pod/p", "shop", "kubernetes.io/config.mirror=x"},
		{"sa/sa", "shop", "anything=x"},
		{"clusterrole/reader", "", "rbac.example.com/aggregate-to-admin=true"},
		{"validatingwebhookconfigurations/guard", "", "team=x"},
	} {
		for _, verb := range []string{"label", "annotate"} {
			if strings.Contains(c.change, "uid-range") && verb == "label" {
				continue // no value of a label
			}
			l.refuses(fault.Refused, "adds authority", verb, marks(c.target, c.namespace, c.change))
		}
		verb := map[bool]string{true: "annotate", false: "label"}[strings.Contains(c.change, "uid-range")]
		p, err := l.planAs(carol, verb, marks(c.target, c.namespace, c.change))
		if err != nil || len(p.Objects) > 0 && (p.ApprovalsNeeded != 1 || !p.AddsAuthority || p.AloneAllowed) {
			t.Errorf("%s: %v, %v", c.change, p, err)
		}
	}

	// With an approval it is done; taken back by who did it alone; but to do it once
	// more by undoing that takes another approval.
	p, err := l.planAs(carol, "label", marks("node/worker", "", "node-role.kubernetes.io/infra="))
	if err != nil {
		t.Fatal(err)
	}
	l.apply(carol, p, resultAwaiting, "adds authority", false)
	did := l.apply(carol, p, resultApplied, "", false, "bob/k1")
	undo := func(id string) *halliganv1.Plan {
		t.Helper()
		p, err := l.planAs(carol, "undo", map[string]any{"action": id})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	back := undo(did.Action)
	if back.ApprovalsNeeded != 0 {
		t.Errorf("taking it back: %v", back)
	}
	l.apply(carol, back, resultApplied, "", false)
	if again := undo(back.Id); again.ApprovalsNeeded != 1 || !again.AddsAuthority {
		t.Errorf("once more by undoing the undo: %v", again)
	}

	// Free to a responder.
	for _, c := range []string{"topology.kubernetes.io/zone=a", "app.kubernetes.io/part-of=x", "node.kubernetes.io/exclude-from-external-load-balancers=", "dedicated=gpu", "cluster.x-k8s.io/paused=true", "notkubernetes.io/x=y"} {
		if _, err := l.plan("label", marks("node/worker", "", c)); err != nil {
			t.Errorf("%s: %v", c, err)
		}
	}
}
