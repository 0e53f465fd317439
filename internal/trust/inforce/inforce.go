// Package inforce is whom a daemon believes while it runs: the bundle in force,
// the clock that goes with it, and who may come in by both. It follows the bundle
// as it changes, and tells of what is wrong with it.
//
// It must never keep anybody out who could be let in by a bundle that was good
// once, and never stop its daemon: what fails is told, and tried again. It stands
// on floor 0.
package inforce

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/version"
)

// Options of a daemon's trust. All are required but for those of Credential.
type Options struct {
	// Daemon is what people call it: agent, bastion.
	Daemon string
	// Server is the daemon's own identity, NODE.CLUSTER.
	Server string
	// Path is the bundle's file, State where the newest is kept; see
	// bundle.Options.
	Path, State string
	Anchor      *bundle.Anchor
	Clock       *trust.Clock
	// Credential says who may come in; its Bundle, Clock, Alarm and Panicked are
	// set here.
	Credential credential.Options
	// Raise takes alarms. It must not block.
	Raise func(alarm.Event)
	// Believe is told in one line of each bundle that comes in force; may be nil. It
	// must not block.
	Believe func(text string)
	Log     zerolog.Logger
}

// Trust is whom a daemon believes. Its methods may be called concurrently, Open
// by one at a time.
type Trust struct {
	o      Options
	opened atomic.Pointer[opened] // nil until there is a bundle that can be used

	mu      sync.Mutex // guards all below
	trouble string     // with the bundle; "" when another came in force since
	// beyond tells of moments that are left out of the clock, "" for none; told
	// that the alarm of it was raised.
	beyond string
	told   bool
}

// opened is what a bundle makes possible.
type opened struct {
	store     *bundle.Store
	authority *credential.Authority
	servers   *credential.Servers
}

// New returns what is believed before there is a bundle, which is nobody.
func New(o Options) *Trust { return &Trust{o: o} }

// Open reads the bundle. Where it fails it may be called again; once it has
// worked it does nothing.
func (t *Trust) Open() error {
	if t.opened.Load() != nil {
		return nil
	}
	o := bundle.Options{Path: t.o.Path, State: t.o.State, Anchor: t.o.Anchor, Now: t.o.Clock.Now, Floor: version.Built(),
		Log: t.believe, Alarm: t.Complain}
	store, err := bundle.Open(o)
	if err != nil {
		// Where the disk of the state folder fails, the copy of root's still
		// lets people in.
		o.State = ""
		second, serr := bundle.Open(o)
		if serr != nil {
			return err
		}
		store = second
		t.Complain(err)
	}
	t.o.Clock.Raise(store.Current().Signed())
	c := t.o.Credential
	c.Bundle, c.Clock, c.Alarm, c.Panicked = store, t.o.Clock, t.unusual, t.panicked
	t.opened.Store(&opened{store, credential.New(c), &credential.Servers{Bundle: store, Clock: t.o.Clock}})
	return nil
}

// believe tells of a bundle that came in force.
func (t *Trust) believe(text string) {
	text = neutral.Line(text)
	t.o.Log.Info().Msg(text)
	if t.o.Believe != nil {
		t.o.Believe(text)
	}
}

// Watch follows the bundle that was opened until the context ends.
func (t *Trust) Watch(ctx context.Context) {
	store := t.opened.Load().store
	changed, cancel := store.Subscribe()
	defer cancel()
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { t.keep(ctx, func() { store.Watch(ctx) }) })
	t.keep(ctx, func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
				t.o.Clock.Raise(store.Current().Signed())
				t.setTrouble(nil)
			}
		}
	})
}

// againAfter is how long after a fault what follows the bundle is begun anew.
const againAfter = time.Second

// keep runs something until the context ends, and again where it panics.
func (t *Trust) keep(ctx context.Context, run func()) {
	for ctx.Err() == nil {
		func() {
			defer func() {
				if p := recover(); p != nil {
					t.panicked(trust.Identity{}, p, debug.Stack())
				}
			}()
			run()
		}()
		select {
		case <-ctx.Done():
		case <-time.After(againAfter):
		}
	}
}

// panicked tells of a fault of the daemon. Raising it may be what is at fault.
func (t *Trust) panicked(who trust.Identity, what any, stack []byte) {
	defer func() { _ = recover() }()
	t.o.Log.Error().Str("person", who.Person).Str("panic", neutral.LineMax(fmt.Sprint(what), 512)).Bytes("stack", stack).Msg("panic while the bundle was followed")
	t.o.Raise(alarm.Of(alarm.Panic, who, "a fault of the "+t.o.Daemon+" while it followed the bundle; its log has the stack"))
}

// Current returns the bundle in force, nil before there is one.
func (t *Trust) Current() *bundle.Bundle {
	if o := t.opened.Load(); o != nil {
		return o.store.Current()
	}
	return nil
}

// Store returns where the bundle is kept, nil before there is one.
func (t *Trust) Store() *bundle.Store {
	if o := t.opened.Load(); o != nil {
		return o.store
	}
	return nil
}

// Authority says who may come in, nil before there is a bundle.
func (t *Trust) Authority() *credential.Authority {
	if o := t.opened.Load(); o != nil {
		return o.authority
	}
	return nil
}

