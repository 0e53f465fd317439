package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/agent/action"
	"github.com/halligan-io/halligan/agent/journal"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/approval"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/version"
)

// trusted is whom and what the agent believes, as it changes while it runs: the
// bundle in force and what follows from it. Without a bundle it is the shipped
// policy. Its methods may be called concurrently.
type trusted struct {
	config Config
	anchor *bundle.Anchor // nil where the configuration names no bundle
	local  *trust.LocalRules
	clock  *trust.Clock
	alarms *alarm.Alarms
	log    zerolog.Logger

	shipped *trust.Policy
	// opened is nil until there is a bundle that can be used.
	opened atomic.Pointer[opened]
	policy atomic.Pointer[inForce]

	mu      sync.Mutex // guards trouble
	trouble string     // with the bundle; "" when another came in force since
}

// opened is what a bundle makes possible.
type opened struct {
	store     *bundle.Store
	authority *credential.Authority
}

// inForce is the policy of one bundle, tightened.
type inForce struct {
	of     *bundle.Bundle
	policy *trust.Policy
}

// newTrusted returns what is believed before there is a bundle; open finds one.
func newTrusted(c Config, clock *trust.Clock, alarms *alarm.Alarms, log zerolog.Logger) (*trusted, error) {
	t := &trusted{config: c, clock: clock, alarms: alarms, log: log}
	var err error
	if t.local, err = trust.ReadLocal(c.PolicyFile); err != nil {
		return nil, err
	}
	t.shipped = trust.Default().Tighten(t.local)
	if c.Trust != nil {
		t.anchor, err = bundle.NewAnchor(c.Trust.Roots, c.Trust.Threshold, c.Trust.MinPolicyVersion)
	}
	return t, err
}

// newClock returns the agent's clock: it starts no earlier than its build and
// the last record of an action.
func newClock(records *journal.Journal) *trust.Clock {
	clock := trust.NewClock(version.Built())
	for _, e := range records.Entries() {
		clock.Raise(e.Time)
	}
	return clock
}

// open reads the bundle; until that works, only the console can know anybody.
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
	authority := credential.New(credential.Options{Bundle: store, Clock: t.clock, Cluster: t.config.Cluster, Node: t.config.Node, Alarm: t.unusual})
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

// Policy returns the policy in force: the bundle's, tightened by the node's own
// file.
func (t *trusted) Policy() *trust.Policy {
	o := t.opened.Load()
	if o == nil {
		return t.shipped
	}
	b := o.store.Current()
	last := t.policy.Load()
	if last != nil && last.of == b {
		return last.policy
	}
	p, err := trust.NewPolicy(b.Policy.Rules)
	if err != nil { // a bundle that was verified has rules that were checked
		t.complain(err)
		if last == nil {
			return t.shipped
		}
		return last.policy
	}
	p.Version = b.Policy.Version
	p = p.Tighten(t.local)
	t.policy.Store(&inForce{b, p})
	return p
}

// Fresh reports whether what is believed is recent enough for mutations without
// a second thought. A bundle that ought to be there and is not, is not.
func (t *trusted) Fresh() bool {
	o := t.opened.Load()
	if o == nil {
		return t.anchor == nil
	}
	return o.store.Current().Fresh(t.clock.Now())
}

var errNoBundle = fault.New(fault.Refused, "copy the bundle to the node (trust.bundle in the agent's configuration)", "this agent has no bundle that it can use")

