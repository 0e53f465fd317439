package bastion

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/audit/record"
	"github.com/halligan-io/halligan/bastion/rpc"
	"github.com/halligan-io/halligan/bastion/tunnel"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/ways"
)

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
	*ways.Ways
	config   Config
	trusted  *trusted
	evidence *record.Evidence
	alarms   *alarm.Alarms
	log      zerolog.Logger
	handlers sshserver.Handlers

	mu      sync.Mutex          // guards all below
	host    func() []ssh.Signer // once it is loaded
	witness ed25519.PublicKey   // as host
	// certificate is that of gRPC, once it is loaded.
	certificate func() (*tls.Certificate, error)
}

// ssh serves SSH at all of its addresses until the context ends.
func (d *doors) ssh(ctx context.Context) {
	d.Keep(ctx, "ssh", func() error {
		server, err := d.newSSH()
		if err != nil {
			return err
		}
		d.Opened("ssh")
		var all sync.WaitGroup
		defer all.Wait()
		for _, address := range d.config.SSH.Listen {
			all.Go(func() {
				d.Listen(ctx, "ssh", address, func(l net.Listener) error { return server.Serve(ctx, l) })
			})
		}
		return nil
	})
}

// newSSH returns the SSH server, which all addresses share.
func (d *doors) newSSH() (*sshserver.Server, error) {
	c := d.config
	host, err := sshserver.HostFiles(c.SSH.HostKey, c.SSH.HostCertificate, c.Name+"."+bundle.BastionDomain, d.log)
	if err != nil {
		return nil, err
	}
	authority := d.trusted.Authority()
	server, err := sshserver.New(sshserver.Options{HostRenewed: host, Authenticate: authority.User, Roleless: true, Offer: authority.Offered, Hold: authority.Hold,
		Handlers: d.handlers, Limits: limits, Log: d.log, Alarm: d.evidence.Raise, Record: d.evidence})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.host = host
	d.certify()
	return server, nil
}

// countersigns takes the key of the bastion's countersignatures.
func (d *doors) countersigns(key ed25519.PublicKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.witness = key
	d.certify()
}

// certify has the host's key vouch for those of the evidence, once both are there;
// without mTLS nothing is countersigned. d.mu is held.
func (d *doors) certify() {
	if d.host != nil && (d.witness != nil || d.config.GRPC == nil) {
		d.evidence.Certified(d.host, d.witness, "")
	}
}

// grpc serves the API over mTLS at all of its addresses until the context ends.
func (d *doors) grpc(ctx context.Context, server *rpc.Server) {
	d.Keep(ctx, "grpc", func() error {
		certificate, err := d.load()
		if err != nil {
			return err
		}
		d.Opened("grpc")
		o := mtls.Options{Certificate: certificate, Authority: d.trusted.Authority(), Refused: d.evidence.Refused, Log: d.log, Alarm: d.evidence.Raise}
		var all sync.WaitGroup
		defer all.Wait()
		for _, address := range d.config.GRPC.Listen {
			all.Go(func() {
				d.Listen(ctx, "grpc", address, func(l net.Listener) error {
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

// tunnel takes the tunnels of nodes at all of its addresses until the context ends.
func (d *doors) tunnel(ctx context.Context, tunnels *tunnel.Tunnels) {
	d.Keep(ctx, "tunnel", func() error {
		certificate, err := d.load()
		if err != nil {
			return err
		}
		d.Opened("tunnel")
		o := mtls.Options{Certificate: certificate, Refused: d.evidence.Refused, Log: d.log, Alarm: d.evidence.Raise}
		var all sync.WaitGroup
		defer all.Wait()
		for _, address := range d.config.Tunnel.Listen {
			all.Go(func() {
				d.Listen(ctx, "tunnel", address, func(l net.Listener) error {
					return tunnels.Serve(ctx, tunnel.Listen(l, d.trusted.Authority(), o))
				})
			})
		}
		return nil
	})
}

// load returns the certificate of gRPC, which tunnels and pushes show, too.
func (d *doors) load() (func() (*tls.Certificate, error), error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.certificate != nil {
		return d.certificate, nil
	}
	certificate, err := mtls.Load(d.config.GRPC.CertFile, d.config.GRPC.KeyFile, d.config.Name+"."+bundle.BastionDomain, d.log)
	d.certificate = certificate
	return certificate, err
}

// shows returns that certificate.
func (d *doors) shows() (*tls.Certificate, error) {
	certificate, err := d.load()
	if err != nil {
		return nil, err
	}
	return certificate()
}

// ready reports whether somebody can come in by SSH.
func (d *doors) ready() bool {
	return slices.ContainsFunc(d.config.SSH.Listen, func(address string) bool { return d.Open("ssh " + address) })
}

// warnings tells what is degraded, each in one line.
func (d *doors) warnings() []string {
	all := append(d.evidence.Warnings(), d.trusted.warnings()...)
	all = append(all, d.Shut()...)
	d.mu.Lock()
	host, certificate := d.host, d.certificate
	d.mu.Unlock()
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
		all = append(all, fmt.Sprintf("%d alarms were dropped since the bastion started: see its log", n))
	}
	for _, sink := range d.alarms.Failing() {
		all = append(all, "alarms do not get through to "+sink)
	}
	return all
}
