package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// patience bounds what must happen at some time on a busy machine.
const patience = 20 * time.Second

// played is a channel whose client is the other end of a TCP connection.
type played struct {
	who     trust.Identity
	ctx     context.Context
	data    []byte
	stream  net.Conn
	refused string
	failed  string
}

func (p *played) Identity() trust.Identity { return p.who }
func (p *played) Context() context.Context { return p.ctx }
func (p *played) Data() []byte             { return p.data }
func (p *played) Refuse(why string) error  { p.refused = why; return nil }
func (p *played) Fail(why string) error    { p.failed = why; return nil }
func (p *played) Accept() (sshserver.Stream, error) {
	return p.stream.(*net.TCPConn), nil
}

// pair returns the two ends of a TCP connection.
func pair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	for _, x := range []net.Conn{c, d} {
		_ = x.SetDeadline(time.Now().Add(patience))
	}
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// node listens, and is in an inventory.
func node(t testing.TB) (*net.TCPListener, *bundle.Inventory) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	at := netip.MustParseAddrPort(l.Addr().String())
	return l.(*net.TCPListener), &bundle.Inventory{Clusters: []bundle.Cluster{{Name: "prod", Nodes: []bundle.Host{host("cp-1", "prod", at.Addr().String(), at.Port(), 0)}}}}
}

var alice = trust.Identity{Person: "alice", Kind: trust.Person, Clusters: []string{"prod"}}

// relayed runs a relay to the node, and returns both ends of it.
type relayed struct {
	*Relay
	client, node *net.TCPConn
	end          context.CancelCauseFunc
	done         chan struct{}
	began, ended int
}

func begin(t testing.TB, change func(*Options)) *relayed {
	t.Helper()
	l, inv := node(t)
	x := &relayed{done: make(chan struct{})}
	x.Relay = relayOf(inv, func(o *Options) {
		o.Loopback = true
		o.Begin = func(Session) func(int64, int64, string) {
			x.began++
			return func(up, down int64, why string) {
				x.ended++
				if s := x.Stats(); up != s.BytesUp || down != s.BytesDown || why == "" {
					t.Errorf("the end tells of %d and %d bytes and %q: %+v", up, down, why, s)
				}
			}
		}
		if change != nil {
			change(o)
		}
	})
	client, inside := pair(t)
	ctx, end := context.WithCancelCause(t.Context())
	x.client, x.end = client, end
	go func() {
		defer close(x.done)
		p := &played{who: alice, ctx: ctx, data: data("cp-1", uint32(inv.Clusters[0].Nodes[0].SSHPort)), stream: inside}
		x.handle(p)
		inside.Close() // as sshserver does
		if p.refused+p.failed != "" {
			t.Errorf("not relayed: %s%s", p.refused, p.failed)
		}
	}()
	if x.o.Tunnels == nil {
		_ = l.SetDeadline(time.Now().Add(patience))
		c, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(patience))
		x.node = c
	}
	return x
}

func (x *relayed) over(t testing.TB) {
	t.Helper()
	select {
	case <-x.done:
	case <-time.After(patience):
		t.Fatal("the relay does not end")
	}
	if s := x.Stats(); s.Open != 0 || x.began != 1 || x.ended != 1 {
		t.Errorf("%+v, begun %d, ended %d", s, x.began, x.ended)
	}
}

// Bytes pass as they are, both ways at once, and an end on one side leaves the
// other way open.
func TestPump(t *testing.T) {
	x := begin(t, nil)
	up, down := bytes.Repeat([]byte("up\x00\xff"), 1<<18), bytes.Repeat([]byte("down!"), 1<<17)
	var gotUp, gotDown []byte
	var all sync.WaitGroup
	all.Go(func() { gotUp, _ = io.ReadAll(x.node) })
	all.Go(func() {
		_, _ = x.client.Write(up)
		_ = x.client.CloseWrite()
	})
	all.Wait()
	if !bytes.Equal(gotUp, up) {
		t.Fatalf("%d of %d bytes arrive", len(gotUp), len(up))
	}
	all.Go(func() { gotDown, _ = io.ReadAll(x.client) })
	all.Go(func() {
		_, _ = x.node.Write(down)
		_ = x.node.CloseWrite()
	})
	all.Wait()
	x.over(t)
	if !bytes.Equal(gotDown, down) {
		t.Fatalf("%d of %d bytes come back", len(gotDown), len(down))
	}
	if s := x.Stats(); s.BytesUp != int64(len(up)) || s.BytesDown != int64(len(down)) || s.Begun != 1 {
		t.Errorf("%+v", s)
	}
}

