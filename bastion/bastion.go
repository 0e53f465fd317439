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
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/audit/cast"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/audit/service"
	"github.com/halligan-io/halligan/bastion/lobby"
	"github.com/halligan-io/halligan/bastion/push"
	"github.com/halligan-io/halligan/bastion/relay"
	"github.com/halligan-io/halligan/bastion/rpc"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/bastion/tunnel"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/inforce"
	"github.com/halligan-io/halligan/internal/version"
	"github.com/halligan-io/halligan/internal/ways"
)

// bastion is what Run puts together.
type bastion struct {
	config  Config
	log     zerolog.Logger
	alarms  *alarm.Alarms
	trusted *trusted
	// evidence is the bastion's own; holder has other bastions hold what its log
	// cannot take.
	evidence *record.Evidence
	holder   *service.Holder
	copies   copies
	store    *store.Store
	relay    *relay.Relay
	tunnels  *tunnel.Tunnels
	doors    *doors
}

// Run serves until the context ends. It starts without a bundle, a store or an
// address: what is missing is told, and tried again.
func Run(ctx context.Context, c Config, log zerolog.Logger) error {
	alarms, err := alarm.Open(alarm.Options{Node: c.Name, Cluster: bundle.BastionDomain, Sinks: c.Alarms, Log: log})
	if err != nil {
		return err
	}
	defer alarms.Close()
	b := &bastion{config: c, log: log, alarms: alarms, holder: service.NewHolder()}
	clock := trust.NewClock(version.Built())
	if b.evidence, err = record.Open(record.Options{StateDir: c.StateDir, Origin: c.origin(), Config: c.Audit, Now: clock.Now, Hold: b.holder,
		Witnesses: func() int { return b.trusted.others() }, Raise: alarms.Raise, Log: log}); err != nil {
		return err
	}
	defer b.evidence.Close()
	past := func() []inforce.Moment {
		return []inforce.Moment{{What: "an event of the evidence log", At: b.evidence.LastTime()}}
	}
	if b.trusted, err = newTrusted(c, clock, past, b.evidence.Raise, b.evidence.Believe, log); err != nil {
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
	b.tunnels = tunnel.New(log)
	b.relay = relay.New(relay.Options{Inventory: b.trusted.inventory, Tunnels: b.tunnels, Never: own, Loopback: loopback, Begin: b.relayed, Refused: b.evidence.Refused,
		Failed: func(who trust.Identity, t relay.Target, err error) {
			b.evidence.Unrelayed(who, t.Node.ID(), t.Door, err)
		}, Log: log, Alarm: b.evidence.Raise})
	b.copies.folder = filepath.Join(c.StateDir, "mirror")
	b.doors = &doors{Ways: ways.New(b.evidence.Raise, log), config: c, trusted: b.trusted, evidence: b.evidence, alarms: alarms, log: log}
	log.Info().Str("version", version.String()).Strs("ssh", c.SSH.Listen).Msg("bastion starts")
	err = b.serve(ctx)
	log.Info().Msg("bastion ends")
	return err
}

// stopWithin is when sessions are ended although the API has not: it cuts its
// calls off before.
const stopWithin = 6 * time.Second

// serve opens the doors and serves until the context ends, then stops
// gracefully.
func (b *bastion) serve(ctx context.Context) error {
	var inside sync.WaitGroup
	defer inside.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if at := b.config.Metrics.Listen; at != "off" {
		inside.Go(func() {
			b.doors.Listen(ctx, "metrics", at, func(l net.Listener) error { return b.serveHealth(ctx, l) })
		})
	}
	b.doors.Keep(ctx, "bundle", b.trusted.Open)
	if ctx.Err() != nil {
		return nil
	}
	b.doors.Opened("bundle")
	bundles := b.trusted.Store()
	var server *rpc.Server
	server, err := rpc.New(rpc.Options{Bastion: b.config.Name, Store: b.store, Bundles: bundles, Relays: func() int64 { return b.relay.Stats().Open }, Tunnels: b.tunnels.Since,
		Warnings: func() []string { return append(b.doors.warnings(), b.copies.warnings()...) }, Now: b.trusted.clock.Now, Record: b.evidence, Alarms: b.evidence, Audit: b.evidence.Status, Mirrors: b.copies.status, Log: b.log,
		Evidence: service.New(service.Options{Ledger: b.evidence, Origin: b.config.origin(), Holder: b.holder, Copies: b.copies.folder, Problem: b.copies.problem, Identity: b.evidence.Identity, Bundle: b.trusted.Current, Now: b.trusted.clock.Now,
			Stopping: func() context.Context { return server.Stopping() }, Log: b.log})})
	if err != nil {
		return err
	}
	b.doors.handlers = b.handlers(server)
	inside.Go(func() { b.trusted.Watch(ctx) })
	inside.Go(func() { b.store.Share(ctx, bundles) })
	network, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	inside.Go(func() { b.doors.ssh(network) })
	if b.config.GRPC != nil {
		inside.Go(func() { b.doors.grpc(network, server) })
		inside.Go(func() {
			push.Run(ctx, push.Options{Bundles: bundles, Servers: b.trusted.Servers(), Certificate: b.doors.shows, Log: b.log,
				Connect: func(ctx context.Context, node bundle.Host) (net.Conn, error) {
					return b.relay.Reach(ctx, node, trust.GRPC)
				}})
		})
	}
	if b.config.GRPC != nil {
		inside.Go(func() { b.doors.Keep(ctx, "mirrors", func() error { return b.witness(ctx) }) })
	}
	if b.config.Tunnel != nil {
		inside.Go(func() { b.doors.tunnel(network, b.tunnels) })
	}
	<-ctx.Done()
	// Calls under way first, so that a session can still hear what became of
	// its own, then the sessions; or both, where a client takes nothing.
	late := time.AfterFunc(stopWithin, leave)
	defer late.Stop()
	server.Shutdown()
	return nil
}

// handlers are what the SSH door offers.
func (b *bastion) handlers(server *rpc.Server) sshserver.Handlers {
	look := lobby.Handler(lobby.Options{Dial: server.Dial, Bastion: b.config.Name, Recorder: b.evidence.Recordings, Now: b.trusted.clock.Now, Log: b.log})
	entered := func(serve func(*sshserver.Session)) func(*sshserver.Session) {
		return func(s *sshserver.Session) {
			defer b.enter(s.Identity(), "", time.Now())()
			serve(s)
		}
	}
	return sshserver.Handlers{
		Session: entered(look),
		Subsystems: map[string]func(*sshserver.Session){grpcdoor.Subsystem: entered(func(s *sshserver.Session) {
			rec, err := b.evidence.Recordings.Begin(s.Context(), cast.About{Who: s.Identity(), What: cast.Subsystem, Command: grpcdoor.Subsystem})
			if err == nil { // as always, since nothing of it is recorded
				defer func() { rec.End(0, context.Cause(s.Held())) }()
			}
			server.ServeSession(s)
		})},
		Channels: map[string]func(*sshserver.Channel){relay.ChannelType: b.relay.Handle},
	}
}

// enter tells all bastions who is in, and where they are relayed to.
func (b *bastion) enter(who trust.Identity, target string, since time.Time) (leave func()) {
	return b.store.Enter(&halliganv1.Session{Person: who.Person, Credential: string(who.Kind), Door: string(who.Door), Source: who.Source, Target: target, Started: timestamppb.New(since)})
}

// relayed tells of a connection that is relayed.
func (b *bastion) relayed(s relay.Session) (end func(up, down int64, why string)) {
	leave := b.enter(s.Who, s.Target.Node.ID(), s.Since)
	tell := b.evidence.Relayed(s.Who, s.Target.Node.ID(), s.Target.Door, s.Tunnel)
	return func(up, down int64, why string) { leave(); tell(up, down, why) }
}

// degraded tells what does not work, each in one line.
func (b *bastion) degraded() []string {
	all := append(b.doors.warnings(), b.copies.warnings()...)
	if why := b.store.Degraded(); why != "" {
		all = append(all, why)
	}
	return all
}
