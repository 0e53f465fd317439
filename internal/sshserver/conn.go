package sshserver

import (
	"context"
	"errors"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"time"

	gssh "github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"
	"golang.org/x/time/rate"

	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/pubkey"
)

// farewell is how long a session may outlast its login, about: for a last word
// of its handler, and for the client to hang up.
const farewell = 500 * time.Millisecond

type connKey struct{}

func connOf(ctx gssh.Context) *conn { return ctx.Value(connKey{}).(*conn) }

// grantKey is where the permissions of a proven key hold its grant.
type grantKey struct{}

// grant is what a login got. It travels in the permissions that x/crypto keeps
// for the key that was proven, and nowhere else.
type grant struct {
	who trust.Identity
	// held ends when the login must, with a *fault.Error as its cause.
	held context.Context
}

// grantOf returns the grant of an authenticated connection.
func grantOf(c *gossh.ServerConn) *grant {
	if c.Permissions != nil {
		if g, ok := c.Permissions.ExtraData[grantKey{}].(*grant); ok {
			return g
		}
	}
	panic("an SSH connection without a grant got past its login") // ends the connection
}

// conn is one client's connection: the bytes below the library, with deadlines
// of their own, and what is done for it.
type conn struct {
	net.Conn // without the deadlines, which the library would reset
	raw      net.Conn
	server   *Server
	base     context.Context
	remote   string
	began    time.Time

	guest     *admission.Guest // until it has logged in
	loggedIn  atomic.Bool
	unreadYet atomic.Int64 // how many bytes may still be read before the login
	active    atomic.Int64 // when a byte last passed through a channel, since began
	channels  atomic.Int64 // that are open

	library  gssh.Context  // set by the library, before its first byte
	requests *rate.Limiter // what a client opens and asks of the whole connection; past it, it is cut off
	pace     *rate.Limiter // what it asks in sessions; past it, it waits
	handlers sync.WaitGroup

	undo func()        // gives back what a login took; only for its own goroutine
	gone chan struct{} // closed when no byte passes any more

	mu      sync.Mutex // guards what follows
	ended   bool       // no handler may start any more
	cutOff  bool
	streams map[*stream]*Session // that are open; nil for channels of other types
}

func newConn(s *Server, base context.Context, nc net.Conn) *conn {
	limiter := func() *rate.Limiter {
		return rate.NewLimiter(rate.Limit(s.o.Limits.Requests), 4*s.o.Limits.Requests)
	}
	c := &conn{Conn: nc, raw: nc, server: s, base: base, remote: nc.RemoteAddr().String(), began: time.Now(),
		requests: limiter(), pace: limiter(), gone: make(chan struct{}), streams: map[*stream]*Session{}}
	c.unreadYet.Store(s.o.Limits.LoginBytes)
	return c
}

// run runs the connection until it is closed by either side.
func (c *conn) run() {
	l := c.server.o.Limits
	if tcp, ok := c.raw.(*net.TCPConn); ok {
		// Best effort: where it fails, the questions inside SSH still come.
		_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: l.KeepAlive, Interval: l.KeepAlive / 3, Count: 3})
	}
	_ = c.raw.SetDeadline(c.began.Add(l.KeyExchange)) // fails where it is closed, and then so does all else
	stop := context.AfterFunc(c.base, func() {
		if !c.loggedIn.Load() {
			c.raw.Close()
		}
	})
	defer stop()
	c.server.library.HandleConn(c)
}

// finish ends what is left of the connection and waits for it.
func (c *conn) finish() {
	c.raw.Close()
	if c.guest != nil {
		c.guest.Leave()
	}
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	close(c.gone)
	c.handlers.Wait()
	if c.undo != nil {
		c.undo()
	}
}

// enter has finish wait for a goroutine that calls c.handlers.Done; it reports
// false where that is too late.
func (c *conn) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return false
	}
	c.handlers.Add(1)
	return true
}

// mostGreeting is the longest first line of a client in bytes, RFC 4253 section
// 4.2. OpenSSH sends what it can negotiate right behind it, so that whoever only
// greets counts as silent and is dropped before.
const mostGreeting = 255

var errTooMuch = errors.New("too much was sent before a login")

