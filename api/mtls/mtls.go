// Package mtls is a daemon's door for automation in any language: gRPC over
// TLS 1.3 in which both sides have certificates. A connection is handed on only
// after the client's certificate has been proven and verified under the bundle
// in force.
//
// It must never hand on a connection whose peer is unknown, resume an old
// session, or let strangers who never finish a handshake keep out others. It
// stands on floor 1.
package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/api/grpcdoor"
	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/durable"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/reload"
	"github.com/halligan-io/halligan/internal/trust"
)

// Authority says who holds a certificate, by the bundle in force. Its methods
// are called concurrently.
type Authority interface {
	// Client returns who has proven to hold the key of certs[0].
	Client(certs []*x509.Certificate, source net.Addr) (trust.Identity, error)
	// Hold returns a context that ends, with a fault as its cause, when the
	// identity no longer holds.
	Hold(ctx context.Context, id trust.Identity) (context.Context, context.CancelFunc)
}

// Options of a listener.
type Options struct {
	// Certificate returns the certificate to show; see [Load].
	Certificate func() (*tls.Certificate, error)
	Authority   Authority
	// Protocol is what both sides must speak, by its name in ALPN (RFC 7301);
	// empty: HTTP/2.
	Protocol string
	// Relay reports whether an address is a bastion's, behind which many come;
	// may be nil.
	Relay func(netip.Addr) bool
	// Refused is told of who proved to hold a certificate and is not let in; may be
	// nil. It must not block.
	Refused func(who trust.Identity, err error)
	// Alarm is told of handshakes that failed because of who came, and of floods
	// of them. It must not block.
	Alarm func(alarm.Event)
	Log   zerolog.Logger
}

// The bounds of handshakes under way. One takes a round trip and a few
// milliseconds, so that these are for thousands in a second.
const (
	handshakeTimeout = 5 * time.Second
	maxHandshakes    = 64
	maxOfSource      = 8
	maxOfRelay       = 32
	maxOfRelays      = 64 // together
)

// Listener accepts authenticated connections only; all are of type [grpcdoor.Conn].
type Listener struct {
	net.Listener
	o       Options
	room    *admission.Room
	ready   chan *conn
	closed  chan struct{}
	close   func() error
	config  *tls.Config
	workers sync.WaitGroup
	// accepting ends with the first error of the listener below.
	accepting error
	ended     chan struct{}
}

// NewListener authenticates what l accepts. Closing it closes l.
func NewListener(l net.Listener, o Options) *Listener {
	if o.Protocol == "" {
		o.Protocol = "h2"
	}
	if o.Refused == nil {
		o.Refused = func(trust.Identity, error) {}
	}
	m := &Listener{Listener: l, o: o, ready: make(chan *conn), closed: make(chan struct{}), ended: make(chan struct{})}
	m.room = admission.NewRoom(admission.RoomOptions{Total: maxHandshakes, Each: maxOfSource, Relayed: maxOfRelay, RelayedTotal: maxOfRelays, Relay: o.Relay,
		Dropped: func(n uint64, source string) {
			o.Alarm(alarm.Of(admission.Flood, trust.Identity{Door: trust.GRPC, Source: source}, fmt.Sprintf("%d TLS handshakes were cut short to make room for others", n)))
		}})
	m.close = sync.OnceValue(func() error {
		close(m.closed)
		err := l.Close()
		m.room.Close()
		m.workers.Wait()
		return err
	})
	m.config = &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{o.Protocol},
		// Whoever comes must prove to hold the key of some certificate; whether
		// it is one of ours is Authority's to say.
		ClientAuth:     tls.RequireAnyClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return o.Certificate() },
		// A session that is resumed would go on with an old decision.
		SessionTicketsDisabled: true,
	}
	m.workers.Go(m.take)
	return m
}

// Accept returns the next connection whose peer is known.
func (m *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-m.ready:
		return c, nil
	case <-m.closed:
		return nil, net.ErrClosed
	case <-m.ended:
		return nil, m.accepting
	}
}

