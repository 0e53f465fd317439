// Package tunnel keeps tunnels from a node that cannot be dialled to every bastion
// of the inventory, so that people reach it all the same. What comes through is
// handed to the agent's own doors, as a connection that the bastion had opened:
// it is as little believed as any other.
//
// It must never connect to anybody but a bastion of the bundle in force that
// proves its name, resolve a name, or answer for a door that is not open. It
// stands on floor 4.
package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/api/mux"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

// MaxBastions is how many bastions tunnels are kept to, the first ones of the
// inventory.
const MaxBastions = 16

const (
	connecting = 10 * time.Second // dialling and shaking hands
	// Between tries: twice as long each time, up to the longest, each by up to
	// half shorter at random, so that a bastion that comes back is not met by
	// all nodes at once.
	shortest, longest = 250 * time.Millisecond, 15 * time.Second
	// lasted is how long a tunnel must have held for the next to be tried at
	// once.
	lasted = 10 * time.Second
	// checkEvery is how often a bastion is held against the time; changes of the
	// bundle are looked at when they come.
	checkEvery = 5 * time.Second
	// handing is how long a door may take to take a connection.
	handing = 5 * time.Second
)

// Options of tunnels. All are required.
type Options struct {
	// Bundles says which bastions there are.
	Bundles credential.Bundles
	// Servers verifies them.
	Servers *credential.Servers
	// Certificate returns the node's own, NODE.CLUSTER.
	Certificate func() (*tls.Certificate, error)
	Log         zerolog.Logger
}

// Tunnels are a node's tunnels. Its methods may be called concurrently.
type Tunnels struct {
	o     Options
	doors map[trust.Door]*listener

	mu    sync.Mutex // guards what follows
	state map[string]state
}

// state is how it stands with one bastion.
type state struct {
	up    bool
	since time.Time
	why   string // it is not up
}

// New returns tunnels that Run keeps.
func New(o Options) *Tunnels {
	t := &Tunnels{o: o, doors: map[trust.Door]*listener{}, state: map[string]state{}}
	for _, door := range []trust.Door{trust.SSH, trust.GRPC} {
		t.doors[door] = &listener{conns: make(chan net.Conn), shut: make(chan struct{})}
	}
	return t
}

// Listener returns what comes through the tunnels to a door, trust.SSH or
// trust.GRPC. Until Accept is called for the first time, and after Close, bastions
// are told that the door is not open.
func (t *Tunnels) Listener(door trust.Door) net.Listener { return t.doors[door] }

// bastion is one as the inventory has it.
type bastion struct{ name, at string }

// bastions returns those that take tunnels.
func (t *Tunnels) bastions() (list []bastion) {
	for _, h := range t.o.Bundles.Current().Inventory.Bastions {
		if at, ok := h.Tunnel(); ok && len(list) < MaxBastions {
			list = append(list, bastion{h.ID(), at.String()})
		}
	}
	return list
}

