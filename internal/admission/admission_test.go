package admission

import (
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// wire is a connection from an address, which notes whether it was closed.
type wire struct {
	net.Conn
	from   net.Addr
	closed atomic.Bool
}

func (w *wire) RemoteAddr() net.Addr { return w.from }
func (w *wire) Close() error         { w.closed.Store(true); return nil }

func from(address string) *wire {
	return &wire{from: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(address), 4711))}
}

// relays are two bastions, of which one has an IPv6 address.
func relays(a netip.Addr) bool {
	return a == netip.MustParseAddr("192.0.2.9") || a == netip.MustParseAddr("2001:db8::9")
}

// TestRoom drops connections by stage, then by how crowded their source is.
func TestRoom(t *testing.T) {
	now := time.Unix(0, 0)
	var told []uint64
	r := NewRoom(RoomOptions{Total: 4, Each: 2, Relayed: 3, RelayedTotal: 6, Relay: relays, Dropped: func(n uint64, _ string) { told = append(told, n) }})
	r.now = func() time.Time { return now }
	// in lets one in, and returns which of all that are in was dropped for it.
	var all []*Guest
	in := func(address string, s Stage) (g, dropped *Guest) {
		t.Helper()
		g = r.Enter(from(address))
		g.Reached(s)
		for i, other := range all {
			if other.conn.(*wire).closed.Load() {
				if dropped != nil {
					t.Error("two were dropped for one")
				}
				dropped = other
				defer func() { all = append(all[:i], all[i+1:]...) }()
			}
		}
		defer func() { all = append(all, g) }()
		return g, dropped
	}
	for _, g := range []struct {
		address string
		stage   Stage
	}{{"192.0.2.1", Known}, {"192.0.2.2", Exchanged}, {"192.0.2.2", Exchanged}, {"192.0.2.3", Exchanged}} {
		if _, dropped := in(g.address, g.stage); dropped != nil {
			t.Errorf("dropped %+v of a room that was not full", dropped)
		}
	}
	typing, crowded, crowded2 := all[0], all[1], all[2]
	now = now.Add(time.Hour)
	mute, dropped := in("192.0.2.4", Silent)
	if dropped != crowded && dropped != crowded2 {
		t.Errorf("not one of the crowded: %+v", dropped)
	} else if dropped == crowded {
		crowded = crowded2
	}
	if _, dropped := in("192.0.2.5", Known); dropped != mute {
		t.Errorf("%+v before the silent one", dropped)
	}
	if !crowded.Leave() || crowded.Leave() || mute.Leave() || crowded.conn.(*wire).closed.Load() {
		t.Error("who left was not in, or who was dropped was, or leaving closes")
	}
	second, dropped := in("192.0.2.1", Silent)
	if dropped != nil {
		t.Errorf("%+v", dropped)
	}
	now = now.Add(time.Minute)
	if _, dropped := in("192.0.2.1", Speaking); dropped != second { // its own, though others have come less far
		t.Errorf("%+v and not its own", dropped)
	}
	if fmt.Sprint(told) != "[1 2]" {
		t.Errorf("told of %v", told)
	}
	for i := range 3 {
		if _, dropped := in("192.0.2.9", Silent); dropped != nil || r.Count() != 5+i {
			t.Errorf("%d in the room; dropped %+v", r.Count(), dropped)
		}
	}
	if _, dropped := in("192.0.2.9", Known); dropped == nil || !dropped.relay {
		t.Error("a bastion's pool took the place of others")
	}
	if _, dropped := in("192.0.2.10", Silent); dropped == nil || dropped.relay {
		t.Error("strangers took the place of a bastion's")
	}
	if typing.Reached(Silent); Stage(typing.stage.Load()) != Known {
		t.Error("a guest went back")
	}
	r.Close()
	late := from("192.0.2.1")
	if r.Enter(late).Leave() || !late.closed.Load() {
		t.Error("a closed room takes guests")
	}
	for g := range r.in {
		if !g.conn.(*wire).closed.Load() {
			t.Errorf("%+v outlived its room", g)
		}
	}
	for _, g := range all {
		g.Leave()
	}
	if r.Count() != 0 || r.public != 0 || len(r.by) != 0 {
		t.Errorf("left: %+v", r)
	}
}

// TestRelayedRoom: bastions together have a pool, and who crowds it loses.
func TestRelayedRoom(t *testing.T) {
	bastions := func(a netip.Addr) bool { return a.Is4() && a.As4()[0] == 10 }
	r := NewRoom(RoomOptions{Total: 4, Each: 4, Relayed: 3, RelayedTotal: 5, Relay: bastions})
	for range 4 {
		r.Enter(from("192.0.2.1"))
	}
	known := r.Enter(from("10.0.0.1"))
	known.Reached(Known)
	for range 3 {
		r.Enter(from("10.0.0.2"))
	}
	r.Enter(from("10.0.0.3"))
	if r.Count() != 9 {
		t.Fatalf("%d are in", r.Count())
	}
	for i := range 20 {
		r.Enter(from(fmt.Sprint("10.0.1.", i)))
		if n := r.Count(); n != 9 || r.public != 4 {
			t.Fatalf("%d are in, %d of them public, after %d more bastions", n, r.public, i+1)
		}
	}
	if !known.Leave() {
		t.Error("who showed a key was dropped before the silent")
	}
}