// Servers verifies agents and bastions to whom the daemon connects, nil before there
// is a bundle.
func (t *Trust) Servers() *credential.Servers {
	if o := t.opened.Load(); o != nil {
		return o.servers
	}
	return nil
}

// Offer takes a bundle over that somebody brings. An older one is no error, since
// who has it gets the newer.
func (t *Trust) Offer(data []byte) (changed bool, err error) {
	o := t.opened.Load()
	if o == nil {
		return false, t.None()
	}
	changed, err = o.store.Offer(data)
	if changed || errors.Is(err, bundle.ErrOlder) {
		return changed, nil
	}
	return false, err
}

// None is the error of whoever needs the bundle before there is one.
func (t *Trust) None() error {
	return fault.New(fault.Refused, "copy the bundle there (trust.bundle in the "+t.o.Daemon+"'s configuration)", "this %s has no bundle that it can use", t.o.Daemon)
}

// Raw returns the bundle in force as a file, nil before there is one.
func (t *Trust) Raw() []byte {
	if o := t.opened.Load(); o != nil {
		return o.store.Raw()
	}
	return nil
}

// Complain tells of trouble with the bundle.
func (t *Trust) Complain(err error) {
	if again := !t.setTrouble(err); again && t.opened.Load() == nil {
		return // it is tried every few seconds
	}
	t.o.Raise(alarm.Event{Kind: alarm.Bundle, Text: fault.Of(err).Error()})
}

// setTrouble notes what is wrong, nil for nothing, and whether that is new.
func (t *Trust) setTrouble(err error) (changed bool) {
	text := ""
	if err != nil {
		text = neutral.LineMax(fault.Of(err).Error(), 512)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	changed = t.trouble != text
	t.trouble = text
	return changed
}

// unusual tells of a session that must not go unnoticed.
func (t *Trust) unusual(who trust.Identity, why string) {
	kind := alarm.Late
	if who.Kind == trust.Sealed {
		kind = alarm.Sealed
	}
	t.o.Raise(alarm.Of(kind, who, why))
}

// Limits of what is worth a warning.
const (
	clockWarning       = time.Minute
	certificateWarning = 72 * time.Hour
)

// ClockWarnings tells, in a line each, of a wall clock that is not right or was not.
func (t *Trust) ClockWarnings() (all []string) {
	if ahead := t.o.Clock.Ahead(); ahead > clockWarning {
		all = append(all, fmt.Sprintf("the clock here is %v behind what is known to be past: %s counts", ahead.Round(time.Second), t.o.Clock.Now().Format(time.RFC3339)))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.beyond != "" {
		all = append(all, t.beyond)
	}
	return all
}

// BundleWarnings tells what is wrong with the bundle, in one line each. Where
// there is none, or a stale one, what that means is the daemon's to say.
func (t *Trust) BundleWarnings(none, stale string) (all []string) {
	t.mu.Lock()
	trouble := t.trouble
	t.mu.Unlock()
	if trouble != "" {
		all = append(all, "the bundle: "+trouble)
	}
	b := t.Current()
	if b == nil {
		return append(all, none+", since there is no bundle that can be used")
	}
	if !b.Fresh(t.o.Clock.Now()) {
		all = append(all, "the bundle is stale since "+b.FreshUntil().UTC().Format(time.RFC3339)+": "+stale)
	}
	return all
}

// HostWarnings tells what clients will find wrong with the certificate of the
// daemon's SSH host.
func (t *Trust) HostWarnings(cert *ssh.Certificate) []string {
	const forever = 1 << 40
	return t.shown("SSH host certificate", time.Unix(int64(min(cert.ValidBefore, forever)), 0), // #nosec G115 -- bounded
		func(s *credential.Servers) error { return s.HostKey(t.o.Server)("", nil, cert) })
}

// ServerWarnings tells what clients will find wrong with the daemon's TLS
// certificate.
func (t *Trust) ServerWarnings(cert *tls.Certificate) []string {
	return t.shown("gRPC certificate", cert.Leaf.NotAfter,
		func(s *credential.Servers) error {
			return s.ServerCertificate(t.o.Server, []*x509.Certificate{cert.Leaf})
		})
}

// shown holds a certificate against its end, and against the rules of clients.
func (t *Trust) shown(what string, end time.Time, verify func(*credential.Servers) error) (all []string) {
	left := end.Sub(t.o.Clock.Now())
	if left <= 0 {
		return []string{fmt.Sprintf("the %s's %s ended at %s: replace it", t.o.Daemon, what, end.UTC().Format(time.RFC3339))}
	}
	if left < certificateWarning {
		all = append(all, fmt.Sprintf("the %s's %s ends in %v: replace it", t.o.Daemon, what, left.Round(time.Minute)))
	}
	if o := t.opened.Load(); o != nil {
		if err := verify(o.servers); err != nil {
			all = append(all, fmt.Sprintf("clients refuse the %s's %s, so replace it: %s", t.o.Daemon, what, neutral.LineMax(fault.Of(err).Message, 256)))
		}
	}
	return all
}
