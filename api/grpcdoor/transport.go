package grpcdoor

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// transport hands the identity of a connection to gRPC.
type transport struct{ server *Server }

// Caller is what a call finds out about its connection.
type Caller struct {
	credentials.CommonAuthInfo
	Who trust.Identity
	// Held is the connection's, see [Conn].
	Held    context.Context
	refusal error
	// busy counts a call that was refused before it was read, and hangs up on
	// who does not stop.
	busy func()
}

// AuthType is for gRPC.
func (Caller) AuthType() string { return "door" }

// ServerHandshake admits a connection that its door has authenticated, and sees
// to it that it ends with its identity.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(Conn)
	if !ok {
		return nil, nil, errors.Join(errors.New("a connection that no door has authenticated"), raw.Close())
	}
	// The bytes never leave the kernel, or the door has encrypted them.
	info := Caller{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, Held: c.Held()}
	var refused atomic.Int32
	info.busy = func() {
		if refused.Add(1) == maxBusy {
			go c.Close() // gRPC holds a lock, and TLS may take its time
		}
	}
	info.Who, info.refusal = c.Identity()
	if info.Who.Session == "" { // SSH has named it
		info.Who.Session = trust.NewSession(time.Now())
	}
	if info.refusal != nil {
		t.server.refused(info.Who, info.refusal)
		return c, info, nil
	}
	release, err := t.server.connections.Take(info.Who)
	if err != nil {
		t.server.o.Log.Warn().Str("person", info.Who.Person).Str("door", string(info.Who.Door)).Msg("connection refused: " + fault.Of(err).Message)
		t.server.o.Record.Refused(info.Who, err)
		return nil, nil, errors.Join(err, c.Close())
	}
	// SSH tells of logins itself: one may hold many of these. A bastion comes
	// every minute, with nothing but a bundle.
	logout := func(error) {}
	if info.Who.Door != trust.SSH && info.Who.Kind != trust.Bastion {
		t.server.o.Alarms.Raise(alarm.Of(alarm.Login, info.Who, cameIn(info.Who)))
		logout = t.server.o.Record.Login(info.Who)
	}
	open, end := context.WithCancel(info.Held)
	a := &admitted{Conn: c, release: sync.OnceFunc(func() { end(); release(); logout(ended(info.Held)) })}
	context.AfterFunc(open, func() {
		if info.Held.Err() == nil { // the peer went away
			return
		}
		if Revoked(info.Held) {
			t.server.refused(info.Who, context.Cause(info.Held))
		}
		time.AfterFunc(farewell, func() { a.Close() })
	})
	return a, info, nil
}

// ended returns the fault by which the daemon ended a login, nil where its peer did.
func ended(held context.Context) error {
	var why *fault.Error
	if errors.As(context.Cause(held), &why) {
		return why
	}
	return nil
}

// refused records and tells the alarms of a connection that was refused.
func (s *Server) refused(who trust.Identity, err error) {
	s.o.Alarms.Raise(alarm.Of(alarm.Refusal, who, fault.Of(err).Message))
	s.o.Record.Refused(who, err)
}

// admitted is a connection with a place.
type admitted struct {
	net.Conn
	release func()
}

func (c *admitted) Close() error {
	defer c.release()
	return c.Conn.Close()
}

func (transport) ClientHandshake(_ context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.Join(errors.New("these are credentials of a server"), raw.Close())
}

func (transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "door"}
}

func (t transport) Clone() credentials.TransportCredentials { return t }

func (transport) OverrideServerName(string) error { return nil }

// CallerOf returns who makes the call, and how long that holds.
func CallerOf(ctx context.Context) (Caller, error) {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return Caller{}, fault.New(fault.Unauthenticated, "", "a call without a connection")
	}
	info, ok := p.AuthInfo.(Caller)
	if !ok {
		return Caller{}, fault.New(fault.Unauthenticated, "", "a call without credentials")
	}
	return info, info.refusal
}

func cameIn(who trust.Identity) string {
	if who.Role == trust.None { // at a bastion
		return "came in"
	}
	return "came in as " + who.Role.String()
}
