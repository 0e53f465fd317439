package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/agent/console"
	"github.com/halligan-io/halligan/agent/door"
	"github.com/halligan-io/halligan/agent/hostlogs"
	"github.com/halligan-io/halligan/agent/localapi"
	"github.com/halligan-io/halligan/agent/sshd"
	"github.com/halligan-io/halligan/agent/tunnel"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/audit/service"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/ways"
)

// stopWithin is when sessions are ended although the API has not: it cuts its
// calls off before.
const stopWithin = 6 * time.Second

// doors are the ways in. The console must open, or the agent ends; what keeps
// another from opening is told and tried again, since one door is better than
// none.
type doors struct {
	*ways.Ways
	config   Config
	trusted  *trusted
	evidence *record.Evidence
	images   sealing
	local    *localapi.Endpoint
	alarms   *alarm.Alarms
	log      zerolog.Logger
	server   *door.Server

	mu          sync.Mutex                       // guards all below
	certificate func() (*tls.Certificate, error) // of gRPC, once it is loaded
	host        func() []ssh.Signer              // as certificate
	tunnels     *tunnel.Tunnels                  // nil unless there are any
}

// serve opens the doors and serves until the context ends, then stops
// gracefully.
func serve(ctx context.Context, c Config, engine door.Engine, look door.Look, t *trusted, evidence *record.Evidence, images sealing, holder *service.Holder, local *localapi.Endpoint, alarms *alarm.Alarms, log zerolog.Logger) error {
	socket, err := console.Listen(c.Socket)
	if err != nil {
		return err
	}
	d := &doors{Ways: ways.New(evidence.Raise, log), config: c, trusted: t, evidence: evidence, images: images, local: local, alarms: alarms, log: log}
	o := door.Options{Engine: engine, Look: look, Cluster: c.Cluster,
		Logs:     hostlogs.New(hostlogs.Options{Root: "/", Distribution: c.Distribution, Files: c.Logs, Now: time.Now}),
		Warnings: d.warnings, Audit: evidence.Status, Record: evidence, Alarms: evidence, Log: log,
		Evidence: service.New(service.Options{Ledger: evidence, Origin: c.origin(), Holder: holder, Identity: evidence.Identity, Sealed: images.service(), Bundle: t.Current, Now: t.clock.Now,
			Stopping: func() context.Context { return d.server.Stopping() }, Log: log})}
	if c.Trust != nil {
		o.Bundles = t
		_ = t.Open() // so that the first call has its policy; outside tries again, and tells
	}
	if d.server, err = door.New(o); err != nil {
		socket.Close()
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- d.server.Serve(socket) }()
	log.Info().Str("socket", c.Socket).Msg("console open")
	network, leave := context.WithCancel(context.WithoutCancel(ctx))
	var outside sync.WaitGroup
	if c.Trust != nil {
		outside.Go(func() { d.outside(network) })
	}
	select {
	case err = <-ended:
		err = fmt.Errorf("serving the console: %w", err)
	case <-ctx.Done():
	}
	// Calls under way first, so that a session can still hear what became of
	// its own, then the sessions; or both, where a client that takes nothing
	// holds up its calls.
	late := time.AfterFunc(stopWithin, leave)
	d.server.Shutdown()
	late.Stop()
	leave()
	outside.Wait()
	log.Info().Msg("doors closed")
	return err
}

// outside opens what leads to the network, once there is a bundle that says
// whom to let in.
func (d *doors) outside(ctx context.Context) {
	d.Keep(ctx, "bundle", d.trusted.Open)
	if ctx.Err() != nil {
		return
	}
	d.Opened("bundle")
	var inside sync.WaitGroup
	defer inside.Wait()
	inside.Go(func() { d.trusted.Watch(ctx) })
	var tunnels *tunnel.Tunnels
	if d.config.Reach == bundle.ReachOut {
		tunnels = tunnel.New(tunnel.Options{Bundles: d.trusted.Store(), Servers: d.trusted.Servers(), Certificate: d.shows, Log: d.log})
		d.mu.Lock()
		d.tunnels = tunnels
		d.mu.Unlock()
		inside.Go(func() { tunnels.Run(ctx) })
	}
	if c := d.config.SSH; c != nil {
		inside.Go(func() {
			d.Keep(ctx, "ssh", func() error {
				server, err := d.newSSH()
				if err == nil {
					d.everywhere(ctx, "ssh", c.Listen, tunnels, func(l net.Listener) error { return server.Serve(ctx, l) })
				}
				return err
			})
		})
	}
	if g := d.config.GRPC; g != nil {
		inside.Go(func() {
			d.Keep(ctx, "grpc", func() error {
				o, err := d.newGRPC()
				if err == nil {
					d.everywhere(ctx, "grpc", g.Listen, tunnels, func(l net.Listener) error { return d.grpc(ctx, mtls.NewListener(l, o)) })
				}
				return err
			})
		})
	}
}

