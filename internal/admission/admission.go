// Package admission decides who keeps a place where there are not enough, for
// every door of every daemon: [Room] for connections of which nobody knows yet
// whose they are, [Places] for what those hold who have been let in.
//
// It must never refuse a stranger the try, block, or let automation and drills
// take the places that are kept for people. Who somebody is it is told. It
// stands on floor 0.
package admission

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Flood is the alarm of strangers whose connections are dropped to make room,
// and of clients that were cut off since they asked for too much.
const Flood alarm.Kind = "flood"

// Stage is how far a connection without a login has come. The later, the more it
// has cost the other side.
type Stage int32

// The stages.
const (
	Silent    Stage = iota // connected
	Speaking               // sent something
	Exchanged              // agreed on keys, which costs it as much as us
	Known                  // showed something that looks like ours
)

// RoomOptions bound a room. All counts are required.
type RoomOptions struct {
	// Total is how many connections may be in, Each how many of them of one IPv4
	// address or IPv6 /64. Beside Total, Relayed is how many may be in of each
	// bastion, and RelayedTotal how many of all of them.
	Total, Each, Relayed, RelayedTotal int
	// Relay says which addresses are bastions of ours, behind each of which many
	// people come; may be nil.
	Relay func(netip.Addr) bool
	// Dropped is told, at most once a minute, how many connections were dropped
	// since it was told last, and for which source; may be nil.
	Dropped func(n uint64, source string)
}

// Room holds the connections without a login. A new one always gets in; when the
// room is full, another is dropped for it. Which one decides who wins in a flood:
// the one that has come least far; among those, one of the source with the most
// in the room; among those, any. So whoever only connects never costs somebody a
// place who is typing a PIN, one flooding address only ever drops its own, and a
// flood from many addresses has to do as much work as we do. OpenSSH's
// MaxStartups instead refuses new ones at random, which refuses responders at the
// rate at which it refuses the flood.
type Room struct {
	o   RoomOptions
	now func() time.Time

	mu      sync.Mutex // guards what follows
	in      map[*Guest]struct{}
	public  int // of in, those that are not of a bastion
	by      map[netip.Prefix]int
	dropped uint64 // since told
	told    time.Time
	closed  bool
}

// Guest is a connection in a room, or one that was there.
type Guest struct {
	room   *Room
	conn   net.Conn
	source netip.Prefix
	relay  bool
	stage  atomic.Int32
}

// NewRoom returns an empty room.
func NewRoom(o RoomOptions) *Room {
	if o.Relay == nil {
		o.Relay = func(netip.Addr) bool { return false }
	}
	if o.Dropped == nil {
		o.Dropped = func(uint64, string) {}
	}
	return &Room{o: o, now: time.Now, in: map[*Guest]struct{}{}, by: map[netip.Prefix]int{}}
}

// Enter takes a connection in, and closes the one that is dropped for it. A room
// that was closed closes the new one.
func (r *Room) Enter(conn net.Conn) *Guest {
	g := &Guest{room: r, conn: conn}
	g.source, g.relay = r.sourceOf(conn.RemoteAddr())
	victim, dropped := r.enter(g)
	if victim != nil {
		victim.conn.Close()
	}
	if dropped > 0 {
		r.o.Dropped(dropped, conn.RemoteAddr().String())
	}
	return g
}

// enter returns who is to be closed, who has left already, and how many have
// been since that was last told, 0 where it is not to be told now.
func (r *Room) enter(g *Guest) (victim *Guest, dropped uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return g, 0
	}
	each := r.o.Each
	if g.relay {
		each = r.o.Relayed
	}
	switch {
	case r.by[g.source] >= each:
		victim = r.last(func(other *Guest) bool { return other.source == g.source })
	case !g.relay && r.public >= r.o.Total:
		victim = r.last(func(other *Guest) bool { return !other.relay })
	case g.relay && len(r.in)-r.public >= r.o.RelayedTotal:
		victim = r.last(func(other *Guest) bool { return other.relay })
	}
	if victim != nil {
		r.remove(victim)
		if r.dropped++; r.now().Sub(r.told) >= time.Minute {
			dropped, r.dropped, r.told = r.dropped, 0, r.now()
		}
	}
	r.in[g] = struct{}{}
	r.by[g.source]++
	if !g.relay {
		r.public++
	}
	return victim, dropped
}

