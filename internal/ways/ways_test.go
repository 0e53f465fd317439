package ways

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/alarm"
)

// TestKeep: what fails is told once for each reason, tried again, and forgotten
// when it works.
func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []string
		w := New(func(e alarm.Event) { told = append(told, string(e.Kind)+" "+e.Text) }, zerolog.Nop())
		ctx, cancel := context.WithCancel(t.Context())
		var tries atomic.Int32
		works := make(chan error)
		var keeping sync.WaitGroup
		keeping.Go(func() {
			w.Keep(ctx, "ssh", func() error {
				if n := tries.Add(1); n < 4 {
					return errors.New([]string{"no key", "no key", "no\x1bcertificate"}[n-1])
				}
				w.Opened("ssh")
				return <-works
			})
		})
		synctest.Wait()
		if got := w.Shut(); !slices.Equal(got, []string{"ssh is not open: no key"}) || w.Open("ssh") {
			t.Error(got)
		}
		works <- errors.New("broken") // once it has come so far
		synctest.Wait()
		if want := []string{"closed ssh: no key", `closed ssh: no\x1bcertificate`, "closed ssh: broken"}; !slices.Equal(told, want) || tries.Load() != 4 {
			t.Errorf("told %q after %d tries, want %q", told, tries.Load(), want)
		}
		if got := w.Shut(); len(got) != 1 || w.Open("ssh") {
			t.Error(got)
		}
		works <- errors.New("broken")
		if got := w.Shut(); len(got) > 1 {
			t.Error(got)
		}
		cancel()
		keeping.Wait()
		w.Keep(t.Context(), "bundle", func() error { w.Opened("bundle"); return nil }) // is done
		if !w.Open("bundle") {
			t.Error("what works is not open")
		}
	})
}

// TestListen waits for an address that another has.
func TestListen(t *testing.T) {
	first, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := first.Addr().String()
	shut := make(chan struct{}, 1)
	w := New(func(alarm.Event) { shut <- struct{}{} }, zerolog.Nop())
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan string, 1)
	var listening sync.WaitGroup
	listening.Go(func() {
		w.Listen(ctx, "ssh", address, func(l net.Listener) error {
			served <- l.Addr().String()
			<-ctx.Done()
			return nil
		})
	})
	<-shut
	first.Close()
	if got := <-served; got != address || !w.Open("ssh "+address) || len(w.Shut()) != 0 {
		t.Errorf("serves at %s; shut: %v", got, w.Shut())
	}
	cancel()
	listening.Wait()
	if c, err := net.Dial("tcp", address); err == nil {
		c.Close()
		t.Error("it still listens")
	}
}
