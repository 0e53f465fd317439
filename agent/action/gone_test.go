package action

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// compact makes etcd forget everything but the present, after before has run.
func (l *lab) compact(before func()) {
	l.t.Helper()
	for range 2 {
		got, err := l.raw.Put(l.ctx(), "/other", "x")
		if err != nil {
			l.t.Fatal(err)
		}
		before()
		if _, err := l.raw.Compact(l.ctx(), got.Header.Revision); err != nil {
			l.t.Fatal(err)
		}
	}
}

func unseen() {}

// again ends the agent and starts it anew, with its file.
func (l *lab) again(change func(*Options)) {
	l.t.Helper()
	if l.options.Journal != nil {
		l.options.Journal.Close()
	}
	l.start(func(o *Options) {
		o.Gone = filepath.Join(l.dir, "gone")
		if change != nil {
			change(o)
		}
	})
}

func (l *lab) look() {
	l.t.Helper()
	if err := l.engine.lookAtGone(l.ctx()); err != nil {
		l.t.Fatal(err)
	}
}

// TestUndoAfterCompaction: who revoked takes it back an hour later, alone, though
// etcd has forgotten by then, and the agent was restarted.
func TestUndoAfterCompaction(t *testing.T) {
	l := newLab(t, 1)
	l.again(nil)
	file := filepath.Join(l.dir, "gone")
	l.put(collector())
	l.do(resultApplied, "scale", stopCollector)
	l.look()
	if _, err := os.Stat(file); err == nil {
		t.Error("something is kept while there is nothing to prove")
	}
	keys := []string{l.put(binding("collector", account("telemetry", "collector"))), l.put(binding("second", account("telemetry", "collector"))),
		l.put(&corev1.ServiceAccount{ObjectMeta: labelled("telemetry", "collector")})}
	var before [][]byte
	for _, key := range keys {
		before = append(before, l.value(key))
	}
	r := l.do(resultApplied, "revoke", map[string]any{"subject": "system:serviceaccount:telemetry:collector", "hard": true})
	for range 3 {
		l.compact(l.look)
	}
	l.again(nil) // shorter than etcd's memory: history goes back to the last look
	l.compact(l.look)
	undo := map[string]any{"action": r.Action}
	p, err := l.plan("undo", undo)
	if err != nil || p.AddsAuthority || p.ApprovalsNeeded != 0 {
		t.Fatalf("%v, %v", p, err)
	}
	l.compact(l.look) // between the plan and its application
	l.apply(responder, p, resultApplied, "", false)
	for i, key := range keys {
		if !bytes.Equal(l.value(key), before[i]) {
			t.Errorf("%s is not as it was", key)
		}
	}
	l.look()
	if data, err := os.ReadFile(file); err != nil || strings.Contains(string(data), "collector") {
		t.Errorf("%s, %v", data, err)
	}
}

// TestGoneAttacked: somebody made the binding again and deleted it, at a moment
// that etcd has forgotten; or nobody was there to look.
func TestGoneAttacked(t *testing.T) {
	l := newLab(t, 1)
	l.again(nil)
	now := time.Now()
	key := l.put(binding("collector", account("telemetry", "collector")))
	value := l.value(key)
	comeAndGo := func() {
		t.Helper()
		l.putRaw(key, value)
		if _, err := l.raw.Delete(l.ctx(), key); err != nil {
			t.Fatal(err)
		}
	}
	remove := func() map[string]any {
		t.Helper()
		l.putRaw(key, value)
		return map[string]any{"action": l.do(resultApplied, "delete", map[string]any{"target": "clusterrolebinding/collector"}).Action}
	}

	// Seen, and remembered beyond compaction and restart.
	undo := remove()
	l.compact(l.look)
	comeAndGo()
	l.compact(l.look)
	l.again(nil)
	l.look()
	l.refuses(fault.Stale, "was made again and deleted by somebody", "undo", undo)

	// Not seen before etcd forgot; and what comes after it does not heal it.
	undo = remove()
	l.look()
	comeAndGo()
	l.compact(unseen)
	l.refuses(fault.Stale, "compacted before this agent looked", "undo", undo)
	l.look()
	l.look()
	l.refuses(fault.Stale, "compacted before this agent looked", "undo", undo)

	// An agent that was down for longer than etcd's memory, and one whose file is
	// gone or open to others.
	for _, spoil := range map[string]func(file string) error{
		"down":    func(string) error { return nil },
		"removed": os.Remove,
		"lax":     func(file string) error { return os.Chmod(file, 0o644) },
		"torn":    func(file string) error { return os.WriteFile(file, []byte(`{"format":1,"ke`), 0o600) },
	} {
		undo = remove()
		l.look()
		if err := spoil(filepath.Join(l.dir, "gone")); err != nil {
			t.Fatal(err)
		}
		l.compact(unseen)
		l.again(nil)
		l.look()
		l.refuses(fault.Stale, "compacted before this agent looked", "undo", undo)
	}
	// A commander can, with an approval.
	l.again(func(o *Options) { o.Approvals = signed(nil) })
	carol := by("carol", trust.Commander)
	p, err := l.planAs(carol, "undo", undo)
	if err != nil || p.ApprovalsNeeded != 1 {
		t.Fatalf("%v, %v", p, err)
	}
	l.apply(carol, p, resultApplied, "", false, "bob/k1")

	// After a day nothing is looked at any more.
	remove()
	l.look()
	l.again(func(o *Options) { o.Now = func() time.Time { return now.Add(undoOwn + time.Hour) } })
	l.look()
	if n := len(l.engine.gone.Keys); n != 0 {
		t.Errorf("%d keys are looked at after a day", n)
	}
}
