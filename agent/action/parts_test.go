package action

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

var overFour = []trust.ApprovalRule{{Actions: []string{"delete"}, OverObjects: 4, Count: 1, Alone: true, Why: "a mass deletion"}}

// parted stores n lots of three objects, labelled with their lot.
func (l *lab) parted(n int) func(lot int) map[string]any {
	l.t.Helper()
	for lot := range n {
		for i := range 3 {
			l.put(&corev1.ConfigMap{ObjectMeta: labelled("a", fmt.Sprint("c", lot, "-", i), "lot", fmt.Sprint(lot))})
		}
	}
	return func(lot int) map[string]any {
		return map[string]any{"target": "cm", "namespace": "a", "selector": fmt.Sprint("lot=", lot)}
	}
}

// TestMassInParts: what needs an approval as a whole needs it in parts as well.
func TestMassInParts(t *testing.T) {
	l := newLab(t, 1)
	some := l.parted(6)
	l.under(7, trust.Rules{Approvals: overFour})
	l.engine.approvals = signed(nil)
	first := l.do(resultApplied, "delete", some(0))
	p, err := l.plan("delete", some(1))
	if err != nil || p.ApprovalsNeeded != 1 || !strings.Contains(p.ApprovalReason, "a mass deletion (with 3 objects that alice changed within the hour)") {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(responder, p, resultAwaiting, "a mass deletion", false)
	l.apply(responder, p, resultApplied, "", false, "bob/k1")
	// What was approved is not counted again, what one did alone is; another
	// person begins anew.
	if p, err = l.plan("delete", some(2)); err != nil || !strings.Contains(p.ApprovalReason, "with 3 objects") {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(responder, p, resultApplied, "", true)
	if p, err = l.plan("delete", some(3)); err != nil || !strings.Contains(p.ApprovalReason, "with 6 objects") {
		t.Fatalf("%v, %v", p, err)
	}
	if p, err = l.planAs(by("dave", trust.Responder), "delete", some(3)); err != nil || p.ApprovalsNeeded != 0 {
		t.Fatalf("%v, %v", p, err)
	}
	// Taking it back neither needs one nor makes room.
	l.do(resultApplied, "undo", map[string]any{"action": first.Action})
	if p, err = l.plan("delete", some(0)); err != nil || p.ApprovalsNeeded != 1 {
		t.Fatalf("%v, %v", p, err)
	}
	// The hour ends.
	l.engine.now = func() time.Time { return time.Now().Add(3 * time.Hour) }
	if p, err = l.plan("delete", some(4)); err != nil || p.ApprovalsNeeded != 0 {
		t.Fatalf("%v, %v", p, err)
	}
}

// TestPartsAtOnce: plans that were all made before the first was applied, and are
// applied together.
func TestPartsAtOnce(t *testing.T) {
	l := newLab(t, 1)
	some := l.parted(6)
	l.under(7, trust.Rules{Approvals: overFour})
	var plans []*halliganv1.Plan
	for lot := range 6 {
		p, err := l.plan("delete", some(lot))
		if err != nil || p.ApprovalsNeeded != 0 {
			t.Fatalf("%v, %v", p, err)
		}
		plans = append(plans, p)
	}
	l.engine.asked = time.Time{} // each asks etcd which cluster it is, so that all are decided on before one is done
	var all sync.WaitGroup
	results := make([]*halliganv1.Result, len(plans))
	for i, p := range plans {
		all.Go(func() { results[i] = l.engine.Apply(l.ctx(), responder, toApply(p), nil) })
	}
	all.Wait()
	for _, r := range results {
		if r.Result != resultApplied && !strings.Contains(r.Error.GetMessage(), "needs approvals by now") {
			t.Errorf("%v", r)
		}
	}
	if n, err := l.raw.Get(l.ctx(), "/registry/configmaps/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil || n.Count != 15 {
		t.Errorf("%d of 18 are left, %v", n.Count, err)
	}
}

// TestRedoCounts: who takes back that something was taken back does it again,
// which the caps of the hour bound.
func TestRedoCounts(t *testing.T) {
	l := newLab(t, 1)
	some := l.parted(1)
	l.tighten("version: 1\ncaps: {objectsPerHour: 7}\n")
	last := l.do(resultApplied, "delete", some(0))
	for range 2 { // 3, then 6
		last = l.do(resultApplied, "undo", map[string]any{"action": last.Action})
	}
	last = l.do(resultApplied, "undo", map[string]any{"action": last.Action})
	l.refuses(fault.Refused, "alice changed 6 objects within the hour; with 3 more it would pass the cap of 7", "undo", map[string]any{"action": last.Action})
	l.refuses(fault.Refused, "cap of 7", "delete", some(0))
}
