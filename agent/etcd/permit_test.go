package etcd

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/halligan-io/halligan/audit"
	"github.com/halligan-io/halligan/internal/etcdcluster"
	"github.com/halligan-io/halligan/internal/fault"
)

// anything takes every event and keeps none.
type anything struct{}

func (anything) Append(context.Context, audit.Event) (audit.Receipt, error) {
	return audit.Receipt{ID: "i", Where: audit.Local}, nil
}
func (anything) Note(audit.Event)                        {}
func (anything) Reserve(audit.Event) (audit.Room, error) { return anything{}, nil }
func (anything) Release()                                {}
func (anything) Hash([]byte) string                      { return "" }
func (anything) State() audit.State                      { return audit.State{} }

// granted returns a permit that holds as long as the process.
var granted = sync.OnceValue(func() audit.Permit {
	permits := make(chan audit.Permit)
	go func() {
		_, _ = audit.Do(context.Background(), anything{}, audit.Event{}, func(_ context.Context, p audit.Permit) []audit.Event {
			permits <- p
			select {}
		})
	}()
	return <-permits
})

// TestNoWriteWithoutPermit: nothing is sent for an intent that is not on record, or
// is over.
func TestNoWriteWithoutPermit(t *testing.T) {
	cluster := etcdcluster.ForTest(t, 1)
	c := open(t, cluster)
	ctx := bound(t, 20*time.Second)
	var old audit.Permit
	if _, err := audit.Do(ctx, anything{}, audit.Event{}, func(_ context.Context, p audit.Permit) []audit.Event { old = p; return nil }); err != nil {
		t.Fatal(err)
	}
	for what, permit := range map[string]audit.Permit{"none": {}, "of before": old} {
		_, err := c.Commit(ctx, permit, Write{Key: "/unseen", Value: []byte("v")})
		wantFault(t, err, fault.AuditUnavailable)
		if _, found, _, err := c.Get(ctx, "/unseen"); found || err != nil {
			t.Errorf("permit %s: found %v, %v", what, found, err)
		}
	}
	if _, err := c.Commit(ctx, granted(), Write{Key: "/unseen", Value: []byte("v")}); err != nil {
		t.Error(err)
	}
}
