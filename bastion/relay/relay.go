// Package relay connects people to nodes: a channel of the type direct-tcpip
// that names a node of the signed inventory and a port of one of its doors
// becomes a connection there, and everything else is refused and recorded.
//
// It is blind: what passes is SSH or TLS that only the node can open. It must
// never resolve a name, dial an address that the bundle in force does not have,
// look at what passes, or hold more of it than two small buffers. How many
// relays somebody may have is the SSH server's to say. It stands on floor 4.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/time/rate"

	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/sshserver"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
)

// ChannelType is the type of the SSH channels that are relayed.
const ChannelType = "direct-tcpip"

// Refused is the alarm of somebody who was let in and asked for what is not
// relayed to.
const Refused = alarm.Relay

// Defaults of Options.
const (
	DefaultDial = 5 * time.Second
	DefaultIdle = 30 * time.Minute
)

// ErrNoTunnel is what Tunnels.Open returns for a node that keeps none open.
var ErrNoTunnel = errors.New("the node keeps no tunnel open")

// Tunnels are the connections that nodes which cannot be dialled keep open to
// this bastion.
type Tunnels interface {
	// Open returns a connection to a door, trust.SSH or trust.GRPC, of the node
	// with that ID (NODE.CLUSTER), inside a tunnel that it keeps; ErrNoTunnel
	// where it keeps none. It returns when ctx ends. A connection that has a
	// method CloseWrite is half-closed with it.
	Open(ctx context.Context, node string, door trust.Door) (net.Conn, error)
}

// Session is one relayed connection, as others are told of it.
type Session struct {
	Who    trust.Identity
	Target Target
	// Tunnel is set where it goes through a tunnel of the node's.
	Tunnel bool
	Since  time.Time
}

// Options are what a Relay works with. Inventory is required.
type Options struct {
	// Inventory returns the one in force.
	Inventory func() *bundle.Inventory
	// Tunnels is asked before a node is dialled; may be nil.
	Tunnels Tunnels
	// Never are addresses that are not dialled whatever the inventory says, nor
	// other ports there: the bastion's own. Loopback says that nodes are on this
	// very machine; then only the ports matter.
	Never    []netip.AddrPort
	Loopback bool
	// Begin is told of every relayed connection, and what it returns of its end,
	// with the bytes that passed and why it ended; may be nil. Neither may block.
	Begin func(Session) (end func(up, down int64, why string))
	// Refused is told of who asked for what is not relayed to; may be nil. It must
	// not block.
	Refused func(who trust.Identity, err error)
	// Failed is told of who asked for a node that could not be reached; may be nil.
	// It must not block.
	Failed func(who trust.Identity, t Target, err error)
	// Dial is how long reaching a node may take, Idle how long no byte may pass;
	// 0: the defaults.
	Dial, Idle time.Duration
	Log        zerolog.Logger
	// Alarm is told of what was refused; may be nil. It must not block.
	Alarm func(alarm.Event)
}

// Relay connects channels to nodes. It is safe for concurrent use.
type Relay struct {
	o     Options
	stats stats
	// refusals keeps one client from filling the log; unsaid were held back.
	refusals *rate.Limiter
	unsaid   atomic.Int64
}

type stats struct{ open, begun, refused, failed, up, down atomic.Int64 }

// Stats are numbers since the start, but for Open.
type Stats struct {
	Open, Begun, Refused, Failed int64
	// BytesUp went to nodes, BytesDown came from them.
	BytesUp, BytesDown int64
}

// New returns a Relay.
func New(o Options) *Relay {
	if o.Dial == 0 {
		o.Dial = DefaultDial
	}
	if o.Idle == 0 {
		o.Idle = DefaultIdle
	}
	if o.Begin == nil {
		o.Begin = func(Session) func(int64, int64, string) { return func(int64, int64, string) {} }
	}
	if o.Refused == nil {
		o.Refused = func(trust.Identity, error) {}
	}
	if o.Failed == nil {
		o.Failed = func(trust.Identity, Target, error) {}
	}
	if o.Alarm == nil {
		o.Alarm = func(alarm.Event) {}
	}
	return &Relay{o: o, refusals: rate.NewLimiter(20, 200)}
}

// Stats returns what was relayed so far.
func (r *Relay) Stats() Stats {
	s := &r.stats
	return Stats{s.open.Load(), s.begun.Load(), s.refused.Load(), s.failed.Load(), s.up.Load(), s.down.Load()}
}

// channel is what this package needs of a *sshserver.Channel, whose comments
// hold.
type channel interface {
	Identity() trust.Identity
	Context() context.Context
	Data() []byte
	Accept() (sshserver.Stream, error)
	Refuse(why string) error
	Fail(why string) error
}

// Handle is the handler of channels of ChannelType.
func (r *Relay) Handle(c *sshserver.Channel) { r.handle(c) }

