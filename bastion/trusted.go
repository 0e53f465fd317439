package bastion

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
	"github.com/halligan-io/halligan/internal/trust/inforce"
)

// trusted is whom the bastion believes: the bundle in force and what follows
// from it, once there is one. Its methods may be called concurrently.
type trusted struct {
	*inforce.Trust
	config Config
	clock  *trust.Clock
	// past is what this bastion has written down.
	past func() []inforce.Moment
}

func newTrusted(c Config, clock *trust.Clock, past func() []inforce.Moment, raise func(alarm.Event), believe func(string), log zerolog.Logger) (*trusted, error) {
	anchor, err := bundle.NewAnchor(c.Trust.Roots, c.Trust.Threshold, c.Trust.MinPolicyVersion)
	if err != nil {
		return nil, err
	}
	o := inforce.Options{Daemon: "bastion", Server: c.Name + "." + bundle.BastionDomain, Path: c.Trust.Bundle, State: filepath.Join(c.StateDir, "trust", "bundle"), Anchor: anchor,
		Clock: clock, Credential: credential.Options{Node: c.Name, Relay: true}, Raise: raise, Believe: believe, Log: log}
	t := &trusted{inforce.New(o), c, clock, past}
	t.Recall(past(), false)
	return t, nil
}

// Open is that of the bundle, by which the past is judged again.
func (t *trusted) Open() error {
	err := t.Trust.Open()
	if err == nil {
		t.Recall(t.past(), true)
	}
	return err
}

// inventory returns the one in force, an empty one before there is any.
func (t *trusted) inventory() *bundle.Inventory {
	if b := t.Current(); b != nil {
		return b.Inventory
	}
	return &bundle.Inventory{}
}

// others returns how many other bastions there are in the inventory.
func (t *trusted) others() (n int) {
	for _, h := range t.inventory().Bastions {
		if h.Name != t.config.Name {
			n++
		}
	}
	return n
}

// Status says which bundle is in force, nil for none.
func (t *trusted) Status() *halliganv1.BundleStatus { return api.BundleStatus(t.Current()) }

// warnings tells what is degraded about trust, each in one line.
func (t *trusted) warnings() []string {
	all := append(t.ClockWarnings(), t.BundleWarnings("nobody is let in", "have it signed anew")...)
	if b := t.Current(); b != nil && !slices.ContainsFunc(b.Inventory.Bastions, func(h bundle.Host) bool { return h.Name == t.config.Name }) {
		all = append(all, fmt.Sprintf("the bundle's inventory has no bastion %q", t.config.Name))
	}
	return all
}