// Run keeps a tunnel to each bastion of the bundle in force until ctx ends, and
// returns when all have ended.
func (t *Tunnels) Run(ctx context.Context) {
	changed, cancel := t.o.Bundles.Subscribe()
	defer cancel()
	var kept sync.WaitGroup
	defer kept.Wait()
	ends := map[bastion]context.CancelFunc{}
	for {
		now := t.bastions()
		for b, end := range ends {
			if !slices.Contains(now, b) {
				end()
				delete(ends, b)
			}
		}
		for _, b := range now {
			if ends[b] == nil {
				within, end := context.WithCancel(ctx)
				ends[b] = end
				kept.Go(func() { t.keep(within, b) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// keep keeps the tunnel to one bastion until ctx ends.
func (t *Tunnels) keep(ctx context.Context, b bastion) {
	log := t.o.Log.With().Str("bastion", b.name).Str("address", b.at).Logger()
	wait, told := shortest, ""
	for ctx.Err() == nil {
		start := time.Now()
		err := t.connect(ctx, b, log)
		if ctx.Err() != nil {
			return
		}
		if time.Since(start) > connecting+lasted {
			wait = shortest
		}
		why := neutral.LineMax(fault.Of(err).Error(), 256)
		t.note(b, state{why: why, since: time.Now()})
		if why != told {
			log.Warn().Str("why", why).Msg("no tunnel")
			told = why
		}
		pause := wait - rand.N(wait/2) // #nosec G404 -- nothing depends on its being unforeseeable
		wait = min(2*wait, longest)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// note takes down how it stands, and since when it has been down.
func (t *Tunnels) note(b bastion, now state) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if was, known := t.state[b.name]; known && !was.up && !now.up {
		now.since = was.since
	}
	t.state[b.name] = now
}

// connect has a tunnel until it ends, and returns why.
func (t *Tunnels) connect(ctx context.Context, b bastion, log zerolog.Logger) error {
	certificate, err := t.o.Certificate()
	if err != nil {
		return err
	}
	within, cancel := context.WithTimeout(ctx, connecting)
	defer cancel()
	raw, err := (&net.Dialer{KeepAlive: -1}).DialContext(within, "tcp", b.at) // the tunnel has its own
	if err != nil {
		return err
	}
	defer raw.Close()
	config := t.o.Servers.TLS(b.name)
	config.NextProtos = []string{mux.Protocol}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	secure := tls.Client(raw, config)
	if err := secure.HandshakeContext(within); err != nil {
		return err
	}
	shown := secure.ConnectionState()
	if shown.NegotiatedProtocol != mux.Protocol {
		return errors.New("what listens there takes no tunnels")
	}
	changed, unsubscribe := t.o.Bundles.Subscribe()
	defer unsubscribe()
	ended := make(chan error, 1) // the first reason counts
	done := make(chan struct{})
	var watching sync.WaitGroup
	defer watching.Wait()
	defer close(done)
	err = mux.Node(secure, log, func(s *mux.Session) {
		watching.Go(func() {
			defer s.Close()
			tick := time.NewTicker(checkEvery)
			defer tick.Stop()
			for {
				// Changes before the subscription included.
				if err := t.o.Servers.ServerCertificate(b.name, shown.PeerCertificates); err != nil {
					ended <- err
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-done:
					return
				case <-s.Ended():
					return
				case <-changed:
				case <-tick.C:
				}
			}
		})
		// A bastion that refuses the node's certificate does so after this end
		// has shaken hands: only what it sends says that it took it.
		watching.Go(func() {
			if s.Answers() {
				t.note(b, state{up: true, since: time.Now()})
				log.Info().Msg("tunnel open")
			}
		})
	}, t.hand)
	select {
	case why := <-ended:
		return why
	default:
		return fmt.Errorf("it ended: %w", err)
	}
}

// hand gives a stream to a door.
func (t *Tunnels) hand(door trust.Door, take func() (*mux.Stream, error)) error {
	l := t.doors[door]
	if l == nil || !l.open() {
		return fmt.Errorf("the door %.16q is not open", string(door))
	}
	conn, err := take()
	if err != nil {
		return err
	}
	full := time.NewTimer(handing)
	defer full.Stop()
	select {
	case l.conns <- conn:
	case <-conn.Ended():
	case <-l.shut:
		conn.Close()
	case <-full.C:
		conn.Close()
	}
	return nil
}

// Warnings tells which tunnels are down, each in one line. cluster and node are
// this node's own names.
func (t *Tunnels) Warnings(node, cluster string) (all []string) {
	inv := t.o.Bundles.Current().Inventory
	now := t.bastions()
	if len(now) == 0 {
		all = append(all, "no bastion of the bundle's inventory has a tunnelPort, so that this node has no tunnel")
	}
	if h, err := inv.Find(node+"."+cluster, cluster); err == nil && h.Reach != bundle.ReachOut {
		all = append(all, "this node keeps tunnels, and the bundle's inventory lets bastions dial it: give it reach: out there")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, b := range now {
		switch s := t.state[b.name]; {
		case s.up:
		case s.why == "":
			all = append(all, "the tunnel to "+b.name+" is not open yet")
		default:
			all = append(all, fmt.Sprintf("the tunnel to %s is down since %s: %s", b.name, s.since.UTC().Format(time.RFC3339), s.why))
		}
	}
	return all
}

// listener is a door's.
type listener struct {
	conns chan net.Conn

	mu       sync.Mutex // guards what follows
	accepted bool
	closed   bool
	shut     chan struct{}
}

func (l *listener) open() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.accepted && !l.closed
}

// Accept returns the next connection. Its remote address is the bastion's.
func (l *listener) Accept() (net.Conn, error) {
	l.mu.Lock()
	l.accepted = true
	l.mu.Unlock()
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.shut:
		return nil, net.ErrClosed
	}
}

// Close closes the door for good.
func (l *listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		close(l.shut)
	}
	return nil
}

func (l *listener) Addr() net.Addr { return through{} }

// through is the address of what comes by tunnels.
type through struct{}

func (through) Network() string { return "tunnel" }
func (through) String() string  { return "tunnel" }
