// Package ways keeps the ways into a daemon open. An address may come up late,
// and a bundle or a certificate be copied later: what cannot be opened is told
// once, tried again for ever, and named for as long as it lasts.
//
// It must never end a daemon since one of its ways in is shut: one is better than
// none. It stands on floor 0.
package ways

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// retryEvery is how often what could not be opened is tried again.
const retryEvery = 2 * time.Second

// Ways are the ways into one daemon, by their names. Its methods may be called
// concurrently.
type Ways struct {
	raise func(alarm.Event)
	log   zerolog.Logger

	mu   sync.Mutex // guards all below
	shut map[string]string
	open map[string]bool
	came map[string]uint64
}

// New returns ways that are neither open nor shut yet. raise must not block.
func New(raise func(alarm.Event), log zerolog.Logger) *Ways {
	return &Ways{raise: raise, log: log, shut: map[string]string{}, open: map[string]bool{}, came: map[string]uint64{}}
}

// Keep runs a way in until it returns nil or the context ends, and again when it
// fails. What runs says by Opened that it works.
func (w *Ways) Keep(ctx context.Context, name string, run func() error) {
	for {
		err := run()
		if ctx.Err() != nil || err == nil {
			return
		}
		why := neutral.LineMax(fault.Of(err).Error(), 512)
		w.mu.Lock()
		again := w.shut[name] == why
		w.shut[name] = why
		delete(w.open, name)
		w.mu.Unlock()
		if !again {
			w.log.Error().Str("door", name).Msg("not open: " + why)
			w.raise(alarm.Event{Kind: alarm.Closed, Text: name + ": " + why})
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryEvery):
		}
	}
}

// Listen keeps a way in open at one TCP address, under its name and the address,
// until the context ends. serve closes the listener and returns when it ends.
func (w *Ways) Listen(ctx context.Context, name, address string, serve func(net.Listener) error) {
	kind := name
	name += " " + address
	w.Keep(ctx, name, func() error {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err != nil {
			return err
		}
		defer l.Close()
		w.Opened(name)
		return serve(counted{l, func() { w.count(kind) }})
	})
}

// counted is a listener whose connections are counted.
type counted struct {
	net.Listener
	count func()
}

func (c counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.count()
	}
	return conn, err
}

func (w *Ways) count(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.came[name]++
}

// Came counts the connections that came by a way, at all of its addresses and
// whoever they were.
func (w *Ways) Came(name string) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.came[name]
}

// Opened tells that a way in works.
func (w *Ways) Opened(name string) {
	w.mu.Lock()
	delete(w.shut, name)
	w.open[name] = true
	w.mu.Unlock()
	w.log.Info().Str("door", name).Msg("open")
}

// Open reports whether a way in works.
func (w *Ways) Open(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.open[name]
}

// Shut tells which ways in do not work and why, each in one line.
func (w *Ways) Shut() (all []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, why := range w.shut {
		all = append(all, name+" is not open: "+why)
	}
	slices.Sort(all)
	return all
}
