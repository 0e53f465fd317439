package bastion

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/version"
)

// trusted is whom the bastion believes: the bundle in force and what follows
// from it, once there is one. Its methods may be called concurrently.
type trusted struct {
	config Config
	anchor *bundle.Anchor
	clock  *trust.Clock
	alarms *alarm.Alarms
	log    zerolog.Logger

	opened atomic.Pointer[opened] // nil until there is a bundle that can be used

	mu      sync.Mutex // guards trouble
	trouble string     // with the bundle; "" when another came in force since
}

type opened struct {
	store     *bundle.Store
	authority *credential.Authority
}

func newTrusted(c Config, alarms *alarm.Alarms, log zerolog.Logger) (*trusted, error) {
	anchor, err := bundle.NewAnchor(c.Trust.Roots, c.Trust.Threshold, c.Trust.MinPolicyVersion)
	if err != nil {
		return nil, err
	}
	return &trusted{config: c, anchor: anchor, clock: trust.NewClock(version.Built()), alarms: alarms, log: log}, nil
}

// open reads the bundle; until that works, nobody can be known.
func (t *trusted) open() error {
	o := bundle.Options{Path: t.config.Trust.Bundle, State: filepath.Join(t.config.StateDir, "trust", "bundle"), Anchor: t.anchor, Now: t.clock.Now,
		Log: func(text string) { t.log.Info().Msg(neutral.Line(text)) }, Alarm: t.complain}
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
		t.complain(err)
	}
	t.clock.Raise(store.Current().Signed())
	authority := credential.New(credential.Options{Bundle: store, Clock: t.clock, Node: t.config.Name, Relay: true, Alarm: t.unusual})
	t.opened.Store(&opened{store, authority})
	return nil
}

// watch follows the bundle until the context ends.
func (t *trusted) watch(ctx context.Context) {
	store := t.opened.Load().store
	changed, cancel := store.Subscribe()
	defer cancel()
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { store.Watch(ctx) })
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
			t.clock.Raise(store.Current().Signed())
			t.setTrouble(nil)
		}
	}
}

// complain tells of trouble with the bundle.
func (t *trusted) complain(err error) {
	if again := !t.setTrouble(err); again && t.opened.Load() == nil {
		return // it is tried every few seconds
	}
	t.alarms.Raise(alarm.Event{Kind: alarm.Bundle, Text: fault.Of(err).Error()})
}

// setTrouble notes what is wrong, nil for nothing, and whether that is new.
func (t *trusted) setTrouble(err error) (changed bool) {
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
func (t *trusted) unusual(who trust.Identity, why string) {
	kind := alarm.Late
	if who.Kind == trust.Sealed {
		kind = alarm.Sealed
	}
	t.alarms.Raise(alarm.Of(kind, who, why))
}

// inventory returns the one in force, an empty one before there is any.
func (t *trusted) inventory() *bundle.Inventory {
	if o := t.opened.Load(); o != nil {
		return o.store.Current().Inventory
	}
	return &bundle.Inventory{}
}

var errNoBundle = fault.New(fault.Refused, "copy the bundle to the bastion (trust.bundle in its configuration)", "this bastion has no bundle that it can use")

// Offer takes a bundle over that somebody brings.
func (t *trusted) Offer(data []byte) (bool, error) {
	o := t.opened.Load()
	if o == nil {
		return false, errNoBundle
	}
	changed, err := o.store.Offer(data)
	if changed || errors.Is(err, bundle.ErrOlder) {
		return changed, nil // who has an older one gets the newer
	}
	return false, err
}

// Raw returns the bundle in force.
func (t *trusted) Raw() []byte {
	if o := t.opened.Load(); o != nil {
		return o.store.Raw()
	}
	return nil
}

// Status says which bundle is in force, nil for none.
func (t *trusted) Status() *halliganv1.BundleStatus {
	o := t.opened.Load()
	if o == nil {
		return nil
	}
	b := o.store.Current()
	return &halliganv1.BundleStatus{PolicyVersion: b.Policy.Version, InventoryVersion: b.Inventory.Version, RevocationsVersion: b.Revocations.Version,
		Signed: timestamppb.New(b.Signed()), FreshUntil: timestamppb.New(b.FreshUntil())}
}

// Limits of what is worth a warning.
const (
	clockWarning       = time.Minute
	certificateWarning = 72 * time.Hour
)

// warnings tells what is degraded about trust, each in one line.
func (t *trusted) warnings() (all []string) {
	warn := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	now := t.clock.Now()
	if ahead := t.clock.Ahead(); ahead > clockWarning {
		warn("this bastion's clock is %v behind what is known to be past: %s counts", ahead.Round(time.Second), now.UTC().Format(time.RFC3339))
	}
	t.mu.Lock()
	trouble := t.trouble
	t.mu.Unlock()
	if trouble != "" {
		warn("the bundle: %s", trouble)
	}
	o := t.opened.Load()
	if o == nil {
		warn("nobody is let in, since there is no bundle that can be used")
		return all
	}
	b := o.store.Current()
	if !b.Fresh(now) {
		warn("the bundle is stale since %s: have it signed anew", b.FreshUntil().UTC().Format(time.RFC3339))
	}
	if !slices.ContainsFunc(b.Inventory.Bastions, func(h bundle.Host) bool { return h.Name == t.config.Name }) {
		warn("the bundle's inventory has no bastion %q", t.config.Name)
	}
	return all
}

// ending warns of a certificate that the bastion shows and that ends soon.
func (t *trusted) ending(what string, at time.Time) []string {
	switch left := at.Sub(t.clock.Now()); {
	case left <= 0:
		return []string{fmt.Sprintf("the bastion's %s ended at %s: replace it", what, at.UTC().Format(time.RFC3339))}
	case left < certificateWarning:
		return []string{fmt.Sprintf("the bastion's %s ends in %v: replace it", what, left.Round(time.Minute))}
	}
	return nil
}

// hostWarnings tells what clients will find wrong with the SSH host's
// certificate.
func (t *trusted) hostWarnings(cert *ssh.Certificate) (all []string) {
	if cert.ValidBefore < 1<<40 {
		all = t.ending("SSH host certificate", time.Unix(int64(cert.ValidBefore), 0)) // #nosec G115 -- bounded
	}
	if o := t.opened.Load(); o != nil && !slices.ContainsFunc(o.store.Current().Policy.Authorities.Host, func(k bundle.Key) bool {
		return k.Fingerprint() == ssh.FingerprintSHA256(cert.SignatureKey)
	}) {
		all = append(all, "the bastion's SSH host certificate is none that the bundle's host authority vouches for: replace it")
	}
	return all
}
