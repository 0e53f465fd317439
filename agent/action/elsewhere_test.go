package action

import (
	"strings"
	"testing"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

// TestElsewhere: kinds of another etcd are refused by name, never "not found"; a
// plan that would only have looked at them warns.
func TestElsewhere(t *testing.T) {
	l := newLab(t, 1)
	l.engine.journal.Close()
	l.start(func(o *Options) {
		o.Elsewhere = map[string][]string{"events": {"10.0.0.5:2379", "10.0.0.6:2379"}, "*.coordination.k8s.io": nil, "daemonsets.extensions": {"10.0.0.7:2379"}}
	})
	l.put(collector())
	for target, want := range map[string]string{
		"events":               "events live in another etcd (10.0.0.5:2379, 10.0.0.6:2379), which this agent does not reach",
		"ev/x":                 "events live in another etcd (10.0.0.5:2379",
		"events.events.k8s.io": "events.events.k8s.io live in another etcd (10.0.0.5:2379", // one storage
		"leases":               "leases.coordination.k8s.io live in another etcd, which",
	} {
		_, err := l.engine.Get(l.ctx(), responder, &halliganv1.GetRequest{Parameters: parameters(t, map[string]any{"target": target, "namespace": "telemetry"}), Reason: "test"}, func(*halliganv1.Object) error { return nil })
		if !fault.Is(err, fault.Failed) || !strings.Contains(err.Error(), want) || fault.Of(err).Next == "" {
			t.Errorf("get %s: %v", target, err)
		}
		if strings.Contains(target, "/") {
			l.refuses(fault.Failed, want, "delete", map[string]any{"target": target, "namespace": "telemetry"})
		}
	}
	p, err := l.plan("scale", stopCollector)
	if err != nil || !strings.Contains(strings.Join(p.Warnings, "\n"), "leases.coordination.k8s.io live in another etcd") {
		t.Errorf("%v, %v", p.GetWarnings(), err)
	}
}