// Close ends the listener, and the handshakes under way.
func (m *Listener) Close() error { return m.close() }

// take accepts connections until the listener is closed or fails for good.
func (m *Listener) take() {
	for {
		raw, err := m.Listener.Accept()
		if err != nil {
			select {
			case <-m.closed:
				return
			default:
			}
			if errors.Is(err, net.ErrClosed) {
				m.accepting = err
				close(m.ended)
				return
			}
			// Out of descriptors, most likely: some will be closed.
			m.o.Log.Warn().Err(err).Msg("accepting a connection")
			select {
			case <-m.closed:
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		guest := m.room.Enter(raw)
		m.workers.Go(func() { m.admit(raw, guest) })
	}
}

// admit does the handshake and hands the connection on.
func (m *Listener) admit(raw net.Conn, guest *admission.Guest) {
	defer func() {
		if r := recover(); r != nil {
			m.o.Log.Error().Interface("panic", r).Msg("a handshake panicked")
			raw.Close()
		}
	}()
	defer guest.Leave()
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	var who trust.Identity
	var refusal error
	config := m.config.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { guest.Reached(admission.Speaking); return nil, nil }
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if state.NegotiatedProtocol != m.o.Protocol {
			return fmt.Errorf("the peer does not speak %s", m.o.Protocol)
		}
		who, refusal = m.o.Authority.Client(state.PeerCertificates, raw.RemoteAddr())
		return refusal
	}
	secure := tls.Server(raw, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		raw.Close()
		if refusal != nil {
			stranger := trust.Identity{Door: trust.GRPC, Source: raw.RemoteAddr().String()}
			m.o.Alarm(alarm.Of(alarm.Refusal, stranger, fault.Of(refusal).Message))
			m.o.Refused(stranger, refusal)
		} else {
			m.o.Log.Debug().Stringer("source", raw.RemoteAddr()).Err(err).Msg("handshake failed")
		}
		return
	}
	held, end := m.o.Authority.Hold(context.Background(), who)
	c := &conn{Conn: secure, who: who, held: held, end: sync.OnceFunc(end)}
	select {
	case m.ready <- c:
	case <-m.closed:
		c.Close()
	}
}

// conn is a connection whose peer is known.
type conn struct {
	*tls.Conn
	who  trust.Identity
	held context.Context
	end  func()
}

var _ grpcdoor.Conn = (*conn)(nil)

func (c *conn) Identity() (trust.Identity, error) { return c.who, nil }
func (c *conn) Held() context.Context             { return c.held }

func (c *conn) Close() error {
	defer c.end()
	return c.Conn.Close()
}

// Load returns a source of the certificate in two files, which are loaded again
// when they change; one that cannot be used leaves the one before in force. The
// certificate must be a server's for name.
func Load(certFile, keyFile, name string, log zerolog.Logger) (func() (*tls.Certificate, error), error) {
	get, err := reload.Files("the certificate of gRPC", []string{certFile, keyFile}, func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err == nil {
			err = checkFor(name, &cert)
		}
		if err != nil {
			return nil, fault.New(fault.Usage, "issue one with: halligan ca issue --help", "the certificate %s: %w", certFile, err)
		}
		if err := durable.CheckPrivate(keyFile); err != nil {
			return nil, fault.New(fault.Usage, "", "the key of %s: %w", certFile, err)
		}
		return &cert, nil
	}, log)
	if err != nil {
		return nil, err
	}
	return func() (*tls.Certificate, error) { return get(), nil }, nil
}

// checkFor refuses a certificate that clients, who expect NODE.CLUSTER, would.
func checkFor(name string, cert *tls.Certificate) error {
	leaf := cert.Leaf
	server := false
	for _, u := range leaf.ExtKeyUsage {
		server = server || u == x509.ExtKeyUsageServerAuth
	}
	switch {
	case !server || leaf.IsCA:
		return errors.New("it is not a server's certificate (extended key usage serverAuth)")
	case len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != name:
		return fmt.Errorf("it is for %q, and this is %s", leaf.DNSNames, name)
	}
	return nil
}
