package agent

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/agent/action"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/approval"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/inforce"
)

// trusted is whom and what the agent believes, as it changes while it runs: the
// bundle in force and what follows from it. Without a bundle it is the shipped
// policy. Its methods may be called concurrently.
type trusted struct {
	*inforce.Trust
	config Config // which may name no bundle
	local  *trust.LocalRules
	clock  *trust.Clock
	// past is what this node has written down.
	past func() []inforce.Moment

	shipped *trust.Policy
	policy  atomic.Pointer[inForce]
}

// inForce is the policy of one bundle, tightened.
type inForce struct {
	of     *bundle.Bundle
	policy *trust.Policy
}

// newTrusted returns what is believed before there is a bundle; Open finds one.
func newTrusted(c Config, clock *trust.Clock, past func() []inforce.Moment, raise func(alarm.Event), believe func(string), log zerolog.Logger) (*trusted, error) {
	t := &trusted{config: c, clock: clock, past: past}
	var err error
	if t.local, err = trust.ReadLocal(c.PolicyFile); err != nil {
		return nil, err
	}
	t.shipped = trust.Default().Tighten(t.local)
	o := inforce.Options{Daemon: "agent", Server: c.Node + "." + c.Cluster, Path: c.trust().Bundle, State: filepath.Join(c.StateDir, "trust", "bundle"), Clock: clock,
		Credential: credential.Options{Cluster: c.Cluster, Node: c.Node}, Raise: raise, Believe: believe, Log: log}
	if c.Trust != nil {
		o.Anchor, err = bundle.NewAnchor(c.Trust.Roots, c.Trust.Threshold, c.Trust.MinPolicyVersion)
	}
	t.Trust = inforce.New(o)
	t.Recall(past(), c.Trust == nil) // else told with the bundle
	return t, err
}

// Open is that of the bundle, by which the past is judged again.
func (t *trusted) Open() error {
	err := t.Trust.Open()
	if err == nil {
		t.Recall(t.past(), true)
	}
	return err
}

// Policy returns the policy in force: the bundle's, tightened by the node's own
// file.
func (t *trusted) Policy() *trust.Policy {
	b := t.Current()
	if b == nil {
		return t.shipped
	}
	last := t.policy.Load()
	if last != nil && last.of == b {
		return last.policy
	}
	p, err := trust.NewPolicy(b.Policy.Rules)
	if err != nil { // a bundle that was verified has rules that were checked
		t.Complain(err)
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
	b := t.Current()
	if b == nil {
		return t.config.Trust == nil
	}
	return b.Fresh(t.clock.Now())
}

// Verify returns who has approved a plan.
func (t *trusted) Verify(tokens []string, plan *halliganv1.Plan, who trust.Identity) ([]action.Approved, error) {
	b := t.Current()
	if b == nil {
		return nil, t.None()
	}
	facts := approval.Plan{Fleet: b.Policy.Fleet, Cluster: plan.GetCluster(), ClusterName: t.config.Cluster, Node: t.config.Node + "." + t.config.Cluster,
		ID: plan.GetId(), SHA256: plan.GetSha256(), Nonce: plan.GetNonce(), Requester: who.Person, RequesterKey: who.Fingerprint,
		PolicyVersion: b.Policy.Version, Action: plan.GetAction()}
	for _, object := range plan.GetObjects() {
		if !slices.Contains(facts.Namespaces, object.GetNamespace()) {
			facts.Namespaces = append(facts.Namespaces, object.GetNamespace())
		}
	}
	approvals, err := approval.Verify(tokens, facts, t.Authority(), t.clock.Now())
	if err != nil {
		return nil, err
	}
	var approved []action.Approved
	for _, a := range approvals {
		approved = append(approved, action.Approved{Person: a.Approver, Fingerprint: a.Fingerprint, Serial: a.Serial})
	}
	return approved, nil
}

// Status says which bundle is in force, nil for none.
func (t *trusted) Status() *halliganv1.BundleStatus { return api.BundleStatus(t.Current()) }

// relay reports whether an address is a bastion's.
func (t *trusted) relay(address netip.Addr) bool {
	b := t.Current()
	return b != nil && slices.ContainsFunc(b.Inventory.Bastions, func(h bundle.Host) bool { return h.Address.Addr == address })
}

// bastions returns how many there are in the inventory.
func (t *trusted) bastions() int {
	if b := t.Current(); b != nil {
		return len(b.Inventory.Bastions)
	}
	return 0
}

// warnings tells what is degraded about trust, each in one line.
func (t *trusted) warnings() (all []string) {
	all = t.ClockWarnings()
	var actions []string
	for _, a := range action.Describe() {
		actions = append(actions, a.GetName())
	}
	some := func(file string, unknown []string) {
		if n := len(unknown); n > 0 {
			all = append(all, fmt.Sprintf("%d names in %s match nothing that this agent knows, so that those rules do nothing: %s", n, file, neutral.LineMax(strings.Join(unknown, "; "), 512)))
		}
	}
	some("the node's own policy", t.local.Unknown(actions))
	if t.config.Trust == nil {
		return all
	}
	all = append(all, t.BundleWarnings("only the console is open", "changes need an approval or --alone; have it signed anew")...)
	if b := t.Current(); b != nil {
		some("the bundle's policy", b.Policy.Unknown(actions))
		if _, known := b.Inventory.Cluster(t.config.Cluster); !known {
			all = append(all, fmt.Sprintf("the bundle's inventory has no cluster %q", t.config.Cluster))
		}
	}
	return all
}
