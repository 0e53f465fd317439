// Package tunnel takes the tunnels that nodes which cannot be dialled keep open to
// a bastion, and opens connections to the nodes' doors inside.
//
// It must never take a tunnel from anybody but a node of the inventory that has
// proven its name, or keep more than one of each. What passes it cannot read. It
// stands on floor 4.
package tunnel

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/halligan-io/halligan/api/grpcdoor"
	"github.com/halligan-io/halligan/api/mtls"
	"github.com/halligan-io/halligan/api/mux"
	"github.com/halligan-io/halligan/bastion/relay"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

// Tunnels are those that are open. Its methods may be called concurrently.
type Tunnels struct {
	log zerolog.Logger

	mu   sync.Mutex // guards what follows
	open map[string]*tunnel
	// came counts the connections of each node, those included that do not answer
	// yet or are not over.
	came map[string]int
}

// maxEach is how many connections one node may have at a time: the tunnel, the one
// after it, and some room.
const maxEach = 4

var _ relay.Tunnels = (*Tunnels)(nil)

type tunnel struct {
	*mux.Session
	since time.Time
}

// New returns tunnels of which none is open yet.
func New(log zerolog.Logger) *Tunnels {
	return &Tunnels{log: log, open: map[string]*tunnel{}, came: map[string]int{}}
}

// Listen authenticates the nodes that connect to l. Closing what it returns closes
// l.
func Listen(l net.Listener, authority *credential.Authority, o mtls.Options) *mtls.Listener {
	o.Authority, o.Protocol = nodes{authority}, mux.Protocol
	return mtls.NewListener(l, o)
}

// nodes lets in nodes, and nobody else.
type nodes struct{ *credential.Authority }

func (n nodes) Client(certs []*x509.Certificate, source net.Addr) (trust.Identity, error) {
	return n.Tunnel(certs, source)
}

// Serve takes tunnels from a listener until ctx ends or the listener fails, closes
// it, and returns when its tunnels have ended.
func (t *Tunnels) Serve(ctx context.Context, l *mtls.Listener) error {
	ctx, end := context.WithCancel(ctx)
	var serving sync.WaitGroup
	defer serving.Wait()
	defer end()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		conn, ok := c.(grpcdoor.Conn)
		if !ok {
			c.Close()
			return fmt.Errorf("a connection that nobody has authenticated: %T", c)
		}
		serving.Go(func() { t.serve(ctx, conn) })
	}
}

// serve has one tunnel until it ends.
func (t *Tunnels) serve(ctx context.Context, conn grpcdoor.Conn) {
	defer conn.Close()
	who, err := conn.Identity()
	if err != nil {
		return
	}
	if !t.enter(who.Person) {
		return
	}
	defer t.leave(who.Person)
	log := t.log.With().Str("node", who.Person).Str("source", who.Source).Logger()
	session, err := mux.Bastion(conn, log)
	if err != nil {
		log.Error().Err(err).Msg("no tunnel")
		return
	}
	defer session.Close()
	// Only what answers is in the way of an older one.
	if !session.Answers() {
		return
	}
	now := &tunnel{session, time.Now()}
	t.mu.Lock()
	before := t.open[who.Person]
	t.open[who.Person] = now
	t.mu.Unlock()
	if before != nil {
		before.Close() // the node knows which one it uses: the newest
	}
	log.Info().Bool("again", before != nil).Msg("tunnel open")
	why := "the node or the network closed it"
	select {
	case <-session.Ended():
	case <-ctx.Done():
		why = "the bastion stops"
	case <-conn.Held().Done():
		why = neutral.LineMax(fault.Of(context.Cause(conn.Held())).Message, 256)
	}
	t.mu.Lock()
	if t.open[who.Person] == now {
		delete(t.open, who.Person)
	}
	t.mu.Unlock()
	log.Info().Str("why", why).Stringer("lasted", time.Since(now.since).Round(time.Second)).Msg("tunnel ended")
}

func (t *Tunnels) enter(node string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.came[node] == maxEach {
		return false
	}
	t.came[node]++
	return true
}

func (t *Tunnels) leave(node string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.came[node]--; t.came[node] == 0 {
		delete(t.came, node)
	}
}

// Open is that of relay.Tunnels.
func (t *Tunnels) Open(ctx context.Context, node string, door trust.Door) (net.Conn, error) {
	t.mu.Lock()
	tunnel := t.open[node]
	t.mu.Unlock()
	if tunnel == nil {
		return nil, relay.ErrNoTunnel
	}
	type opened struct {
		stream *mux.Stream
		err    error
	}
	result := make(chan opened)
	go func() { // ends within seconds
		s, err := tunnel.Session.Open(door)
		select {
		case result <- opened{s, err}:
		case <-ctx.Done():
			if err == nil {
				s.Close()
			}
		}
	}()
	select {
	case r := <-result:
		if r.err != nil {
			return nil, r.err
		}
		return r.stream, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Since returns since when which nodes, by their ID, have a tunnel open.
func (t *Tunnels) Since() map[string]time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make(map[string]time.Time, len(t.open))
	for node, tunnel := range t.open {
		all[node] = tunnel.since
	}
	return all
}