func TestPumpEnds(t *testing.T) {
	for name, end := range map[string]func(*relayed){
		"the client is gone": func(x *relayed) { _ = x.client.SetLinger(0); x.client.Close(); x.end(context.Canceled) },
		"the node is gone":   func(x *relayed) { _ = x.node.SetLinger(0); x.node.Close() },
		"both hang up":       func(x *relayed) { _ = x.node.CloseWrite(); _ = x.client.CloseWrite() },
		"the login ends":     func(x *relayed) { x.end(fault.New(fault.Unauthenticated, "", "revoked")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := begin(t, nil)
			if _, err := x.client.Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(x.node, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			end(x)
			x.over(t)
			if name == "the login ends" {
				for _, c := range []net.Conn{x.client, x.node} {
					if n, err := c.Read(make([]byte, 1)); err == nil {
						t.Errorf("%d bytes after the end", n)
					}
				}
			}
		})
	}
	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		x := begin(t, func(o *Options) { o.Idle = 50 * time.Millisecond })
		x.over(t)
	})
}

// Who does not read holds up the other side, and fills no memory here.
func TestPumpBackpressure(t *testing.T) {
	x := begin(t, nil)
	chunk := make([]byte, 1<<20)
	_ = x.client.SetWriteDeadline(time.Now().Add(time.Second))
	sent := 0
	for range 256 {
		n, err := x.client.Write(chunk)
		sent += n
		if err != nil {
			break
		}
	}
	if sent >= 256<<20 {
		t.Errorf("%d bytes went nowhere", sent)
	}
	x.end(context.Canceled)
	x.over(t)
}

type tunnels func(ctx context.Context, node string, door trust.Door) (net.Conn, error)

func (f tunnels) Open(ctx context.Context, node string, door trust.Door) (net.Conn, error) {
	return f(ctx, node, door)
}

