// Package bastion is the daemon between people and nodes: it lets in whoever has
// a valid credential, relays them to the nodes of the signed inventory, and keeps
// what people coordinate with. Everything that acts is between the person and the
// node, in bytes that the bastion cannot read.
//
// It must never hold a key that a node would obey, resolve a name, or need its
// store or another machine to relay. It stands on floor 4.
package bastion

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"sync"

	"github.com/rs/zerolog"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/bastion/relay"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/version"
)

// bastion is what Run puts together.
type bastion struct {
	config  Config
	log     zerolog.Logger
	alarms  *alarm.Alarms
	trusted *trusted
	store   *store.Store
	relay   *relay.Relay
	doors   *doors
}

// Run serves until the context ends. It starts without a bundle, a store or an
// address: what is missing is told, and tried again.
func Run(ctx context.Context, c Config, log zerolog.Logger) error {
	alarms, err := alarm.Open(alarm.Options{Node: c.Name, Cluster: bundle.BastionDomain, Sinks: c.Alarms, Log: log})
	if err != nil {
		return err
	}
	defer alarms.Close()
	b := &bastion{config: c, log: log, alarms: alarms}
	if b.trusted, err = newTrusted(c, alarms, log); err != nil {
		return err
	}
	o := store.Options{Bastion: c.Name, Dir: filepath.Join(c.StateDir, "store"), CAFile: c.Store.CAFile, CertFile: c.Store.CertFile, KeyFile: c.Store.KeyFile, Log: log}
	for _, e := range c.Store.Endpoints {
		at, err := netip.ParseAddrPort(e)
		if err != nil {
			return err
		}
		o.Endpoints = append(o.Endpoints, at)
	}
	if b.store, err = store.Open(o); err != nil {
		return err
	}
	defer b.store.Close()
	own, loopback, err := c.own()
	if err != nil {
		return err
	}
	b.relay = relay.New(relay.Options{Inventory: b.trusted.inventory, Never: own, Loopback: loopback, Begin: b.begin, Log: log, Alarm: alarms.Raise})
	b.doors = &doors{config: c, trusted: b.trusted, alarms: alarms, log: log, closed: map[string]string{}, open: map[string]bool{}, handlers: b.handlers()}
	log.Info().Str("version", version.String()).Strs("ssh", c.SSH.Listen).Msg("bastion starts")
	b.serve(ctx)
	log.Info().Msg("bastion ends")
	return nil
}

// serve opens the doors and serves until the context ends.
func (b *bastion) serve(ctx context.Context) {
	var inside sync.WaitGroup
	defer inside.Wait()
	if at := b.config.Metrics.Listen; at != "off" {
		inside.Go(func() {
			b.doors.listen(ctx, "metrics", at, func(l net.Listener) error { return b.serveHealth(ctx, l) })
		})
	}
	b.doors.keep(ctx, "bundle", b.trusted.open)
	if ctx.Err() != nil {
		return
	}
	b.doors.opened("bundle")
	inside.Go(func() { b.trusted.watch(ctx) })
	inside.Go(func() { b.doors.ssh(ctx) })
}

// handlers are what the SSH door offers.
func (b *bastion) handlers() sshserver.Handlers {
	return sshserver.Handlers{
		Channels: map[string]func(*sshserver.Channel){relay.ChannelType: b.relay.Handle},
	}
}

// begin tells the other bastions who is relayed where.
func (b *bastion) begin(s relay.Session) (end func()) {
	return b.store.Enter(&halliganv1.Session{Person: s.Who.Person, Credential: string(s.Who.Kind), Door: string(s.Who.Door), Source: s.Who.Source,
		Target: s.Target.Node.ID(), Started: timestamppb.New(s.Since)})
}

// degraded tells what does not work, each in one line.
func (b *bastion) degraded() []string {
	all := b.doors.warnings()
	if why := b.store.Degraded(); why != "" {
		all = append(all, why)
	}
	return all
}
