// Package sshserver is the hardened SSH server of every daemon: it takes
// connections, lets a caller decide who has proven which key, and hands on
// sessions that carry that identity. What is asked in a session is the caller's.
//
// It is the only importer of github.com/gliderlabs/ssh and closes that library's
// traps: nobody is let in without a key, and the identity comes from the key that
// was proven and from nothing that was merely offered; what a client sends is
// parsed here before the library sees it; a panic costs one connection; there is
// no host key but those given; and everything that a stranger or a friend can
// make the server hold is bounded by [Limits].
//
// It must never start a process, forward anything by itself, take a password, or
// let somebody in without asking Options.Authenticate. It stands on floor 0.
package sshserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	gssh "github.com/gliderlabs/ssh"
	"github.com/rs/zerolog"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/time/rate"

	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// Panic is the alarm of a fault of this program that a client found.
const Panic = alarm.Panic

// Options say what a server is to be. HostSigners, Authenticate and Hold are
// required; there is no default that lets anybody in.
type Options struct {
	// HostSigners are the host's key and certificates of it, Ed25519 only: every
	// client in use knows it, and the alternatives that x/crypto has are ones
	// that an audit finds weak. One of each type.
	HostSigners []gossh.Signer
	// HostRenewed, if set, is asked for them for each connection, and HostSigners
	// is not looked at; see HostFiles.
	HostRenewed func() []gossh.Signer
	// Authenticate says who it is that came as user with a key whose private
	// half was proven to be at hand. It is called for proven keys only. The text
	// of a *fault.Error is shown to the client, that of others is not.
	Authenticate func(key gossh.PublicKey, user string, remote net.Addr) (trust.Identity, error)
	// Roleless says that nobody takes a role here, as at a bastion. Elsewhere an
	// identity without one is nobody's.
	Roleless bool
	// Offer says cheaply whether a key that is merely offered is worth a
	// signature; nil asks for one of every key. It must decide nothing else:
	// who offers a key need not have it. A connection that offered a good key is
	// the last one to be dropped in a flood.
	Offer func(key gossh.PublicKey) bool
	// Hold returns a context that ends when the identity's credential does, with
	// a *fault.Error as its cause. It is called once for each login.
	Hold func(ctx context.Context, who trust.Identity) (context.Context, context.CancelFunc)

	Handlers Handlers
	// Relay, if set, says which addresses are bastions of ours. Many people
	// share such an address, so each has a pool of its own, which neither fills
	// up the others' places nor can be filled by strangers elsewhere.
	Relay  func(netip.Addr) bool
	Limits Limits
	Log    zerolog.Logger
	// Alarm is told of logins, refusals, floods and panics. It must not block.
	Alarm func(alarm.Event)
	// Record is left out in tests only.
	Record Record
}

// Record takes down who came in and who did not. What somebody opens is for its
// handler to record. None of its methods may block.
type Record interface {
	// Login is told of everybody who is let in. What it returns is told of the end,
	// and of why where the server ended it, else nil.
	Login(who trust.Identity) (logout func(why error))
	// Refused is told of a key that was proven and not let in, and of what somebody
	// who is in was refused.
	Refused(who trust.Identity, err error)
}

// unrecorded is the Record of tests.
type unrecorded struct{}

func (unrecorded) Login(trust.Identity) func(error) { return func(error) {} }
func (unrecorded) Refused(trust.Identity, error)    {}

// Handlers are what an authenticated client may ask for; all else is refused.
// Each runs in a goroutine of its own, may panic, and must return soon after its
// session's context has ended: Serve waits for it.
type Handlers struct {
	// Session is the shell and exec form; nil refuses both.
	Session func(*Session)
	// Subsystems by name.
	Subsystems map[string]func(*Session)
	// Channels by type, such as direct-tcpip; "session" is not one of them.
	Channels map[string]func(*Channel)
}

// Server is a hardened SSH server. Several listeners may share one, and then
// share its limits.
type Server struct {
	o        Options
	library  *gssh.Server
	waiting  *admission.Room
	logins   *admission.Places
	channels *admission.Places
	// places bounds the goroutines of connections, those that were dropped and
	// have not ended yet included.
	places chan struct{}
	// refusals keeps strangers from filling the log.
	refusals *rate.Limiter
}

