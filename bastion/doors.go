package bastion

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

	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/bastion/rpc"
	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// retryEvery is how often what could not be opened is tried again: an address
// may come up late, and a bundle or a certificate be copied later.
const retryEvery = 2 * time.Second

// limits are those of the SSH door. Every relay is a channel: an operator has a
// few of them, and the command line some dozens when it asks all nodes at once,
// through one connection. What nobody reads holds up to 2 MiB each, and only
// while the nodes take nothing.
var limits = sshserver.Limits{
	Unauthenticated: 256, UnauthenticatedEach: 32,
	Connections: 512, ConnectionsEach: 16, ReservedConnections: 128,
	Channels: 1024, ChannelsEach: 64, ReservedChannels: 256, ChannelsOfConnection: 64,
	Requests: 500,
}

// doors are the ways in. What keeps one from opening is told and tried again:
// one door is better than none.
type doors struct {
	config   Config
	trusted  *trusted
	alarms   *alarm.Alarms
	log      zerolog.Logger
	handlers sshserver.Handlers

	mu     sync.Mutex // guards all below
	closed map[string]string
	open   map[string]bool
	host   *ssh.Certificate // once it is loaded
	// certificate is that of gRPC, once it is loaded.
	certificate func() (*tls.Certificate, error)
}

// keep runs a way in until the context ends, and again when it fails.
func (d *doors) keep(ctx context.Context, name string, run func() error) {
	for {
		err := run()
		if ctx.Err() != nil || err == nil {
			return
		}
		why := neutral.LineMax(fault.Of(err).Error(), 512)
		d.mu.Lock()
		again := d.closed[name] == why
		d.closed[name] = why
		delete(d.open, name)
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
	d.open[name] = true
	d.mu.Unlock()
	d.log.Info().Str("door", name).Msg("open")
}

// shut returns the ways in that do not work, and why.
func (d *doors) shut() (all []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, why := range d.closed {
		all = append(all, name+" is not open: "+why)
	}
	slices.Sort(all)
	return all
}

// listen serves at one address until the context ends.
func (d *doors) listen(ctx context.Context, name, address string, serve func(net.Listener) error) {
	name += " " + address
	d.keep(ctx, name, func() error {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err != nil {
			return err
		}
		defer l.Close()
		d.opened(name)
		return serve(l)
	})
}

// ssh serves SSH at all of its addresses until the context ends.
func (d *doors) ssh(ctx context.Context) {
	d.keep(ctx, "ssh", func() error {
		server, err := d.newSSH()
		if err != nil {
			return err
		}
		d.opened("ssh")
		var all sync.WaitGroup
		defer all.Wait()
		for _, address := range d.config.SSH.Listen {
			all.Go(func() {
				d.listen(ctx, "ssh", address, func(l net.Listener) error { return server.Serve(ctx, l) })
			})
		}
		return nil
	})
}

// newSSH returns the SSH server, which all addresses share.
func (d *doors) newSSH() (*sshserver.Server, error) {
	c := d.config
	signers, cert, err := sshserver.HostKey(c.SSH.HostKey, c.SSH.HostCertificate, c.Name+"."+bundle.BastionDomain)
	if err != nil {
		return nil, err
	}
	authority := d.trusted.Authority()
	server, err := sshserver.New(sshserver.Options{HostSigners: signers, Authenticate: authority.User, Roleless: true, Offer: authority.Offered, Hold: authority.Hold,
		Handlers: d.handlers, Limits: limits, Log: d.log, Alarm: d.alarms.Raise})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.host = cert
	return server, nil
}

// grpc serves the API over mTLS at all of its addresses until the context ends.
func (d *doors) grpc(ctx context.Context, server *rpc.Server) {
	d.keep(ctx, "grpc", func() error {
		certificate, err := mtls.Load(d.config.GRPC.CertFile, d.config.GRPC.KeyFile, d.config.Name+"."+bundle.BastionDomain, d.log)
		if err != nil {
			return err
		}
		d.mu.Lock()
		d.certificate = certificate
		d.mu.Unlock()
		d.opened("grpc")
		o := mtls.Options{Certificate: certificate, Authority: d.trusted.Authority(), Log: d.log,
			Refused: func(source net.Addr, err error) {
				d.alarms.Raise(alarm.Of(alarm.Refusal, trust.Identity{Door: trust.GRPC, Source: source.String()}, fault.Of(err).Message))
			},
			Dropped: func(n uint64, source string) {
				d.alarms.Raise(alarm.Of(admission.Flood, trust.Identity{Door: trust.GRPC, Source: source}, fmt.Sprintf("%d TLS handshakes were cut short to make room for others", n)))
			}}
		var all sync.WaitGroup
		defer all.Wait()
		for _, address := range d.config.GRPC.Listen {
			all.Go(func() {
				d.listen(ctx, "grpc", address, func(l net.Listener) error {
					secure := mtls.NewListener(l, o)
					defer secure.Close()
					defer context.AfterFunc(ctx, func() { secure.Close() })()
					return server.Serve(secure)
				})
			})
		}
		return nil
	})
}

// ready reports whether somebody can come in by SSH.
func (d *doors) ready() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, address := range d.config.SSH.Listen {
		if d.open["ssh "+address] {
			return true
		}
	}
	return false
}

// warnings tells what is degraded, each in one line.
func (d *doors) warnings() []string {
	all := append(d.trusted.warnings(), d.shut()...)
	d.mu.Lock()
	host, certificate := d.host, d.certificate
	d.mu.Unlock()
	if certificate != nil {
		if cert, err := certificate(); err == nil {
			all = append(all, d.trusted.ServerWarnings(cert)...)
		}
	}
	if host != nil {
		all = append(all, d.trusted.HostWarnings(host)...)
	}
	if n := d.alarms.Dropped(); n > 0 {
		all = append(all, fmt.Sprintf("%d alarms were dropped since the bastion started: see its log", n))
	}
	for _, sink := range d.alarms.Failing() {
		all = append(all, "alarms do not get through to "+sink)
	}
	return all
}
