package sshclient

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// stagger is the time between two bastions that are tried: one that answers
// spares the others, and one that does not delays nobody (RFC 8305 does the same
// with addresses).
const stagger = 50 * time.Millisecond

// RelayError is why a bastion does not lead to a target, by its own word. Another
// one may.
type RelayError struct {
	// Bastion is the one that says so, NAME.bastion.
	Bastion string
	// Why is what it says, in one line.
	Why string
}

// Error returns it in one line.
func (e *RelayError) Error() string { return e.Bastion + ": " + e.Why }

// relay asks a bastion to connect to the target.
func (c *Client) relay(ctx context.Context, t Target, port uint16) (net.Conn, error) {
	channel, requests, err := c.channel(ctx, "direct-tcpip", gossh.Marshal(struct { // RFC 4254 section 7.2
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}{t.Name, uint32(port), "127.0.0.1", 0}))
	var refused *gossh.OpenChannelError
	switch {
	case err == nil:
		return c.stream(channel, requests), nil
	case errors.As(err, &refused):
		said := neutral.LineMax(strings.TrimPrefix(strings.TrimSpace(refused.Message), "halligan: "), maxBanner)
		if said == "" {
			said = refused.Reason.String()
		}
		why := &RelayError{c.target.Name, said}
		return nil, fault.New(fault.Unreachable, "choose another bastion with --bastion, or another node with --node", "%s cannot be reached: %w", t.Name, why)
	case errors.Is(ctx.Err(), context.Canceled):
		return nil, ctx.Err()
	case ctx.Err() != nil:
		return nil, fault.New(fault.Unreachable, "choose another bastion with --bastion, or another node with --node", "%s does not answer through %s", t.Name, c.target.Name)
	}
	return nil, c.broken(err)
}

// First logs in at the first of the targets that lets the login in. They are
// tried in their order, but soon all at a time; the connections that are not
// needed are closed. A key that is to be touched is touched for one after
// another. Its number in the list is returned too. Where none lets it in, the
// errors are those of the targets in their order.
func First(ctx context.Context, targets []Target, login Login) (*Client, int, []error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		client *Client
		i      int
		err    error
	}
	results := make(chan result, len(targets))
	turns := make(chan struct{}, 1)
	begun := 0
	next := func() {
		i := begun
		begun++
		t := targets[i]
		t.turns = turns
		go func() {
			client, err := Dial(ctx, t, login)
			results <- result{client, i, err}
		}()
	}
	errs := make([]error, len(targets))
	for ended := 0; ended < len(targets); {
		var soon <-chan time.Time
		if begun == 0 {
			next()
		}
		if begun < len(targets) {
			soon = time.After(stagger)
		}
		select {
		case <-soon:
			next()
		case r := <-results:
			ended++
			if errs[r.i] = r.err; r.err != nil {
				if begun < len(targets) {
					next()
				}
				continue
			}
			cancel() // each of the others ends at once, or has just succeeded
			for ; ended < begun; ended++ {
				if late := <-results; late.client != nil {
					late.client.Close()
				}
			}
			return r.client, r.i, nil
		}
	}
	return nil, 0, errs
}