// New returns a server, or says which option is missing or unsafe.
func New(o Options) (*Server, error) {
	switch {
	case o.Authenticate == nil || o.Hold == nil:
		return nil, errors.New("an SSH server needs to be told who may come in, and for how long")
	case o.Handlers.Channels["session"] != nil:
		return nil, errors.New("sessions are handled by Handlers.Session")
	}
	if o.HostRenewed == nil {
		o.HostRenewed = func() []gossh.Signer { return o.HostSigners }
	}
	if err := checkSigners(o.HostRenewed()); err != nil {
		return nil, err
	}
	limits, err := o.Limits.withDefaults()
	if err != nil {
		return nil, err
	}
	o.Limits = limits
	if o.Alarm == nil {
		o.Alarm = func(alarm.Event) {}
	}
	if o.Record == nil {
		o.Record = unrecorded{}
	}
	places := func(what string, total, each, reserved int) *admission.Places {
		p := admission.PlacesOptions{What: what, Total: total, Each: each, Reserved: reserved}
		if !o.Roleless {
			p.Responders = reserved / 2
		}
		return admission.NewPlaces(p)
	}
	s := &Server{
		o:        o,
		logins:   places("connections", limits.Connections, limits.ConnectionsEach, limits.ReservedConnections),
		channels: places("channels", limits.Channels, limits.ChannelsEach, limits.ReservedChannels),
		places:   make(chan struct{}, 2*(limits.Unauthenticated+limits.RelayedTotal)+limits.Connections),
		refusals: rate.NewLimiter(5, 20),
	}
	s.waiting = admission.NewRoom(admission.RoomOptions{Total: limits.Unauthenticated, Each: limits.UnauthenticatedEach, Relayed: limits.Relayed, RelayedTotal: limits.RelayedTotal, Relay: o.Relay,
		Dropped: func(n uint64, source string) {
			s.flood(fmt.Sprintf("%d connections without a login were dropped to make room for others", n), trust.Identity{Source: source, Door: trust.SSH})
		}})
	s.library = &gssh.Server{
		HostSigners: make([]gssh.Signer, 0, len(o.HostSigners)),
		Version:     "Go", // as any program with x/crypto; nothing about what this is, or its version
		// With all of its handlers nil the library would let everybody in. This
		// one only picks which keys are worth a signature: s.config has the gate.
		// It must not ask ctx for the user, who is that of the first attempt.
		PublicKeyHandler: func(ctx gssh.Context, key gssh.PublicKey) bool {
			return connOf(ctx).offered(key)
		},
		ConnCallback: func(ctx gssh.Context, nc net.Conn) net.Conn {
			nc.(*conn).library = ctx
			ctx.SetValue(connKey{}, nc)
			return nc
		},
		ServerConfigCallback: func(ctx gssh.Context) *gossh.ServerConfig { return s.config(connOf(ctx)) },
		ConnectionFailedCallback: func(_ net.Conn, err error) {
			s.o.Log.Debug().Str("error", neutral.LineMax(err.Error(), 256)).Msg("no login")
		},
		// The maps are not nil, or the library would put its own defaults there.
		ChannelHandlers:   map[string]gssh.ChannelHandler{"default": s.open},
		RequestHandlers:   map[string]gssh.RequestHandler{"default": s.globalRequest},
		SubsystemHandlers: map[string]gssh.SubsystemHandler{},
	}
	return s, nil
}

// What is negotiated. Ciphers are AEAD, and of those AES-GCM: the Terrapin attack
// (CVE-2023-48795) breaks ChaCha20-Poly1305 where a client lacks strict key
// exchange, and counter mode, which OpenSSH would prefer, is slower with its MAC.
// The MACs are for clients that want one named; GCM uses none. x/crypto adds the
// older name of curve25519-sha256.
var (
	keyExchanges = []string{gossh.KeyExchangeMLKEM768X25519, gossh.KeyExchangeCurve25519}
	ciphers      = []string{gossh.CipherAES128GCM, gossh.CipherAES256GCM}
	macs         = []string{gossh.HMACSHA256ETM, gossh.HMACSHA512ETM}
)

