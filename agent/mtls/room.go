package mtls

import (
	"net"
	"net/netip"
	"sync"
)

// room holds the connections whose handshake is under way. A new one always gets
// in; when its source or the room is full, another is closed for it: one that has
// not said anything before one that has, then one of the source with the most,
// then the oldest. A client that is really there needs its place for
// milliseconds, while a flood that only connects drops itself. Bastions have
// places of their own, since many come from behind each.
type room struct {
	mu     sync.Mutex // guards all below and the guests' fields
	in     []*guest   // the oldest first
	public int        // of in, those that are not from a bastion
	by     map[netip.Prefix]int
}

// guest is a connection whose handshake is under way.
type guest struct {
	raw    net.Conn
	room   *room
	source netip.Prefix
	relay  bool
	spoken bool
}

func newRoom() *room { return &room{by: map[netip.Prefix]int{}} }

// enter takes a connection in. What it replaces is closed, which ends its
// handshake.
func (r *room) enter(raw net.Conn, relay func(netip.Addr) bool) *guest {
	g := &guest{raw: raw, room: r}
	if tcp, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
		addr := tcp.AddrPort().Addr().Unmap().WithZone("")
		bits := 32
		if addr.Is6() {
			bits = 64 // of which a host can choose its addresses
		}
		g.source, _ = addr.Prefix(bits) // the zero one for no address
		g.relay = relay(addr)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	each := maxOfSource
	if g.relay {
		each = maxOfRelay
	}
	var victim *guest
	switch {
	case r.by[g.source] >= each:
		victim = r.victim(func(o *guest) bool { return o.source == g.source })
	case !g.relay && r.public >= maxHandshakes:
		victim = r.victim(func(o *guest) bool { return !o.relay })
	}
	if victim != nil {
		r.remove(victim)
		victim.raw.Close()
	}
	r.in = append(r.in, g)
	r.by[g.source]++
	if !g.relay {
		r.public++
	}
	return g
}

// victim returns whose handshake is worth least; r.mu is held.
func (r *room) victim(among func(*guest) bool) (worst *guest) {
	for _, g := range r.in {
		switch {
		case !among(g):
		case worst == nil, worst.spoken && !g.spoken, worst.spoken == g.spoken && r.by[g.source] > r.by[worst.source]:
			worst = g
		}
	}
	return worst
}

// spoke marks a guest that sent a ClientHello.
func (g *guest) spoke() {
	g.room.mu.Lock()
	defer g.room.mu.Unlock()
	g.spoken = true
}

// leave gives the place up; the connection stays as it is.
func (r *room) leave(g *guest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.remove(g)
}

func (r *room) remove(g *guest) {
	for i, o := range r.in {
		if o != g {
			continue
		}
		r.in = append(r.in[:i], r.in[i+1:]...)
		if r.by[g.source]--; r.by[g.source] == 0 {
			delete(r.by, g.source)
		}
		if !g.relay {
			r.public--
		}
		return
	}
}

// clear closes all connections that are in.
func (r *room) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.in {
		g.raw.Close()
	}
}