// Read reads, and bounds what is read before the login.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.raw.Read(p)
	if n > 0 && !c.loggedIn.Load() {
		left := c.unreadYet.Add(int64(-n))
		if left < 0 {
			c.raw.Close()
			return 0, errTooMuch
		}
		if c.server.o.Limits.LoginBytes-left > mostGreeting {
			c.guest.Reached(admission.Speaking)
		}
	}
	return n, err
}

// Write writes, and after the login gives the network some time to take it;
// before, the deadline of the login stands.
func (c *conn) Write(p []byte) (int, error) {
	if c.loggedIn.Load() {
		if err := c.raw.SetWriteDeadline(time.Now().Add(c.server.o.Limits.Write)); err != nil {
			return 0, err
		}
	}
	n, err := c.raw.Write(p)
	if err != nil {
		c.raw.Close() // else its reader would wait for as long as the client likes, and keep its places
	}
	return n, err
}

// SetDeadline does nothing: the library sets one, of no time, before every read.
func (c *conn) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing, see SetDeadline.
func (c *conn) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing, see SetDeadline.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// exchanged is called once keys are agreed on.
func (c *conn) exchanged() {
	c.guest.Reached(admission.Exchanged)
	_ = c.raw.SetDeadline(c.began.Add(c.server.o.Limits.Login)) // as in run
}

// offered says whether a key is worth a signature. Nothing is kept of it but
// that this connection is not to be dropped first.
func (c *conn) offered(key gossh.PublicKey) bool {
	if offer := c.server.o.Offer; offer != nil && !offer(key) {
		return false
	}
	if cert, ok := key.(*gossh.Certificate); ok {
		key = cert.Key
	}
	if pubkey.Check(key) != nil {
		return false
	}
	c.guest.Reached(admission.Known)
	return true
}

// login decides about a key that was proven. The permissions that it is handed
// belong to whatever was offered before, and are not looked at.
func (c *conn) login(meta gossh.ConnMetadata, key gossh.PublicKey, _ *gossh.Permissions, _ string) (*gossh.Permissions, error) {
	s := c.server
	g, err := c.grant(meta, key)
	if err != nil {
		s.refused(c.remote, meta.User(), fingerprint(key), err)
		var told *fault.Error
		if errors.As(err, &told) {
			return nil, &gossh.BannerError{Err: err, Message: "halligan: " + neutral.LineMax(told.Error(), 512) + "\r\n"}
		}
		return nil, err
	}
	s.o.Log.Info().Str("person", neutral.Line(g.who.Person)).Stringer("role", g.who.Role).Str("source", c.remote).Str("key", g.who.Fingerprint).Msg("login")
	s.o.Alarm(alarm.Of(alarm.Login, g.who, "came in by SSH"))
	logout, undo := s.o.Record.Login(g.who), c.undo
	c.undo = func() {
		why := ended(g.held)
		undo()
		logout(why)
	}
	return &gossh.Permissions{ExtraData: map[any]any{grantKey{}: g}}, nil
}

// ended returns the fault by which the server ended a login, nil where its client
// did.
func ended(held context.Context) error {
	var why *fault.Error
	if errors.As(context.Cause(held), &why) {
		return why
	}
	return nil
}

func fingerprint(key gossh.PublicKey) string {
	if cert, ok := key.(*gossh.Certificate); ok {
		key = cert.Key
	}
	return gossh.FingerprintSHA256(key)
}

// grant finds out who it is, and takes a place.
func (c *conn) grant(meta gossh.ConnMetadata, key gossh.PublicKey) (*grant, error) {
	s := c.server
	who, err := s.o.Authenticate(key, meta.User(), meta.RemoteAddr())
	if err != nil {
		return nil, err
	}
	if who.Person == "" || who.Role == trust.None && !s.o.Roleless {
		return nil, errors.New("authenticated as nobody")
	}
	who.Session = trust.NewSession(c.began)
	release, err := s.logins.Take(who)
	if err != nil {
		return nil, err
	}
	c.undo = release // also where Hold panics
	if !c.guest.Leave() {
		return nil, errors.New("dropped while logging in")
	}
	c.loggedIn.Store(true)
	_ = c.raw.SetDeadline(time.Time{}) // as in run
	c.touch()

	// The credential's end is told of before the handlers see it, since a
	// session cannot be told any more once its handler has returned.
	credential, unhold := s.o.Hold(c.base, who)
	held, cancel := context.WithCancelCause(context.WithoutCancel(credential))
	var once sync.Once
	end := func(cause error) { once.Do(func() { c.end(cause, cancel) }) }
	unhook := context.AfterFunc(credential, func() { end(context.Cause(credential)) })
	unlimit := func() bool { return true }
	if most := s.o.Limits.Session; most > 0 {
		unlimit = time.AfterFunc(most, func() {
			end(fault.New(fault.Unauthenticated, "log in again", "no session lasts longer than %v", most))
		}).Stop
	}
	c.handlers.Go(func() { c.keepAlive(end) })
	c.undo = func() {
		unhook()
		unlimit()
		unhold()
		cancel(context.Canceled)
		release()
	}
	return &grant{who: who, held: held}, nil
}