// config is made anew for each connection. The library adds PublicKeyCallback;
// NoClientAuth stays false, since PublicKeyHandler is set. It has no host keys to
// add, and makes none up, since its Serve is not used.
func (s *Server) config(c *conn) *gossh.ServerConfig {
	config := &gossh.ServerConfig{
		Config:                    gossh.Config{KeyExchanges: keyExchanges, Ciphers: ciphers, MACs: macs},
		PublicKeyAuthAlgorithms:   pubkey.Algorithms(),
		MaxAuthTries:              s.o.Limits.AuthTries,
		PreAuthConnCallback:       func(gossh.ServerPreAuthConn) { c.exchanged() },
		VerifiedPublicKeyCallback: c.login,
	}
	for _, signer := range s.o.HostRenewed() {
		config.AddHostKey(signer)
	}
	return config
}

// Serve takes connections from the listener until ctx ends, tells the sessions
// that are left, and returns when each of their goroutines has ended. It closes
// the listener. The error is nil when ctx ended it.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	base, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	var conns sync.WaitGroup
	unhook := context.AfterFunc(ctx, func() { l.Close() })
	err := s.accept(ctx, l, func(nc net.Conn) {
		conns.Go(func() {
			defer func() { <-s.places }()
			s.serve(base, nc)
		})
	})
	unhook()
	l.Close()
	stop(fault.New(fault.Cancelled, "connect again when it is back", "the daemon is stopping"))
	conns.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// accept hands on each connection with one place taken.
func (s *Server) accept(ctx context.Context, l net.Listener, handle func(net.Conn)) error {
	delay := time.Duration(0)
	for {
		select {
		case s.places <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		nc, err := l.Accept()
		if err == nil {
			delay = 0
			handle(nc)
			continue
		}
		<-s.places
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accepting SSH connections: %w", err)
		}
		// Too many open files, or a connection that is gone already: neither is
		// a reason to stay deaf for good.
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
		s.o.Log.Warn().Str("error", neutral.Line(err.Error())).Msg("accepting SSH connections")
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// serve is the life of one connection.
func (s *Server) serve(base context.Context, nc net.Conn) {
	c := newConn(s, base, nc)
	defer c.finish()
	defer s.recovered("connection", c.remote, nil)
	c.guest = s.waiting.Enter(nc)
	c.run()
}

// recovered is deferred by every goroutine that runs what a client asked for.
func (s *Server) recovered(what, remote string, then func()) {
	p := recover()
	if p == nil {
		return
	}
	s.o.Log.Error().Str("panic", neutral.LineMax(fmt.Sprint(p), 512)).Str("source", remote).Bytes("stack", debug.Stack()).Msg("panic in an SSH " + what)
	s.o.Alarm(alarm.Of(Panic, trust.Identity{Source: remote, Door: trust.SSH}, "a fault of the server ended an SSH "+what+"; its log has the stack"))
	if then != nil {
		then()
	}
}

func (s *Server) flood(text string, who trust.Identity) {
	s.o.Log.Warn().Str("source", who.Source).Str("person", who.Person).Msg(text)
	s.o.Alarm(alarm.Of(admission.Flood, who, text))
}

// refused tells of a key that was proven and not let in. Others log who tries
// at the level debug: strangers choose how often that happens.
func (s *Server) refused(remote, user, fingerprint string, err error) {
	if !s.refusals.Allow() {
		return
	}
	text := neutral.LineMax(err.Error(), 512)
	s.o.Log.Info().Str("source", remote).Str("user", neutral.LineMax(user, 64)).Str("key", fingerprint).Str("error", text).Msg("login refused")
	who := trust.Identity{Source: remote, Door: trust.SSH, Fingerprint: fingerprint}
	s.o.Alarm(alarm.Of(alarm.Refusal, who, text))
	s.o.Record.Refused(who, err)
}

// globalRequest refuses every request about the whole connection: forwarding
// from here to there, and names nobody knows. Keepalives need no more than an
// answer.
func (s *Server) globalRequest(ctx gssh.Context, _ *gssh.Server, _ *gossh.Request) (ok bool, payload []byte) {
	defer s.recovered("request", connOf(ctx).remote, nil)
	connOf(ctx).afford("requests")
	return false, nil
}