// TestSource counts addresses that one machine can have as one, and nobody's with
// a bastion's.
func TestSource(t *testing.T) {
	r := NewRoom(RoomOptions{Relay: relays})
	of := func(address string) netip.Prefix {
		source, relay := r.sourceOf(from(address).from)
		if relay != relays(netip.MustParseAddr(address).Unmap()) {
			t.Errorf("%s: a bastion's: %v", address, relay)
		}
		return source
	}
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"2001:db8::1", "2001:db8::ffff:1", true}, {"2001:db8::1", "2001:db8:0:1::1", false}, {"192.0.2.1", "192.0.2.2", false},
		{"::ffff:192.0.2.1", "192.0.2.1", true}, {"::ffff:192.0.2.9", "192.0.2.9", true}, {"2001:db8::9", "2001:db8::1", false},
	} {
		if (of(c.a) == of(c.b)) != c.same {
			t.Errorf("%s and %s: one source: %v", c.a, c.b, !c.same)
		}
	}
	if p, relay := r.sourceOf(&net.UnixAddr{}); p.IsValid() || relay {
		t.Errorf("%v, %v", p, relay)
	}
}

func TestPlaces(t *testing.T) {
	p := NewPlaces(PlacesOptions{What: "calls", Total: 16, Each: 10, Reserved: 8, Console: 2})
	var give []func()
	fill := func(kind trust.Kind, door trust.Door, drill bool) (taken int) {
		for n := range 50 {
			release, err := p.Take(trust.Identity{Person: fmt.Sprint("p", n), Kind: kind, Door: door, Scope: trust.Scope{Drill: drill}})
			if err != nil {
				if !fault.Is(err, fault.Unreachable) {
					t.Error(err)
				}
				return taken
			}
			give = append(give, release)
			taken++
		}
		return taken
	}
	for _, c := range []struct {
		who   string
		kind  trust.Kind
		door  trust.Door
		drill bool
		want  int
	}{
		{"automation", trust.Automation, trust.GRPC, false, 8}, {"drills", trust.Person, trust.SSH, true, 0}, {"sealed drills", trust.Sealed, trust.SSH, true, 0},
		{"people", trust.Person, trust.SSH, false, 6}, {"sealed keys", trust.Sealed, trust.SSH, false, 0}, {"the console", trust.Local, trust.Console, false, 2},
	} {
		if n := fill(c.kind, c.door, c.drill); n != c.want {
			t.Errorf("%s took %d, want %d", c.who, n, c.want)
		}
	}
	for _, f := range give {
		f()
		f() // twice is once
	}
	if p.Taken() != 0 || len(p.by) != 0 {
		t.Errorf("left: %+v", p)
	}
	ada := trust.Identity{Person: "ada", Kind: trust.Person, Door: trust.SSH}
	for range 10 {
		if _, err := p.Take(ada); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Take(ada); !fault.Is(err, fault.Unreachable) {
		t.Errorf("an eleventh of one person: %v", err)
	}
	sealed := ada
	sealed.Kind = trust.Sealed
	if _, err := p.Take(sealed); err != nil {
		t.Errorf("a sealed key beside the same person's laptop: %v", err)
	}
	acting := NewPlaces(PlacesOptions{What: "connections", Total: 8, Each: 4, Reserved: 4, Responders: 2})
	take := func(name string, kind trust.Kind, role trust.Role) (n int) {
		for ; ; n++ {
			if _, err := acting.Take(trust.Identity{Person: fmt.Sprint(name, n), Kind: kind, Role: role, Door: trust.SSH}); err != nil {
				return n
			}
		}
	}
	for _, c := range []struct {
		kind trust.Kind
		role trust.Role
		want int
	}{{trust.Automation, trust.Responder, 4}, {trust.Person, trust.Observer, 2}, {trust.Person, trust.Approver, 0}, {trust.Person, trust.Commander, 2}} {
		if n := take(fmt.Sprint(c.kind, c.role), c.kind, c.role); n != c.want {
			t.Errorf("%s %s took %d beside those before, want %d", c.kind, c.role, n, c.want)
		}
	}
	for name, o := range map[string]PlacesOptions{"none": {Each: 1}, "all reserved": {Total: 4, Each: 1, Reserved: 4}, "more for the console": {Total: 4, Each: 1, Reserved: 1, Console: 2},
		"more for responders": {Total: 4, Each: 1, Reserved: 2, Responders: 2, Console: 1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: %+v", name, o)
				}
			}()
			NewPlaces(o)
		}()
	}
}