func (r *Relay) handle(c channel) {
	who := c.Identity()
	target, err := r.Target(who, c.Data())
	if err != nil {
		r.refuse(c, who, err)
		return
	}
	log := r.o.Log.With().Str("person", neutral.Line(who.Person)).Str("source", who.Source).Str("node", target.Node.ID()).Str("door", string(target.Door)).Logger()
	node, tunnel, err := r.Connect(c.Context(), target)
	if err != nil {
		r.stats.failed.Add(1)
		why := neutral.LineMax(fault.Of(err).Error(), 512)
		log.Info().Str("error", why).Msg("relay failed")
		r.o.Failed(who, target, err)
		_ = c.Fail("halligan: " + why) // who is gone need not be told
		return
	}
	defer node.Close()
	client, err := c.Accept()
	if err != nil {
		return // the client is gone
	}
	session := Session{Who: who, Target: target, Tunnel: tunnel, Since: time.Now()}
	r.stats.begun.Add(1)
	r.stats.open.Add(1)
	defer r.stats.open.Add(-1)
	end := r.o.Begin(session)
	var up, down int64
	why := "a fault of the bastion"
	defer func() { end(up, down, why) }()
	log.Info().Bool("tunnel", tunnel).Msg("relay begins")
	up, down, why = r.pump(c.Context(), client, node)
	log.Info().Int64("up", up).Int64("down", down).Stringer("lasted", time.Since(session.Since).Round(time.Millisecond)).Str("why", why).Msg("relay ended")
}

// Target returns what a channel's data ask for, if it may be reached.
func (r *Relay) Target(who trust.Identity, data []byte) (Target, error) {
	request, err := ParseRequest(data)
	if err != nil {
		return Target{}, err
	}
	inv := r.o.Inventory()
	target, err := Resolve(inv, who, request)
	if err == nil {
		err = r.own(inv, target)
	}
	if err != nil {
		return Target{}, err
	}
	return target, nil
}

func (r *Relay) refuse(c channel, who trust.Identity, err error) {
	r.stats.refused.Add(1)
	why := neutral.LineMax(fault.Of(err).Error(), 512)
	if r.refusals.Allow() {
		r.o.Log.Warn().Str("person", neutral.Line(who.Person)).Str("source", who.Source).Str("why", why).Int64("unsaid", r.unsaid.Swap(0)).Msg("relay refused")
	} else {
		r.unsaid.Add(1)
	}
	r.o.Alarm(alarm.Of(Refused, who, "not relayed: "+why))
	r.o.Refused(who, err)
	_ = c.Refuse("halligan: " + why) // who is gone need not be told
}

// Reach returns a connection of the bastion's own to a door of a node of the
// inventory, which the same is refused for as others are. Errors are as Connect's,
// or fault.Refused.
func (r *Relay) Reach(ctx context.Context, node bundle.Host, door trust.Door) (net.Conn, error) {
	target := Target{node, door}
	if err := r.own(r.o.Inventory(), target); err != nil {
		return nil, err
	}
	conn, _, err := r.Connect(ctx, target)
	return conn, err
}

// Connect returns a connection to the target: inside a tunnel that the node
// keeps, else by dialling it, which is never done where the inventory says that
// the node reaches out. Errors are fault.Unreachable.
func (r *Relay) Connect(ctx context.Context, t Target) (conn net.Conn, tunnel bool, err error) {
	var why string
	out := t.Node.Reach == bundle.ReachOut
	if err = ErrNoTunnel; r.o.Tunnels != nil {
		// Half of the time, so that a tunnel whose other end died unnoticed
		// does not keep a node from being dialled that can be.
		most := r.o.Dial / 2
		if out {
			most = r.o.Dial
		}
		within, cancel := context.WithTimeout(ctx, most)
		conn, err = r.o.Tunnels.Open(within, t.Node.ID(), t.Door)
		cancel()
		if err == nil {
			return conn, true, nil
		}
		if !errors.Is(err, ErrNoTunnel) {
			why = "; its tunnel: " + err.Error()
		}
	}
	if out {
		return nil, false, fault.New(fault.Unreachable, "try another bastion, another node, or whether the agent runs", "%s is only reached by the tunnel that it keeps: %w", t, err)
	}
	dialer := net.Dialer{Timeout: r.o.Dial, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}
	conn, err = dialer.DialContext(ctx, "tcp", t.At().String())
	if err == nil {
		return conn, false, nil
	}
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		why = "nobody listens at " + t.String() + why
	case errors.As(err, &timeout) && timeout.Timeout():
		why = fmt.Sprintf("%s does not answer within %v%s", t, r.o.Dial, why)
	default:
		why = fmt.Sprintf("%s: %v%s", t, err, why)
	}
	return nil, false, fault.New(fault.Unreachable, "try another node, or whether the agent runs", "%s", why)
}

// closeWrite says that nothing more will be written, where a connection can.
func closeWrite(w io.Writer) error {
	if h, ok := w.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}
