package action

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

func TestCordon(t *testing.T) {
	l := newLab(t, 1)
	key := l.put(&corev1.Node{ObjectMeta: labelled("", "worker-17", "app.kubernetes.io/managed-by", "eks"), Spec: corev1.NodeSpec{ProviderID: "kept"}})
	before := l.value(key)
	open := func() bool { return !typedAt[corev1.Node](l, key).Spec.Unschedulable }

	r := l.do(resultApplied, "cordon", map[string]any{"target": "worker-17"})
	text := strings.Join(append(r.Plan.Warnings, r.Plan.Needs...), "\n")
	if open() || r.Plan.Summary != "cordon nodes/worker-17" || !strings.Contains(text, "DaemonSet's still come") || !strings.Contains(text, "EKS add-ons") || !strings.Contains(text, "kube-scheduler") {
		t.Fatalf("open: %v, plan %v", open(), r.Plan)
	}
	if c := r.Plan.Objects[0].Changes; len(c) != 1 || c[0].Path != "spec.unschedulable" || c[0].Before != "false" || c[0].After != "true" {
		t.Errorf("diff: %v", c)
	}
	if p := l.do(resultApplied, "cordon", map[string]any{"target": "no/worker-17"}).Plan; len(p.Objects) != 0 || !strings.Contains(p.Summary, "cordoned already") {
		t.Errorf("cordoned twice: %v", p)
	}
	l.do(resultApplied, "undo", map[string]any{"action": r.Action})
	if string(l.value(key)) != string(before) {
		t.Errorf("undo left %q, was %q", l.value(key), before)
	}
	if p := l.do(resultApplied, "uncordon", map[string]any{"target": "worker-17"}).Plan; len(p.Objects) != 0 {
		t.Errorf("uncordoned what was open: %v", p)
	}
	l.do(resultApplied, "cordon", map[string]any{"target": "worker-17"})
	if p := l.do(resultApplied, "uncordon", map[string]any{"target": "worker-17"}).Plan; !open() || !strings.Contains(strings.Join(p.Needs, ""), "taint") {
		t.Errorf("not open again: %v", p)
	}

	for target, code := range map[string]fault.Code{"": fault.Usage, "nodes": fault.NotFound, "nodes/": fault.Usage, "deploy/worker-17": fault.Usage, "worker-17/x": fault.Usage,
		"../worker-17": fault.Usage, "worker-18": fault.NotFound, "Worker 17": fault.NotFound, "worker\n17": fault.Usage, strings.Repeat("a", 300): fault.NotFound} {
		l.refuses(code, "", "cordon", map[string]any{"target": target})
		l.refuses(code, "", "uncordon", map[string]any{"target": target})
	}
	l.refuses(fault.Usage, "unknown field", "cordon", map[string]any{"target": "worker-17", "namespace": "shop"})
	l.refuses(fault.Usage, "does not fit", "cordon", map[string]any{"target": 17})
	if _, err := l.planAs(by("olga", trust.Observer), "cordon", map[string]any{"target": "worker-17"}); !fault.Is(err, fault.Refused) {
		t.Errorf("an observer cordons: %v", err)
	}
	l.tighten(`{version: 1, protect: [{actions: [cordon], resources: [nodes], names: ["worker-*"], why: the batch runs}]}`)
	l.refuses(fault.Refused, "the batch runs", "cordon", map[string]any{"target": "worker-17"})
}
