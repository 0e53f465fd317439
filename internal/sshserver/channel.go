package sshserver

import (
	"context"
	"errors"
	"io"
	"net"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/trust"
)

// Channel is a channel of a type in Handlers.Channels that an authenticated
// client wants opened. Its handler calls Accept or Refuse, once; when it returns
// the channel is closed, or refused.
type Channel struct {
	conn   *conn
	grant  *grant
	client *gossh.ServerConn
	asked  gossh.NewChannel
	ctx    context.Context
	cancel context.CancelFunc

	decided bool
	stream  *stream
	closed  chan struct{} // by the client
}

func (c *conn) channel(g *grant, client *gossh.ServerConn, asked gossh.NewChannel, handler func(*Channel)) {
	ch := &Channel{conn: c, grant: g, client: client, asked: asked}
	ch.ctx, ch.cancel = context.WithCancel(g.held)
	defer ch.cancel()
	defer func() {
		if ch.stream != nil {
			ch.stream.Close()
			c.forget(ch.stream)
		} else if !ch.decided {
			reject(asked, gossh.ConnectionFailed, "not opened")
		}
	}()
	handler(ch)
	if ch.stream != nil {
		ch.stream.Close()
		<-ch.closed // until the client has closed it too, it may hold memory, and its place
	}
}

// Identity returns who it is.
func (c *Channel) Identity() trust.Identity { return c.grant.who }

// Held is as Session.Held.
func (c *Channel) Held() context.Context { return c.grant.held }

// Context returns a context that ends with Held or when the client has closed
// the channel, whichever comes first.
func (c *Channel) Context() context.Context { return c.ctx }

// User returns the user name that the login was for.
func (c *Channel) User() string { return c.client.User() }

// RemoteAddr returns the client's address.
func (c *Channel) RemoteAddr() net.Addr { return c.client.RemoteAddr() }

// LocalAddr returns the address that the client reached.
func (c *Channel) LocalAddr() net.Addr { return c.client.LocalAddr() }

// Data returns what came with the request to open, which depends on the type.
func (c *Channel) Data() []byte { return c.asked.ExtraData() }

// Stream is the inside of a channel.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

var errDecided = errors.New("the channel was accepted or refused already")

// Accept opens the channel. Requests inside it are refused.
func (c *Channel) Accept() (Stream, error) {
	if c.decided {
		return nil, errDecided
	}
	c.decided = true
	st, requests, err := c.conn.accept(c.asked, nil)
	if err != nil {
		return nil, err
	}
	c.stream = st
	c.closed = make(chan struct{})
	c.conn.handlers.Go(func() {
		defer close(c.closed)
		defer c.cancel()
		for req := range requests {
			_ = c.conn.pace.Wait(c.ctx) // at its end, what is left is refused at once
			_ = req.Reply(false, nil)   // who is gone needs no answer
		}
	})
	return st, nil
}

// Refuse refuses the channel, with a line that the client shows.
func (c *Channel) Refuse(why string) error { return c.reject(gossh.Prohibited, why) }

// Fail says that the channel would be allowed and cannot be opened, with a line
// that the client shows.
func (c *Channel) Fail(why string) error { return c.reject(gossh.ConnectionFailed, why) }

func (c *Channel) reject(reason gossh.RejectionReason, why string) error {
	if c.decided {
		return errDecided
	}
	c.decided = true
	return c.asked.Reject(reason, why)
}
