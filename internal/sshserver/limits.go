package sshserver

import (
	"fmt"
	"time"
)

// Limits bound what clients can make the server hold. Zero values take the
// defaults, which are for an agent; nothing can be unlimited but Session.
type Limits struct {
	// Unauthenticated is how many connections without a login there may be, in
	// total (default 96: at a few tens of KiB each they stay below 8 MiB), and
	// UnauthenticatedEach of one IPv4 address or IPv6 /64 (default 12: a team
	// behind one address, logging in at once). One more is always taken, and
	// another dropped for it; see admission.Room.
	Unauthenticated, UnauthenticatedEach int
	// Relayed is UnauthenticatedEach of a bastion (default 48), and RelayedTotal
	// how many of all bastions there may be (default twice as many).
	Relayed, RelayedTotal int
	// KeyExchange and Login are how long a connection may take to agree on keys
	// (default 10 s) and to log in, from its start (default 60 s: a security key
	// wants a PIN and a touch).
	KeyExchange, Login time.Duration
	// LoginBytes bounds what is read before the login (default 256 KiB: an agent
	// with twenty RSA certificates stays below).
	LoginBytes int64
	// AuthTries is how many keys may fail (default 6, as OpenSSH has it).
	AuthTries int

	// Connections is how many logins there may be at a time (default 64),
	// ConnectionsEach those of one identity (default 8), ReservedConnections how
	// many of the total automation and drills can never take (default 16). Where
	// people take roles, half of those are for who can act.
	Connections, ConnectionsEach, ReservedConnections int
	// Channels bounds open channels in the same way (default 64, 12 and 16). One
	// that its handler does not read holds up to 2 MiB, x/crypto's fixed window,
	// so these are the bound on memory: 128 MiB by everybody together at their
	// worst, 24 MiB by one identity. ChannelsOfConnection is the most that one
	// connection has open (default 8).
	Channels, ChannelsEach, ReservedChannels, ChannelsOfConnection int

	// Session is the longest life of a login (default 12 h, negative: none but
	// its credential's), Idle how long no byte may pass through any channel
	// (default 30 min).
	Session, Idle time.Duration
	// KeepAlive is the time between questions whether the client is there
	// (default 15 s), which it must answer within KeepAliveAnswer (default 30 s).
	// TCP asks in the same rhythm. Write is how long the network may refuse to
	// take what is sent (default 30 s).
	KeepAlive, KeepAliveAnswer, Write time.Duration
	// Command bounds an exec line in bytes (default 64 KiB), Env the value of one
	// variable (default 4 KiB).
	Command, Env int
	// Requests is how many requests a second a client may go on making (default
	// 50; resizing a window makes one for each step), after a burst of four times
	// as many.
	Requests int
}

func (l Limits) withDefaults() (Limits, error) {
	count := func(n *int, most int) {
		if *n == 0 {
			*n = most
		}
	}
	count(&l.Unauthenticated, 96)
	count(&l.UnauthenticatedEach, min(12, l.Unauthenticated))
	count(&l.Relayed, 48)
	count(&l.RelayedTotal, 2*l.Relayed)
	count(&l.AuthTries, 6)
	count(&l.Connections, 64)
	count(&l.ConnectionsEach, min(8, l.Connections))
	count(&l.ReservedConnections, l.Connections/4)
	count(&l.Channels, 64)
	count(&l.ChannelsEach, min(12, l.Channels))
	count(&l.ReservedChannels, l.Channels/4)
	count(&l.ChannelsOfConnection, 8)
	count(&l.Command, 64<<10)
	count(&l.Env, 4<<10)
	count(&l.Requests, 50)
	last := func(d *time.Duration, most time.Duration) {
		if *d == 0 {
			*d = most
		}
	}
	last(&l.KeyExchange, 10*time.Second)
	last(&l.Login, time.Minute)
	last(&l.Session, 12*time.Hour)
	last(&l.Idle, 30*time.Minute)
	last(&l.KeepAlive, 15*time.Second)
	last(&l.KeepAliveAnswer, 30*time.Second)
	last(&l.Write, 30*time.Second)
	if l.LoginBytes == 0 {
		l.LoginBytes = 256 << 10
	}
	for _, n := range []int{l.Unauthenticated, l.UnauthenticatedEach, l.Relayed, l.RelayedTotal, l.AuthTries, l.Connections, l.ConnectionsEach, l.ReservedConnections + 1,
		l.Channels, l.ChannelsEach, l.ReservedChannels + 1, l.ChannelsOfConnection, l.Command, l.Env, l.Requests, int(l.LoginBytes)} {
		if n < 1 {
			return l, fmt.Errorf("limits of the SSH server: %d is not a number of anything", n)
		}
	}
	for _, d := range []time.Duration{l.KeyExchange, l.Login, l.Idle, l.KeepAlive, l.KeepAliveAnswer, l.Write} {
		if d < 0 {
			return l, fmt.Errorf("limits of the SSH server: %v is not a time to wait", d)
		}
	}
	if l.ReservedConnections >= l.Connections || l.ReservedChannels >= l.Channels {
		return l, fmt.Errorf("limits of the SSH server: all places are reserved")
	}
	return l, nil
}
