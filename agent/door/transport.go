package door

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

// authInfo is what a call finds out about its connection.
type authInfo struct {
	credentials.CommonAuthInfo
	who     trust.Identity
	refusal error
	held    context.Context
	// busy counts a call that was refused before it was read, and hangs up on
	// who does not stop.
	busy func()
}

func (authInfo) AuthType() string { return "door" }

// ServerHandshake admits a connection that its door has authenticated, and sees
// to it that it ends with its identity.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := raw.(Conn)
	if !ok {
		return nil, nil, errors.Join(errors.New("a connection that no door has authenticated"), raw.Close())
	}
	// The bytes never leave the kernel, or the door has encrypted them.
	info := authInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, held: c.Held()}
	var refused atomic.Int32
	info.busy = func() {
		if refused.Add(1) == maxBusy {
			go c.Close() // gRPC holds a lock, and TLS may take its time
		}
	}
	info.who, info.refusal = c.Identity()
	if info.refusal != nil {
		t.server.refused(info.who, info.refusal)
		return c, info, nil
	}
	release, err := t.server.connections.Take(info.who)
	if err != nil {
		t.server.log.Warn().Str("person", info.who.Person).Str("door", string(info.who.Door)).Msg("connection refused: " + fault.Of(err).Message)
		return nil, nil, errors.Join(err, c.Close())
	}
	if info.who.Door != trust.SSH { // which tells of logins itself: one may hold many of these
		t.server.alarms.Raise(alarm.Of(alarm.Login, info.who, "came in as "+info.who.Role.String()))
	}
	open, end := context.WithCancel(info.held)
	a := &admitted{Conn: c, release: sync.OnceFunc(func() { end(); release() })}
	context.AfterFunc(open, func() {
		if info.held.Err() == nil { // the peer went away
			return
		}
		if revoked(info.held) {
			t.server.refused(info.who, context.Cause(info.held))
		}
		time.AfterFunc(farewell, func() { a.Close() })
	})
	return a, info, nil
}

// refused tells the alarms of a refusal.
func (s *Server) refused(who trust.Identity, err error) {
	s.alarms.Raise(alarm.Of(alarm.Refusal, who, fault.Of(err).Message))
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

// caller returns who makes the call, and how long that holds.
func caller(ctx context.Context) (authInfo, error) {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return authInfo{}, fault.New(fault.Unauthenticated, "", "a call without a connection")
	}
	info, ok := p.AuthInfo.(authInfo)
	if !ok {
		return authInfo{}, fault.New(fault.Unauthenticated, "", "a call without credentials")
	}
	return info, info.refusal
}
