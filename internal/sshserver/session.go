package sshserver

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"sync"

	gssh "github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// open is called for each channel that a client opens, in a goroutine of its own.
func (s *Server) open(_ *gssh.Server, client *gossh.ServerConn, asked gossh.NewChannel, ctx gssh.Context) {
	c := connOf(ctx)
	if !c.enter() {
		return
	}
	defer c.handlers.Done()
	defer s.recovered("channel", c.remote, func() { c.raw.Close() })
	if !c.afford("channels") {
		return
	}
	g := grantOf(client)
	handler := s.o.Handlers.Channels[asked.ChannelType()]
	switch {
	case handler == nil && asked.ChannelType() != "session":
		s.o.Record.Refused(g.who, fault.New(fault.Refused, "", "a channel of the type %.64q", asked.ChannelType()))
		reject(asked, gossh.Prohibited, "no such channel here")
		return
	case g.held.Err() != nil:
		reject(asked, gossh.Prohibited, "the login has ended")
		return
	}
	defer c.channels.Add(-1)
	if most := int64(s.o.Limits.ChannelsOfConnection); c.channels.Add(1) > most {
		reject(asked, gossh.ResourceShortage, fmt.Sprintf("a connection has no more than %d channels", most))
		return
	}
	release, err := s.channels.Take(g.who)
	if err != nil {
		reject(asked, gossh.ResourceShortage, neutral.Line(err.Error()))
		return
	}
	defer release()
	if handler == nil {
		c.session(g, client, asked, ctx)
	} else {
		c.channel(g, client, asked, handler)
	}
}

// reject answers a client that may be gone already.
func reject(asked gossh.NewChannel, reason gossh.RejectionReason, why string) {
	_ = asked.Reject(reason, why)
}

// accept accepts a channel, whose owner calls forget when it is closed.
func (c *conn) accept(asked gossh.NewChannel, s *Session) (*stream, <-chan *gossh.Request, error) {
	ch, requests, err := asked.Accept()
	if err != nil {
		return nil, nil, err
	}
	st := &stream{conn: c, Channel: ch}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[st] = s
	if s != nil {
		s.stream = st
	}
	return st, requests, nil
}

func (c *conn) forget(st *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, st)
}

// stream is an open channel. It notes when bytes pass.
type stream struct {
	conn *conn
	// stderr keeps apart writers of the extended stream, which x/crypto wants of
	// its callers.
	stderr sync.Mutex
	gossh.Channel
}

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Channel.Read(p)
	if n > 0 {
		s.conn.touch()
	}
	return n, err
}

func (s *stream) Write(p []byte) (int, error) {
	n, err := s.Channel.Write(p)
	if n > 0 {
		s.conn.touch()
	}
	return n, err
}

// Stderr returns the extended stream, for writing.
func (s *stream) Stderr() io.ReadWriter { return extended{s} }

type extended struct{ *stream }

func (e extended) Read(p []byte) (int, error) { return e.Channel.Stderr().Read(p) }

func (e extended) Write(p []byte) (int, error) {
	e.stderr.Lock()
	defer e.stderr.Unlock()
	n, err := e.Channel.Stderr().Write(p)
	if n > 0 {
		e.conn.touch()
	}
	return n, err
}

// Session is a shell, an exec or a subsystem that an authenticated client
// started. Its methods may be used by several goroutines as far as those of a
// net.Conn may.
type Session struct {
	conn   *conn
	grant  *grant
	client *gossh.ServerConn
	ctx    context.Context
	cancel context.CancelFunc

	// Set by filter before the handler starts.
	stream    *stream
	command   string
	subsystem string
	pty       *Pty
	env       map[string]string
	started   bool

	windows chan Window
	library gssh.Session // set when the handler starts
	running sync.WaitGroup
}

// session runs a channel of the type session until it is closed and its handler
// has returned.
func (c *conn) session(g *grant, client *gossh.ServerConn, asked gossh.NewChannel, ctx gssh.Context) {
	s := &Session{conn: c, grant: g, client: client, env: map[string]string{}, windows: make(chan Window, 1)}
	s.ctx, s.cancel = context.WithCancel(g.held)
	defer s.cancel()
	// The library's handler takes all that it needs to know from a server; this
	// one has nothing but what this session may use.
	gssh.DefaultSessionHandler(&gssh.Server{Handler: s.run, SubsystemHandlers: map[string]gssh.SubsystemHandler{"default": s.run}},
		client, filtered{asked, s}, ctx)
	s.running.Wait()
	if s.stream != nil {
		c.forget(s.stream)
	}
}

// filtered is a channel whose requests the library sees only after filter.
type filtered struct {
	gossh.NewChannel
	session *Session
}

func (f filtered) Accept() (gossh.Channel, <-chan *gossh.Request, error) {
	s := f.session
	st, requests, err := s.conn.accept(f.NewChannel, s)
	if err != nil {
		return nil, nil, err
	}
	passed := make(chan *gossh.Request)
	s.conn.handlers.Go(func() { s.filter(requests, passed) })
	return st, passed, nil
}

// filter parses every request of the session, until the channel is closed. The
// library gets a pty-req written anew, so that it ends lines as terminals want
// them, and one request that starts the handler; it would accept agent
// forwarding and any number of variables, and stand still at the second change
// of a window.
func (s *Session) filter(requests <-chan *gossh.Request, passed chan<- *gossh.Request) {
	defer s.conn.server.recovered("session", s.conn.remote, func() { s.conn.raw.Close() })
	defer s.cancel()
	defer close(passed)
	for req := range requests {
		if err := s.conn.pace.Wait(s.ctx); err != nil || !s.take(req) {
			_ = req.Reply(false, nil) // who is gone needs no answer
			continue
		}
		switch req.Type {
		case "pty-req", "shell", "exec", "subsystem":
			select {
			case passed <- req: // the library answers
			case <-s.ctx.Done():
			}
		default:
			_ = req.Reply(true, nil) // as above
		}
	}
}

