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
	"github.com/halligan-io/halligan/internal/version"
)

// trusted is whom the bastion believes: the bundle in force and what follows
// from it, once there is one. Its methods may be called concurrently.
type trusted struct {
	*inforce.Trust
	config Config
	clock  *trust.Clock
}

func newTrusted(c Config, alarms *alarm.Alarms, log zerolog.Logger) (*trusted, error) {
	anchor, err := bundle.NewAnchor(c.Trust.Roots, c.Trust.Threshold, c.Trust.MinPolicyVersion)
	if err != nil {
		return nil, err
	}
	clock := trust.NewClock(version.Built())
	o := inforce.Options{Daemon: "bastion", Server: c.Name + "." + bundle.BastionDomain, Path: c.Trust.Bundle, State: filepath.Join(c.StateDir, "trust", "bundle"), Anchor: anchor,
		Clock: clock, Credential: credential.Options{Node: c.Name, Relay: true}, Raise: alarms.Raise, Log: log}
	return &trusted{inforce.New(o), c, clock}, nil
}

// inventory returns the one in force, an empty one before there is any.
func (t *trusted) inventory() *bundle.Inventory {
	if b := t.Current(); b != nil {
		return b.Inventory
	}
	return &bundle.Inventory{}
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
