package action

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// pausable defines a custom kind with a boolean in spec.
func pausable(plural, kind, field, typ string) string {
	return fmt.Sprintf(`{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","metadata":{"name":"%[1]s.example.com","uid":"u-%[1]s"},
"spec":{"group":"example.com","scope":"Namespaced","names":{"plural":"%[1]s","kind":"%[2]s"},"versions":[{"name":"v1","served":true,"storage":true,
"schema":{"openAPIV3Schema":{"type":"object","properties":{"spec":{"type":"object","properties":{"%[3]s":{"type":"%[4]s"}}}}}}}]}}`, plural, kind, field, typ)
}

func TestPauseAndResume(t *testing.T) {
	l := newLab(t, 1)
	web := &appsv1.Deployment{ObjectMeta: labelled("shop", "web", "argocd.argoproj.io/instance", "shop")}
	web.OwnerReferences = []metav1.OwnerReference{{APIVersion: "example.com/v1", Kind: "Shop", Name: "main", UID: "x", Controller: ptr(true)}}
	l.put(web)
	l.put(&batchv1.CronJob{ObjectMeta: labelled("shop", "cron")})
	l.put(&batchv1.Job{ObjectMeta: labelled("shop", "job"), Spec: batchv1.JobSpec{Suspend: ptr(false)}})
	custom := func(plural, kind, field, spec string) {
		l.putRaw("/registry/apiextensions.k8s.io/customresourcedefinitions/"+plural+".example.com", []byte(pausable(plural, kind, field, map[bool]string{true: "boolean", false: "string"}[plural != "odds"])))
		l.putRaw("/registry/example.com/"+plural+"/shop/it", fmt.Appendf(nil, `{"apiVersion":"example.com/v1","kind":"%s","metadata":{"name":"it","namespace":"shop","uid":"u","generation":1},"spec":%s}`, kind, spec))
	}
	custom("syncs", "Sync", "suspend", `{"a":1.50}`)
	custom("machines", "Machine", "paused", `{"paused":false,"z":12345678901234567890}`)
	custom("odds", "Odd", "paused", `{"paused":"no"}`)

	for _, c := range []struct {
		target, key, path string
		paused            func(key string) bool
	}{
		{"deploy/web", "/registry/deployments/shop/web", "spec.paused", func(k string) bool { return typedAt[appsv1.Deployment](l, k).Spec.Paused }},
		{"cj/cron", "/registry/cronjobs/shop/cron", "spec.suspend", func(k string) bool { s := typedAt[batchv1.CronJob](l, k).Spec.Suspend; return s != nil && *s }},
		{"jobs/job", "/registry/jobs/shop/job", "spec.suspend", func(k string) bool { return *typedAt[batchv1.Job](l, k).Spec.Suspend }},
		{"sync/it", "/registry/example.com/syncs/shop/it", "spec.suspend", func(k string) bool { return strings.Contains(string(l.value(k)), `"spec":{"a":1.50,"suspend":true}`) }},
		{"machine/it", "/registry/example.com/machines/shop/it", "spec.paused", func(k string) bool {
			return strings.Contains(string(l.value(k)), `"spec":{"paused":true,"z":12345678901234567890}`)
		}},
	} {
		t.Run(strings.ReplaceAll(c.target, "/", "-"), func(t *testing.T) {
			par := map[string]any{"target": c.target, "namespace": "shop"}
			before := l.value(c.key)
			if p := l.do(resultApplied, "resume", par).Plan; len(p.Objects) != 0 {
				t.Errorf("resumed what was not paused: %v", p)
			}
			r := l.do(resultApplied, "pause", par)
			if !c.paused(c.key) || r.Plan.Objects[0].Changes[0].Path != c.path || r.Plan.Objects[0].Changes[0].After != "true" {
				t.Fatalf("not paused: %q, %v", l.value(c.key), r.Plan)
			}
			if p := l.do(resultApplied, "pause", par).Plan; len(p.Objects) != 0 || !strings.Contains(p.Summary, "paused already") {
				t.Errorf("paused twice: %v", p)
			}
			l.do(resultApplied, "undo", map[string]any{"action": r.Action})
			if after := l.value(c.key); sansGeneration(t, before) != sansGeneration(t, after) {
				t.Errorf("undo left\n%q, was\n%q", after, before)
			}
			l.do(resultApplied, "pause", par)
			if l.do(resultApplied, "resume", par); c.paused(c.key) {
				t.Errorf("not resumed: %q", l.value(c.key))
			}
		})
	}
	p, err := l.plan("pause", map[string]any{"target": "deploy/web", "namespace": "shop"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Shop/main owns it", "Argo CD", "stays as it is", "kube-controller-manager"} {
		if text, _ := json.Marshal(p); !strings.Contains(string(text), want) {
			t.Errorf("no %q in %s", want, text)
		}
	}

	l.put(collector())
	l.put(&corev1.ConfigMap{ObjectMeta: labelled("shop", "c")})
	for _, verb := range []string{"pause", "resume"} {
		for _, c := range []struct {
			code                    fault.Code
			text, target, namespace string
		}{
			{fault.Usage, "cannot be paused", "ds/collector", "telemetry"},
			{fault.Usage, "cannot be paused", "cm/c", "shop"},
			{fault.Usage, "cannot be paused", "odd/it", "shop"},
			{fault.Usage, "one object at a time", "deploy", "shop"},
			{fault.Usage, "", "", "shop"},
			{fault.Usage, "", "deploy/web", ""},
			{fault.Usage, "", "deploy/web", "no such"},
			{fault.Usage, "", "deploy/web/scale", "shop"},
			{fault.Usage, "no kind", "gadget/web", "shop"},
			{fault.NotFound, "", "deploy/wep", "shop"},
			{fault.Refused, "network or DNS", "deploy/coredns", "kube-system"},
		} {
			l.refuses(c.code, c.text, verb, map[string]any{"target": c.target, "namespace": c.namespace})
		}
		if _, err := l.planAs(by("olga", trust.Observer), verb, map[string]any{"target": "deploy/web", "namespace": "shop"}); !fault.Is(err, fault.Refused) {
			t.Errorf("an observer may %s: %v", verb, err)
		}
	}
	l.putRaw("/registry/example.com/machines/shop/it", []byte(`{"apiVersion":"example.com/v1","kind":"Machine","metadata":{"name":"it","namespace":"shop","uid":"u"},"spec":{"paused":"perhaps"}}`))
	l.refuses(fault.Undecodable, "", "pause", map[string]any{"target": "machine/it", "namespace": "shop"})
}