// take notes what a request asks for, and reports whether that is granted.
func (s *Session) take(req *gossh.Request) bool {
	l, h := s.conn.server.o.Limits, s.conn.server.o.Handlers
	if req.Type == "window-change" {
		w, rest, ok := takeWindow(req.Payload)
		if !ok || len(rest) > 0 || s.pty == nil {
			return false
		}
		select { // only the newest counts
		case <-s.windows:
		default:
		}
		s.windows <- w
		return true
	}
	if s.started {
		return false
	}
	switch req.Type {
	case "pty-req":
		pty, ok := parsePty(req.Payload)
		if !ok || s.pty != nil {
			return false
		}
		s.pty = &pty
		req.Payload = gossh.Marshal(struct {
			Term                         string
			Columns, Rows, Width, Height uint32
			Modes                        string
		}{Term: pty.Term, Columns: uint32(pty.Window.Columns), Rows: uint32(pty.Window.Rows)})
		return true
	case "env":
		name, value, ok := parseEnv(req.Payload, l.Env)
		if ok {
			s.env[name] = value
		}
		return ok
	case "shell":
		s.started = h.Session != nil && len(req.Payload) == 0
	case "exec":
		command, ok := onlyString(req.Payload)
		if s.started = h.Session != nil && ok && command != "" && len(command) <= l.Command; s.started {
			s.command = command
		}
	case "subsystem":
		name, ok := onlyString(req.Payload)
		if s.started = ok && h.Subsystems[name] != nil; s.started {
			s.subsystem = name
		}
	}
	if s.started {
		s.running.Add(1)
	} else {
		what := fmt.Sprintf("%.64q", req.Type)
		if line, ok := onlyString(req.Payload); ok {
			what += fmt.Sprintf(" %.256q", line)
		}
		s.conn.server.o.Record.Refused(s.grant.who, fault.New(fault.Refused, "", "%s in an SSH session", what))
	}
	return s.started
}

// run runs the handler, in a goroutine of the library's that session waits for.
func (s *Session) run(library gssh.Session) {
	defer s.running.Done()
	defer s.conn.server.recovered("session", s.conn.remote, func() {
		s.tell("halligan: a fault of the server ended this session; its log has more")
		_ = library.Exit(1) // who is gone needs no answer
	})
	s.library = library
	handler := s.conn.server.o.Handlers.Session
	if s.subsystem != "" {
		handler = s.conn.server.o.Handlers.Subsystems[s.subsystem]
	}
	handler(s)
	if s.grant.held.Err() != nil { // else the library says that all went well
		_ = library.Exit(fault.CodeOf(context.Cause(s.grant.held)).Exit()) // as above; the handler may have done so
	}
}

// tell writes one line for a person, unless the handler is just writing one.
func (s *Session) tell(line string) {
	if s.stream == nil || !s.stream.stderr.TryLock() {
		return
	}
	defer s.stream.stderr.Unlock()
	_, _ = io.WriteString(s.stream.Channel.Stderr(), "\r\n"+line+"\r\n") // who is gone need not be told
}

// Identity returns who it is.
func (s *Session) Identity() trust.Identity { return s.grant.who }

// Held returns a context that lives as long as the login may, and longer than
// the connection where its handler does. When it ends because the credential or
// a limit did, its cause is a *fault.Error; the client has been told, and is cut
// off in half a second, in which a handler may have a last word.
func (s *Session) Held() context.Context { return s.grant.held }

// Context returns a context that ends with Held or when the client has closed
// the session, whichever comes first.
func (s *Session) Context() context.Context { return s.ctx }

// User returns the user name that the login was for.
func (s *Session) User() string { return s.client.User() }

// RemoteAddr returns the client's address.
func (s *Session) RemoteAddr() net.Addr { return s.client.RemoteAddr() }

// LocalAddr returns the address that the client reached.
func (s *Session) LocalAddr() net.Addr { return s.client.LocalAddr() }

// Command returns the exec line as it was sent: any bytes, without any quoting
// undone. It is empty for a shell and for a subsystem.
func (s *Session) Command() string { return s.command }

// Subsystem returns the name of the subsystem, if it is one.
func (s *Session) Subsystem() string { return s.subsystem }

// Pty returns the client's terminal as it was when the session started, if it
// has one. Line feeds written to such a session become CR LF.
func (s *Session) Pty() (Pty, bool) {
	if s.pty == nil {
		return Pty{}, false
	}
	return *s.pty, true
}

// Windows returns where changes of the terminal's size arrive. Those that
// nobody took are forgotten but for the newest. It is never closed.
func (s *Session) Windows() <-chan Window { return s.windows }

// Env returns what the client set of HALLIGAN_REASON, HALLIGAN_INCIDENT, LANG
// and TERM: one line each, of untrusted text.
func (s *Session) Env() map[string]string { return maps.Clone(s.env) }

// Read reads what the client sends.
func (s *Session) Read(p []byte) (int, error) { return s.library.Read(p) }

// Write writes to the client's standard output.
func (s *Session) Write(p []byte) (int, error) { return s.library.Write(p) }

// Stderr returns the client's standard error.
func (s *Session) Stderr() io.Writer { return extended{s.stream} }

// CloseWrite says that no more output follows.
func (s *Session) CloseWrite() error { return s.stream.CloseWrite() }

// Exit ends the session with an exit status. A handler that returns without it
// ends with 0.
func (s *Session) Exit(status int) error { return s.library.Exit(status) }

// Close ends the session without an exit status.
func (s *Session) Close() error { return s.stream.Close() }