// Verify returns who has approved a plan.
func (t *trusted) Verify(tokens []string, plan *halliganv1.Plan, who trust.Identity) ([]action.Approved, error) {
	o := t.opened.Load()
	if o == nil {
		return nil, errNoBundle
	}
	b := o.store.Current()
	facts := approval.Plan{Fleet: b.Policy.Fleet, Cluster: plan.GetCluster(), ClusterName: t.config.Cluster, Node: t.config.Node + "." + t.config.Cluster,
		ID: plan.GetId(), SHA256: plan.GetSha256(), Nonce: plan.GetNonce(), Requester: who.Person, RequesterKey: who.Fingerprint,
		PolicyVersion: b.Policy.Version, Action: plan.GetAction()}
	for _, object := range plan.GetObjects() {
		if !slices.Contains(facts.Namespaces, object.GetNamespace()) {
			facts.Namespaces = append(facts.Namespaces, object.GetNamespace())
		}
	}
	approvals, err := approval.Verify(tokens, facts, o.authority, t.clock.Now())
	if err != nil {
		return nil, err
	}
	var approved []action.Approved
	for _, a := range approvals {
		approved = append(approved, action.Approved{Person: a.Approver, Fingerprint: a.Fingerprint, Serial: a.Serial})
	}
	return approved, nil
}

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

// relay reports whether an address is a bastion's.
func (t *trusted) relay(address netip.Addr) bool {
	o := t.opened.Load()
	return o != nil && slices.ContainsFunc(o.store.Current().Inventory.Bastions, func(h bundle.Host) bool { return h.Address.Addr == address })
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
		warn("this node's clock is %v behind what is known to be past: %s counts", ahead.Round(time.Second), now.Format(time.RFC3339))
	}
	var actions []string
	for _, a := range action.Describe() {
		actions = append(actions, a.GetName())
	}
	some := func(file string, unknown []string) {
		if n := len(unknown); n > 0 {
			warn("%d names in %s match nothing that this agent knows, so that those rules do nothing: %s", n, file, neutral.LineMax(strings.Join(unknown, "; "), 512))
		}
	}
	some("the node's own policy", t.local.Unknown(actions))
	if t.anchor == nil {
		return all
	}
	t.mu.Lock()
	trouble := t.trouble
	t.mu.Unlock()
	if trouble != "" {
		warn("the bundle: %s", trouble)
	}
	o := t.opened.Load()
	if o == nil {
		warn("only the console is open, since there is no bundle that can be used")
		return all
	}
	some("the bundle's policy", o.store.Current().Policy.Unknown(actions))
	if b := o.store.Current(); !b.Fresh(now) {
		warn("the bundle is stale since %s: changes need an approval or --alone; have it signed anew", b.FreshUntil().Format(time.RFC3339))
	}
	if _, known := o.store.Current().Inventory.Cluster(t.config.Cluster); !known {
		warn("the bundle's inventory has no cluster %q", t.config.Cluster)
	}
	return all
}

// ending warns of a certificate that the agent shows and that ends soon.
func (t *trusted) ending(what string, at time.Time) []string {
	switch left := at.Sub(t.clock.Now()); {
	case left <= 0:
		return []string{fmt.Sprintf("the agent's %s ended at %s: replace it", what, at.UTC().Format(time.RFC3339))}
	case left < certificateWarning:
		return []string{fmt.Sprintf("the agent's %s ends in %v: replace it", what, left.Round(time.Minute))}
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
		all = append(all, "the agent's SSH host certificate is none that the bundle's host authority vouches for: replace it")
	}
	return all
}

// certificateWarnings tells what clients will find wrong with the gRPC
// certificate.
func (t *trusted) certificateWarnings(cert *tls.Certificate) []string {
	all, now := t.ending("gRPC certificate", cert.Leaf.NotAfter), t.clock.Now()
	o := t.opened.Load()
	if o == nil || now.After(cert.Leaf.NotAfter) {
		return all
	}
	between := x509.NewCertPool()
	for _, der := range cert.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(c)
		}
	}
	_, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: o.store.Current().Policy.Authorities.TLSServer.Pool(), Intermediates: between, CurrentTime: now})
	if err != nil {
		all = append(all, "the agent's gRPC certificate is none that the bundle's tlsServer authority vouches for: "+neutral.LineMax(err.Error(), 256))
	}
	return all
}
