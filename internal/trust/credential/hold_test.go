package credential_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

func isRevoked(err error) bool { return errors.Is(err, trust.ErrRevoked) }

// ended waits for the end of a session and returns how long that took. A second
// is promised; the machine may be slow.
func ended(t *testing.T, ctx context.Context) (time.Duration, error) {
	t.Helper()
	began := time.Now()
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the session goes on")
	}
	return time.Since(began), context.Cause(ctx)
}

func TestHold(t *testing.T) {
	for _, c := range []struct {
		name    string
		deaf    bool
		happens func(f *fleet)
		revoked bool
		wants   string
	}{
		{"serial revoked", false, func(f *fleet) { f.revocations.Serials = []bundle.Serial{{Serial: 7}}; f.sign() }, true, "revoked"},
		{"authority gone", false, func(f *fleet) {
			f.policy.Authorities.User = []bundle.Key{{PublicKey: f.public("other-ca")}}
			f.sign()
		}, true, "no longer in the policy"},
		{"revoked, and the store tells nobody", true, func(f *fleet) { f.revocations.KeyIDs = []string{"alice@acme.test"}; f.sign() }, true, "revoked"},
		{"the wall clock passes the end", false, func(f *fleet) { f.clock.set(t0.Add(23 * time.Hour)) }, false, "ended at"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t)
			f.store.deaf = c.deaf
			a := f.authority()
			id, err := a.User(f.certify(order{}), "responder", from)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := a.Hold(t.Context(), id)
			defer cancel()
			f.sign() // a bundle that changes nothing
			if ctx.Err() != nil {
				t.Fatal(context.Cause(ctx))
			}
			c.happens(f)
			took, cause := ended(t, ctx)
			t.Logf("ended after %v", took)
			if !fault.Is(cause, fault.Unauthenticated) || isRevoked(cause) != c.revoked || !strings.Contains(cause.Error(), c.wants) {
				t.Errorf("cause %v; want %q", cause, c.wants)
			}
			cancel()
			if n := f.store.subscribers(); n != 0 {
				t.Errorf("%d subscribers are left", n)
			}
			if len(f.alarms) != 0 {
				t.Errorf("an alarm for an ordinary session: %s", <-f.alarms)
			}
		})
	}
}

// faulty is a clock that breaks.
type faulty struct {
	*clock
	broken atomic.Bool
}

func (c *faulty) Now() time.Time {
	if c.broken.Load() {
		panic("no time")
	}
	return c.clock.Now()
}

// TestHoldPanic: who can no longer be watched is out, and nothing else ends.
func TestHoldPanic(t *testing.T) {
	f := newFleet(t)
	broken := &faulty{clock: f.clock}
	told := make(chan string, 1)
	a := credential.New(credential.Options{Bundle: f.store, Clock: broken, Cluster: "prod", Node: "cp-1",
		Panicked: func(who trust.Identity, what any, stack []byte) { told <- fmt.Sprint(who.Person, what, len(stack) > 0) }})
	id, err := a.User(f.certify(order{}), "responder", from)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := a.Hold(t.Context(), id)
	defer cancel()
	broken.broken.Store(true)
	if _, cause := ended(t, ctx); !fault.Is(cause, fault.Unauthenticated) || isRevoked(cause) || !strings.Contains(cause.Error(), "is not known") {
		t.Error(cause)
	}
	if got := <-told; got != id.Person+"no timetrue" {
		t.Error(got)
	}
	cancel()
	if n := f.store.subscribers(); n != 0 {
		t.Errorf("%d subscribers are left", n)
	}
}

// The wall clock stands still, as if somebody held it back.
func TestHoldMonotonic(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	id, err := a.User(f.certify(order{}), "responder", from)
	if err != nil {
		t.Fatal(err)
	}
	f.clock.set(id.NotAfter.Add(-50 * time.Millisecond))
	ctx, cancel := a.Hold(t.Context(), id)
	defer cancel()
	if _, cause := ended(t, ctx); isRevoked(cause) || !strings.Contains(cause.Error(), "ended at") {
		t.Error(cause)
	}
}

func TestHoldLate(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	cert := f.certify(order{})
	f.clock.set(t0.Add(24 * time.Hour))
	id, err := a.User(cert, "responder", from)
	if err != nil || !id.Late || len(f.alarms) != 0 {
		t.Fatalf("%+v, %v", id, err)
	}
	ctx, cancel := a.Hold(t.Context(), id)
	if text := <-f.alarms; !strings.Contains(text, "alice@acme.test") || !strings.Contains(text, "past an edge") {
		t.Error(text)
	}
	f.clock.set(t0.Add(25*time.Hour - time.Second))
	f.sign()
	if err := a.Check(id); err != nil || ctx.Err() != nil {
		t.Error("ended within the grace:", err)
	}
	f.clock.set(t0.Add(25 * time.Hour))
	if _, cause := ended(t, ctx); !strings.Contains(cause.Error(), "ended at") {
		t.Error(cause)
	}
	cancel()
	f.clock.set(t0.Add(25*time.Hour - 50*time.Millisecond))
	ctx, cancel = a.Hold(t.Context(), id)
	defer cancel()
	if _, cause := ended(t, ctx); !strings.Contains(cause.Error(), "ended at") {
		t.Error("by the monotonic clock:", cause)
	}
}

func TestHoldSealed(t *testing.T) {
	f := newFleet(t)
	a := f.authority()
	key := securityKey(t)
	f.policy.Sealed = []bundle.Sealed{{Person: "carol", Key: bundle.Key{PublicKey: key}, Role: "commander", Clusters: []string{"prod"}, NotBefore: t0, NotAfter: t0.Add(time.Hour)}}
	f.sign()
	id, err := a.User(key, "commander", from)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // each use
		ctx, cancel := a.Hold(t.Context(), id)
		if text := <-f.alarms; !strings.Contains(text, "carol: a sealed credential") {
			t.Error(text)
		}
		cancel()
		if !errors.Is(context.Cause(ctx), context.Canceled) {
			t.Error("cancel does not end the session quietly")
		}
	}
	f.policy.Sealed = nil
	f.sign()
	ctx, cancel := a.Hold(t.Context(), id)
	defer cancel()
	if cause := context.Cause(ctx); !isRevoked(cause) {
		t.Errorf("held what is not listed: %v", cause)
	}
	if len(f.alarms) != 0 || f.store.subscribers() != 0 {
		t.Error("traces of a session that never was")
	}
}

func TestHoldLocal(t *testing.T) {
	f := newFleet(t)
	parent, end := context.WithCancel(t.Context())
	ctx, cancel := f.authority().Hold(parent, trust.Identity{Person: "console/0", Kind: trust.Local})
	defer cancel()
	f.clock.set(t0.AddDate(9, 0, 0))
	f.sign()
	if ctx.Err() != nil {
		t.Error(context.Cause(ctx))
	}
	end()
	if _, cause := ended(t, ctx); !errors.Is(cause, context.Canceled) {
		t.Error(cause)
	}
}