func TestTunnels(t *testing.T) {
	outer, inner := pair(t)
	var through Session
	x := begin(t, func(o *Options) {
		o.Tunnels = tunnels(func(_ context.Context, node string, door trust.Door) (net.Conn, error) {
			if node != "cp-1.prod" || door != trust.SSH {
				return nil, fmt.Errorf("asked for %s of %s", door, node)
			}
			return inner, nil
		})
		begin := o.Begin
		o.Begin = func(s Session) func(int64, int64, string) { through = s; return begin(s) }
	})
	if _, err := x.client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(outer, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	outer.Close()
	_ = x.client.CloseWrite()
	x.over(t)
	if !through.Tunnel || through.Who.Person != "alice" {
		t.Errorf("%+v", through)
	}
	// One that is not open, or hangs, leads to dialling.
	for name, open := range map[string]tunnels{
		"none": func(context.Context, string, trust.Door) (net.Conn, error) { return nil, ErrNoTunnel },
		"hangs": func(ctx context.Context, _ string, _ trust.Door) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
	} {
		l, inv := node(t)
		r := relayOf(inv, func(o *Options) { o.Loopback, o.Tunnels, o.Dial = true, open, 2*time.Second })
		conn, tunnel, err := r.Connect(t.Context(), Target{inv.Clusters[0].Nodes[0], trust.SSH})
		if err != nil || tunnel || conn.RemoteAddr().String() != l.Addr().String() {
			t.Fatalf("%s: %v, %v", name, conn, err)
		}
		conn.Close()
		l.Close()
		_, _, err = r.Connect(t.Context(), Target{inv.Clusters[0].Nodes[0], trust.SSH})
		if !fault.Is(err, fault.Unreachable) || !strings.Contains(err.Error(), "nobody listens at ssh of cp-1.prod") || strings.Contains(err.Error(), "tunnel") != (name == "hangs") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A node that reaches out is never dialled, though somebody listens there.
func TestReachOut(t *testing.T) {
	l, inv := node(t)
	defer l.Close()
	h := &inv.Clusters[0].Nodes[0]
	h.Reach = bundle.ReachOut
	accepted := make(chan struct{})
	go func() {
		if _, err := l.Accept(); err == nil {
			close(accepted)
		}
	}()
	for why, open := range map[string]Tunnels{
		"keeps no tunnel": tunnels(func(context.Context, string, trust.Door) (net.Conn, error) { return nil, ErrNoTunnel }),
		"no tunnel":       nil,
		"not open": tunnels(func(context.Context, string, trust.Door) (net.Conn, error) {
			return nil, errors.New("the door is not open")
		}),
	} {
		r := relayOf(inv, func(o *Options) { o.Loopback, o.Tunnels = true, open })
		if _, _, err := r.Connect(t.Context(), Target{*h, trust.SSH}); !fault.Is(err, fault.Unreachable) || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
	}
	select {
	case <-accepted:
		t.Error("it was dialled")
	case <-time.After(50 * time.Millisecond):
	}
	// The bastion itself is held to what others are.
	h.Reach = ""
	r := relayOf(inv, nil)
	if _, err := r.Reach(t.Context(), *h, trust.SSH); !fault.Is(err, fault.Refused) {
		t.Errorf("to loopback: %v", err)
	}
	r = relayOf(inv, func(o *Options) { o.Loopback = true })
	conn, err := r.Reach(t.Context(), *h, trust.SSH)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// What is refused is told to the client, the log and the alarms, in words that
// no client has chosen.
func TestRefusals(t *testing.T) {
	var log bytes.Buffer
	var events []alarm.Event
	l, inv := node(t)
	r := relayOf(inv, func(o *Options) {
		o.Log, o.Alarm, o.Loopback = zerolog.New(&log), func(e alarm.Event) { events = append(events, e) }, true
	})
	p := &played{who: alice, ctx: t.Context(), data: data("169.254.169.254\n\x1b[2J", 80)}
	r.handle(p)
	if !strings.Contains(p.refused, "the bundle's inventory has no node called 169.254.169.254") || strings.ContainsAny(p.refused, "\x1b\n") {
		t.Errorf("%q", p.refused)
	}
	if len(events) != 1 || events[0].Kind != Refused || events[0].Kind.Loud() || events[0].Person != "alice" || !strings.Contains(events[0].Text, "169.254.169.254") {
		t.Errorf("%+v", events)
	}
	if !strings.Contains(log.String(), "relay refused") || !strings.Contains(log.String(), `"person":"alice"`) || strings.Contains(log.String(), "\x1b") {
		t.Error(log.String())
	}
	// Many of them are counted, and do not fill the log.
	for range 1000 {
		r.handle(&played{who: alice, ctx: t.Context(), data: data("nowhere", 22)})
	}
	if n := strings.Count(log.String(), "relay refused"); n > 500 || r.Stats().Refused != 1001 {
		t.Errorf("%d lines, %+v", n, r.Stats())
	}
	events = events[:1]
	// A node that is down is no refusal.
	l.Close()
	p = &played{who: alice, ctx: t.Context(), data: data("cp-1", uint32(inv.Clusters[0].Nodes[0].SSHPort))}
	r.handle(p)
	if p.refused != "" || !strings.Contains(p.failed, "nobody listens") || len(events) != 1 {
		t.Errorf("%q %q %v", p.refused, p.failed, events)
	}
	// Nor is one that does not answer; whoever hangs up meanwhile is not waited for.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := r.Connect(ctx, Target{inv.Clusters[0].Nodes[0], trust.SSH}); !fault.Is(err, fault.Unreachable) && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if s := r.Stats(); s.Refused != 1001 || s.Failed != 1 || s.Begun != 0 {
		t.Errorf("%+v", s)
	}
}
