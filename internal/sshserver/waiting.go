package sshserver

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

// stage is how far a connection without a login has come.
type stage int32

const (
	silent    stage = iota // connected
	speaking               // sent a byte
	exchanged              // agreed on keys, which costs it as much as us
	known                  // offered a key that Options.Offer likes
)

// waitingRoom holds the connections without a login. A new one always gets in;
// when the room is full, another is dropped for it. Which one decides who wins in
// a flood: the one that has come least far; among those, one of the source with
// the most in the room; among those, any. So whoever only connects never costs
// somebody a place who is typing a PIN, one flooding address only ever drops its
// own, and a flood from many addresses has to do as much work as we do. OpenSSH's
// MaxStartups instead refuses new ones at random, which refuses responders at the
// rate at which it refuses the flood.
type waitingRoom struct {
	total, each, relayed int

	mu      sync.Mutex // guards what follows
	in      map[*conn]struct{}
	public  int // those that are not of a bastion
	by      map[netip.Prefix]int
	dropped uint64 // since told
	told    time.Time
	now     func() time.Time
}

func newWaitingRoom(l Limits) *waitingRoom {
	return &waitingRoom{total: l.Unauthenticated, each: l.UnauthenticatedEach, relayed: l.Relayed,
		in: map[*conn]struct{}{}, by: map[netip.Prefix]int{}, now: time.Now}
}

// enter takes the connection in. The victim, if any, has left and is to be
// closed; dropped is how many have been since it was last said, 0 where it was
// said less than a minute ago.
func (w *waitingRoom) enter(c *conn) (victim *conn, dropped uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	each := w.each
	if c.relay {
		each = w.relayed
	}
	switch {
	case w.by[c.source] >= each:
		victim = w.last(func(other *conn) bool { return other.source == c.source })
	case !c.relay && w.public >= w.total:
		victim = w.last(func(other *conn) bool { return !other.relay })
	}
	if victim != nil {
		w.remove(victim)
		if w.dropped++; w.now().Sub(w.told) >= time.Minute {
			dropped, w.dropped, w.told = w.dropped, 0, w.now()
		}
	}
	w.in[c] = struct{}{}
	w.by[c.source]++
	if !c.relay {
		w.public++
	}
	return victim, dropped
}

// last returns the connection to be dropped among some. The order in which a map
// is walked makes the choice among equals unpredictable enough.
func (w *waitingRoom) last(among func(*conn) bool) (victim *conn) {
	for c := range w.in {
		if !among(c) {
			continue
		}
		if victim == nil || c.stage.Load() < victim.stage.Load() ||
			c.stage.Load() == victim.stage.Load() && w.by[c.source] > w.by[victim.source] {
			victim = c
		}
	}
	return victim
}

// leave takes the connection out, and reports whether it was in.
func (w *waitingRoom) leave(c *conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, in := w.in[c]
	if in {
		w.remove(c)
	}
	return in
}

func (w *waitingRoom) remove(c *conn) {
	delete(w.in, c)
	if w.by[c.source]--; w.by[c.source] == 0 {
		delete(w.by, c.source)
	}
	if !c.relay {
		w.public--
	}
}

func (w *waitingRoom) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.in)
}

// sourceOf returns what counts as one source: an IPv4 address, or the /64 that
// one IPv6 host can choose addresses from.
func sourceOf(a net.Addr) (prefix netip.Prefix, addr netip.Addr) {
	if tcp, ok := a.(*net.TCPAddr); ok {
		addr = tcp.AddrPort().Addr().Unmap().WithZone("")
	}
	if !addr.IsValid() {
		return netip.Prefix{}, addr
	}
	bits := 64
	if addr.Is4() {
		bits = 32
	}
	prefix, err := addr.Prefix(bits)
	if err != nil {
		return netip.Prefix{}, addr
	}
	return prefix, addr
}