// everywhere serves at all addresses of a way in, and what comes to it through
// tunnels, if any, until the context ends.
func (d *doors) everywhere(ctx context.Context, name string, addresses []string, tunnels *tunnel.Tunnels, serve func(net.Listener) error) {
	d.Opened(name)
	var all sync.WaitGroup
	defer all.Wait()
	if tunnels != nil {
		all.Go(func() {
			d.Keep(ctx, name+" through tunnels", func() error { return serve(tunnels.Listener(trust.Door(name))) })
		})
	}
	for _, address := range addresses {
		all.Go(func() { d.Listen(ctx, name, address, serve) })
	}
}

// grpc serves gRPC over mTLS until the context ends.
func (d *doors) grpc(ctx context.Context, l *mtls.Listener) error {
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	return d.server.Serve(l)
}

// newGRPC returns what all addresses of gRPC share.
func (d *doors) newGRPC() (mtls.Options, error) {
	certificate, err := mtls.Load(d.config.GRPC.CertFile, d.config.GRPC.KeyFile, d.config.Node+"."+d.config.Cluster, d.log)
	if err != nil {
		return mtls.Options{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.certificate = certificate
	return mtls.Options{Certificate: certificate, Authority: d.trusted.Authority(), Relay: d.trusted.relay, Refused: d.evidence.Refused, Alarm: d.evidence.Raise, Log: d.log}, nil
}

// shows returns the certificate of gRPC, which tunnels show, too.
func (d *doors) shows() (*tls.Certificate, error) {
	d.mu.Lock()
	certificate := d.certificate
	d.mu.Unlock()
	if certificate == nil {
		return nil, fault.New(fault.Failed, "see why the gRPC door is not open", "the certificate is not loaded")
	}
	return certificate()
}

// newSSH returns the SSH server, which all addresses share.
func (d *doors) newSSH() (*sshserver.Server, error) {
	c := d.config
	host, err := sshserver.HostFiles(c.SSH.HostKey, c.SSH.HostCertificate, c.Node+"."+c.Cluster, d.log)
	if err != nil {
		return nil, err
	}
	authority := d.trusted.Authority()
	server, err := sshserver.New(sshserver.Options{HostRenewed: host, Authenticate: authority.User, Offer: authority.Offered, Hold: authority.Hold,
		Handlers: sshd.Handlers(sshd.Options{Door: d.server, Node: c.Node, Cluster: c.Cluster, Recorder: d.evidence.Recordings, Now: d.trusted.clock.Now, Log: d.log}),
		Relay:    d.trusted.relay, Log: d.log, Alarm: d.evidence.Raise, Record: d.evidence})
	if err != nil {
		return nil, err
	}
	d.evidence.Certified(host, nil, d.images.recipient())
	d.mu.Lock()
	defer d.mu.Unlock()
	d.host = host
	return server, nil
}

// warnings tells what is degraded, each in one line.
func (d *doors) warnings() []string {
	all := append(d.evidence.Warnings(), d.images.warnings()...)
	all = append(all, d.trusted.warnings()...)
	all = append(all, d.local.Warnings()...)
	all = append(all, d.Shut()...)
	d.mu.Lock()
	certificate, host, tunnels := d.certificate, d.host, d.tunnels
	d.mu.Unlock()
	if tunnels != nil {
		all = append(all, tunnels.Warnings(d.config.Node, d.config.Cluster)...)
	}
	if certificate != nil {
		if cert, err := certificate(); err == nil {
			all = append(all, d.trusted.ServerWarnings(cert)...)
		}
	}
	if host != nil {
		if cert, ok := host()[0].PublicKey().(*ssh.Certificate); ok {
			all = append(all, d.trusted.HostWarnings(cert)...)
		}
	}
	if n := d.alarms.Dropped(); n > 0 {
		all = append(all, fmt.Sprintf("%d alarms were dropped since the agent started: see its log", n))
	}
	for _, sink := range d.alarms.Failing() {
		all = append(all, "alarms do not get through to "+sink)
	}
	return all
}
