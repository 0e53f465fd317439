package grpcdoor

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

// Subsystem is the name of the SSH subsystem under which a daemon's API is
// offered.
const Subsystem = "halligan-grpc"

// Session is an SSH session as the API needs it: a *sshserver.Session, whose
// comments hold.
type Session interface {
	io.ReadWriter
	Stderr() io.Writer
	Identity() trust.Identity
	Held() context.Context
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
	Exit(status int) error
}

// ServeSession serves a session until it has ended.
func (s *Server) ServeSession(with Session) {
	c := newSession(with)
	if err := s.Hand(c); err != nil {
		_, _ = fmt.Fprintf(with.Stderr(), "halligan: %s\n", neutral.Line(fault.Of(err).Error())) // who is gone need not be told
	}
	<-c.closed
}

// session is one as a connection.
type session struct {
	Session
	closed chan struct{}
	close  func() error

	mu    sync.Mutex // guards timer
	timer *time.Timer
}

func newSession(s Session) *session {
	c := &session{Session: s, closed: make(chan struct{})}
	c.close = sync.OnceValue(func() error { defer close(c.closed); return s.Exit(0) })
	return c
}

func (c *session) Identity() (trust.Identity, error) { return c.Session.Identity(), nil }

func (c *session) Close() error {
	_ = c.SetDeadline(time.Time{})
	return c.close()
}

// SetDeadline closes the session at that time, which is what gRPC, its only
// user, would do next.
func (c *session) SetDeadline(at time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if !at.IsZero() {
		c.timer = time.AfterFunc(time.Until(at), func() { _ = c.close() })
	}
	return nil
}

func (c *session) SetReadDeadline(at time.Time) error  { return c.SetDeadline(at) }
func (c *session) SetWriteDeadline(at time.Time) error { return c.SetDeadline(at) }
