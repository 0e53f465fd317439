package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/agent/console"
	"github.com/halligan-io/halligan/agent/door"
	"github.com/halligan-io/halligan/agent/sshd"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
)

// retryEvery is how often what could not be opened is tried again: an address
// may come up late, and a bundle or a certificate be copied later.
const retryEvery = 2 * time.Second

// stopWithin is when sessions are ended although the API has not: it cuts its
// calls off before.
const stopWithin = 6 * time.Second

// doors are the ways in. The console must open, or the agent ends; what keeps
// another from opening is told and tried again, since one door is better than
// none.
type doors struct {
	config  Config
	trusted *trusted
	alarms  *alarm.Alarms
	log     zerolog.Logger
	server  *door.Server

	mu          sync.Mutex // guards all below
	closed      map[string]string
	certificate func() (*tls.Certificate, error) // of gRPC, once it is loaded
	sshServer   *sshserver.Server                // once its key is loaded
	host        *ssh.Certificate                 // as sshServer
}

// serve opens the doors and serves until the context ends, then stops
// gracefully.
func serve(ctx context.Context, c Config, engine door.Engine, t *trusted, alarms *alarm.Alarms, log zerolog.Logger) error {
	socket, err := console.Listen(c.Socket)
	if err != nil {
		return err
	}
	d := &doors{config: c, trusted: t, alarms: alarms, log: log, closed: map[string]string{}}
	o := door.Options{Engine: engine, Cluster: c.Cluster, Warnings: d.warnings, Alarms: alarms, Log: log}
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
	d.keep(ctx, "bundle", func() error {
		if err := d.trusted.Open(); err != nil {
			return err
		}
		d.opened("bundle")
		var inside sync.WaitGroup
		defer inside.Wait()
		inside.Go(func() { d.trusted.Watch(ctx) })
		if c := d.config.SSH; c != nil {
			for _, address := range c.Listen {
				inside.Go(func() { d.keep(ctx, "ssh "+address, func() error { return d.ssh(ctx, address) }) })
			}
		}
		if g := d.config.GRPC; g != nil {
			for _, address := range g.Listen {
				inside.Go(func() { d.keep(ctx, "grpc "+address, func() error { return d.grpc(ctx, address) }) })
			}
		}
		return nil
	})
}

// keep runs a way in until the context ends, and again when it fails.
func (d *doors) keep(ctx context.Context, name string, run func() error) {
	for {
		err := run()
		if ctx.Err() != nil || err == nil {
			return
		}
		why := neutral.Line(fault.Of(err).Error())
		d.mu.Lock()
		again := d.closed[name] == why
		d.closed[name] = why
		d.mu.Unlock()
		if !again {
			d.log.Error().Str("door", name).Msg("not open: " + why)
			d.alarms.Raise(alarm.Event{Kind: alarm.Closed, Text: name + ": " + why})
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryEvery):
		}
	}
}

// opened tells that a way in works.
func (d *doors) opened(name string) {
	d.mu.Lock()
	delete(d.closed, name)
	d.mu.Unlock()
	d.log.Info().Str("door", name).Msg("open")
}

// grpc serves gRPC over mTLS at one address until the context ends.
func (d *doors) grpc(ctx context.Context, address string) error {
	certificate, err := d.load()
	if err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	secure := mtls.NewListener(l, mtls.Options{Certificate: certificate, Authority: d.trusted.Authority(), Relay: d.trusted.relay, Log: d.log,
		Refused: func(source net.Addr, err error) {
			d.alarms.Raise(alarm.Of(alarm.Refusal, trust.Identity{Door: trust.GRPC, Source: source.String()}, fault.Of(err).Message))
		}, Dropped: func(n uint64, source string) {
			d.alarms.Raise(alarm.Of(admission.Flood, trust.Identity{Door: trust.GRPC, Source: source}, fmt.Sprintf("%d handshakes were cut short to make room for others", n)))
		}})
	defer secure.Close()
	defer context.AfterFunc(ctx, func() { secure.Close() })()
	d.opened("grpc " + address)
	return d.server.Serve(secure)
}

// load returns the source of the gRPC certificate, which all addresses share.
func (d *doors) load() (func() (*tls.Certificate, error), error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.certificate == nil {
		certificate, err := mtls.Load(d.config.GRPC.CertFile, d.config.GRPC.KeyFile, d.config.Node+"."+d.config.Cluster, d.log)
		if err != nil {
			return nil, err
		}
		d.certificate = certificate
	}
	return d.certificate, nil
}

// ssh serves SSH at one address until the context ends.
func (d *doors) ssh(ctx context.Context, address string) error {
	server, err := d.newSSH()
	if err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	d.opened("ssh " + address)
	return server.Serve(ctx, l)
}

// newSSH returns the SSH server, which all addresses share.
func (d *doors) newSSH() (*sshserver.Server, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sshServer != nil {
		return d.sshServer, nil
	}
	c := d.config
	signers, cert, err := sshserver.HostKey(c.SSH.HostKey, c.SSH.HostCertificate, c.Node+"."+c.Cluster)
	if err != nil {
		return nil, err
	}
	authority := d.trusted.Authority()
	server, err := sshserver.New(sshserver.Options{HostSigners: signers, Authenticate: authority.User, Offer: authority.Offered, Hold: authority.Hold,
		Handlers: sshd.Handlers(sshd.Options{Door: d.server, Node: c.Node, Cluster: c.Cluster, Now: d.trusted.clock.Now, Log: d.log}),
		Relay:    d.trusted.relay, Log: d.log, Alarm: d.alarms.Raise})
	if err != nil {
		return nil, err
	}
	d.sshServer, d.host = server, cert
	return server, nil
}

// warnings tells what is degraded, each in one line.
func (d *doors) warnings() []string {
	all := d.trusted.warnings()
	d.mu.Lock()
	var shut []string
	for name, why := range d.closed {
		shut = append(shut, name+" is not open: "+why)
	}
	certificate, host := d.certificate, d.host
	d.mu.Unlock()
	slices.Sort(shut)
	all = append(all, shut...)
	if certificate != nil {
		if cert, err := certificate(); err == nil {
			all = append(all, d.trusted.ServerWarnings(cert)...)
		}
	}
	if host != nil {
		all = append(all, d.trusted.HostWarnings(host)...)
	}
	if n := d.alarms.Dropped(); n > 0 {
		all = append(all, fmt.Sprintf("%d alarms were dropped since the agent started: see its log", n))
	}
	for _, sink := range d.alarms.Failing() {
		all = append(all, "alarms do not get through to "+sink)
	}
	return all
}