// touch notes that somebody is at work.
func (c *conn) touch() { c.active.Store(int64(time.Since(c.began))) }

// keepAlive asks the client whether it is there, and ends what is idle.
func (c *conn) keepAlive(end func(error)) {
	defer c.server.recovered("keepalive", c.remote, func() { c.raw.Close() })
	l := c.server.o.Limits
	tick := time.NewTicker(l.KeepAlive)
	defer tick.Stop()
	for {
		select {
		case <-c.gone:
			return
		case <-tick.C:
		}
		if time.Since(c.began)-time.Duration(c.active.Load()) > l.Idle {
			c.handlers.Go(func() { end(fault.New(fault.Unauthenticated, "log in again", "nothing happened for %v", l.Idle)) })
			return
		}
		client, ok := c.library.Value(gssh.ContextKeyConn).(*gossh.ServerConn)
		if !ok {
			continue // the library has not got so far
		}
		missed := time.AfterFunc(l.KeepAliveAnswer, func() { c.raw.Close() })
		_, _, err := client.SendRequest("keepalive@openssh.com", true, nil) // any answer will do
		missed.Stop()
		if err != nil {
			return
		}
	}
}

// end ends the login: it tells every session why, lets the handlers know, and
// then gives both sides some time to finish.
func (c *conn) end(cause error, cancel context.CancelCauseFunc) {
	defer cancel(cause) // also where there is nobody to be told any more
	if !c.enter() {
		return
	}
	defer c.handlers.Done()
	defer c.server.recovered("farewell", c.remote, nil)
	defer c.raw.Close()
	// Closing a channel waits for the network, which takes nothing for a client
	// that has stopped reading.
	defer time.AfterFunc(farewell, func() { c.raw.Close() }).Stop()
	c.server.o.Log.Info().Str("source", c.remote).Str("why", neutral.LineMax(cause.Error(), 512)).Msg("login ended")
	line := "halligan: this session ends: " + neutral.LineMax(fault.Of(cause).Error(), 512)
	open := c.open()
	var told sync.WaitGroup
	for _, session := range open {
		if session != nil {
			told.Add(1)
			c.handlers.Go(func() {
				defer c.server.recovered("farewell", c.remote, nil)
				defer told.Done()
				session.tell(line)
			})
		}
	}
	all := make(chan struct{})
	c.handlers.Go(func() {
		told.Wait()
		close(all)
	})
	c.within(farewell/4, all) // who takes no more has not to be waited for
	cancel(cause)
	c.within(farewell/2, nil)
	for st := range open {
		st.Close()
	}
	c.within(farewell/2, nil)
}

// within waits until something is done or the client has hung up, but not long.
func (c *conn) within(most time.Duration, done <-chan struct{}) {
	select {
	case <-done:
	case <-c.gone:
	case <-time.After(most):
	}
}

// open returns the channels that are open, with their sessions.
func (c *conn) open() map[*stream]*Session {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.streams)
}

// afford reports whether the client may ask for one thing more. If not, it has
// been cut off: no client in order comes near the limit.
func (c *conn) afford(what string) bool {
	if c.requests.Allow() {
		return true
	}
	c.mu.Lock()
	first := !c.cutOff
	c.cutOff = true
	c.mu.Unlock()
	if first {
		c.server.flood("a client was cut off that asked for too many "+what, c.who())
		c.raw.Close()
	}
	return false
}

// who returns whose connection it is, as far as it is known.
func (c *conn) who() trust.Identity {
	if client, ok := c.library.Value(gssh.ContextKeyConn).(*gossh.ServerConn); ok {
		return grantOf(client).who
	}
	return trust.Identity{Source: c.remote, Door: trust.SSH}
}