// last returns the one to be dropped among some. The order in which a map is
// walked makes the choice among equals unpredictable enough.
func (r *Room) last(among func(*Guest) bool) (victim *Guest) {
	for g := range r.in {
		if !among(g) {
			continue
		}
		if victim == nil || g.stage.Load() < victim.stage.Load() ||
			g.stage.Load() == victim.stage.Load() && r.by[g.source] > r.by[victim.source] {
			victim = g
		}
	}
	return victim
}

func (r *Room) remove(g *Guest) {
	delete(r.in, g)
	if r.by[g.source]--; r.by[g.source] == 0 {
		delete(r.by, g.source)
	}
	if !g.relay {
		r.public--
	}
}

// Count returns how many are in.
func (r *Room) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.in)
}

// Close closes all connections that are in, and those that come later.
func (r *Room) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for g := range r.in {
		g.conn.Close()
	}
}

// Reached notes that a guest has come to a stage. It never goes back.
func (g *Guest) Reached(s Stage) {
	for {
		before := g.stage.Load()
		if int32(s) <= before || g.stage.CompareAndSwap(before, int32(s)) {
			return
		}
	}
}

// Leave gives the place up, and reports whether the guest still had it; the
// connection stays as it is.
func (g *Guest) Leave() bool {
	g.room.mu.Lock()
	defer g.room.mu.Unlock()
	_, in := g.room.in[g]
	if in {
		g.room.remove(g)
	}
	return in
}

// sourceOf returns what counts as one source: an IPv4 address, the /64 that one
// IPv6 host can choose addresses from, or the very address of a bastion, which
// others of its /64 are not.
func (r *Room) sourceOf(a net.Addr) (source netip.Prefix, relay bool) {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}, false
	}
	addr := tcp.AddrPort().Addr().Unmap().WithZone("")
	if !addr.IsValid() {
		return netip.Prefix{}, false
	}
	relay = r.o.Relay(addr)
	bits := addr.BitLen()
	if addr.Is6() && !relay {
		bits = 64
	}
	return netip.PrefixFrom(addr, bits).Masked(), relay
}

// PlacesOptions bound places of one kind.
type PlacesOptions struct {
	// What is the plural of what has a place, for people.
	What string
	// Total is how many there are, Each how many one holder may have.
	Total, Each int
	// Reserved is how many of Total automation and drills can never take,
	// Responders how many nobody takes who could not act, and Console how many
	// nobody takes who is not at the node itself.
	Reserved, Responders, Console int
}

// Places counts what is in use by those who have been let in.
type Places struct {
	o PlacesOptions

	mu   sync.Mutex // guards what follows
	used int
	by   map[holder]int
}

// holder is whose places are counted together. A sealed credential is not kept
// out by whoever holds the same person's stolen laptop.
type holder struct {
	person string
	kind   trust.Kind
	drill  bool
}

// NewPlaces returns places that are all free. It panics where the options leave
// none to somebody, which is a mistake in the program.
func NewPlaces(o PlacesOptions) *Places {
	if o.Each < 1 || o.Console < 0 || o.Responders < 0 || o.Reserved < o.Console+o.Responders || o.Reserved >= o.Total {
		panic(fmt.Sprintf("places that leave none: %+v", o))
	}
	return &Places{o: o, by: map[holder]int{}}
}

// Take takes a place, which release gives back, once. Errors are
// fault.Unreachable: another node may have one.
func (p *Places) Take(who trust.Identity) (release func(), err error) {
	h := holder{person: who.Person, kind: who.Kind, drill: who.Scope.Drill}
	room := p.o.Total
	if who.Door != trust.Console {
		room -= p.o.Console
	}
	next := "try again, another node, or the console at the node"
	if !who.Role.Has(trust.Responder) {
		room -= p.o.Responders
	}
	if who.Kind == trust.Automation || who.Kind == trust.Bastion || who.Scope.Drill {
		room, next = p.o.Total-p.o.Reserved, "try again later: the rest is kept for people"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.by[h] >= p.o.Each:
		return nil, fault.New(fault.Unreachable, "end one of them", "%s has %d %s already, as many as one may have", who.Person, p.o.Each, p.o.What)
	case p.used >= room:
		return nil, fault.New(fault.Unreachable, next, "%d %s are there already, of %d that %s may take", p.used, p.o.What, room, who.Person)
	}
	p.used++
	p.by[h]++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.used--
		if p.by[h]--; p.by[h] == 0 {
			delete(p.by, h)
		}
	}), nil
}

// Taken returns how many are in use.
func (p *Places) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.used
}
