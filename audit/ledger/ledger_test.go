package ledger

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/halligan-io/halligan/audit"
)

func TestMain(m *testing.M) {
	flag.Parse()
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	os.Exit(m.Run())
}

const minute = time.Minute

func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func mustOpen(t testing.TB, o Options) *Ledger {
	t.Helper()
	if o.Origin == "" {
		o.Origin = "cp-1.prod"
	}
	l, err := open(o, 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func events(t testing.TB, l *Ledger) (all []audit.Event) {
	t.Helper()
	for _, h := range l.Heads() {
		for entry, err := range l.Entries(t.Context(), h.Lineage, h.Generation, 0, h.Size) {
			if err != nil {
				t.Fatal(err)
			}
			var e audit.Event
			if err := json.Unmarshal(entry, &e); err != nil {
				t.Fatal(err)
			}
			all = append(all, e)
		}
	}
	return all
}

// TestAppend: events are in the tree in order, over several processes' lives, and
// each checkpoint is there within moments.
func TestAppend(t *testing.T) {
	dir := t.TempDir() + "/audit"
	for life := range 3 {
		l := mustOpen(t, Options{Dir: dir})
		l.Note(audit.Event{Kind: audit.Start})
		for i := range 3 {
			r, err := l.Append(within(t, minute), audit.Event{Kind: audit.Intent, Text: fmt.Sprint(i)})
			if err != nil || r.Where != audit.Local || r.Seq != uint64(life*4+i+1) {
				t.Fatalf("%+v, %v", r, err)
			}
			if err := l.SignedWithin(within(t, minute), r.Seq); err != nil {
				t.Fatal(err)
			}
		}
		if s := l.State(); s.Events != uint64(life*4+4) || s.Signed != s.Events || s.Reserve != 2048 || s.Problem != "" || s.Refused != "" {
			t.Errorf("%+v", s)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		all := events(t, l)
		for i, e := range all {
			if e.Seq != uint64(i) || e.Origin != "cp-1.prod" || e.Version != audit.Version || e.Uptime == 0 || e.Boot == "" || e.ID == "" {
				t.Errorf("%+v", e)
			}
		}
		if len(all) != life*4+4 {
			t.Errorf("%d events", len(all))
		}
	}
}
