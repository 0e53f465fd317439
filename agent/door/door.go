// Package door is the agent's gRPC API over the surgical engine, the same for
// everybody who came in, whichever way: one server, one table of methods, one
// interceptor. The packages that open the ways (agent/console, agent/mtls,
// agent/sshd) authenticate a peer and hand the connection over as a [Conn].
//
// It must never find out who calls from anything but the Conn, offer a method
// that has no row in its table, or decide what a person may do to the cluster:
// that is the engine's one gate. It stands on floor 4.
package door

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/test/bufconn"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/admission"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// Conn is a connection to a peer that a door has authenticated.
type Conn interface {
	net.Conn
	// Identity returns who is at the other end, or why that peer may not
	// enter: every call then ends with that error.
	Identity() (trust.Identity, error)
	// Held ends when the identity may no longer be used; its cause, a fault,
	// says why. The connection is closed then.
	Held() context.Context
}

// Engine is what stands behind the doors. Its methods are called concurrently
// and check the identity's right themselves; errors should be faults.
type Engine interface {
	// Describe returns the table of actions.
	Describe() []*halliganv1.Action
	Status(ctx context.Context, who trust.Identity) (*halliganv1.StatusResponse, error)
	// Plan changes nothing.
	Plan(ctx context.Context, who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error)
	// ShowPlan returns a plan that waits, to whoever may see it.
	ShowPlan(ctx context.Context, who trust.Identity, id string) (*halliganv1.Plan, error)
	// Apply always returns a result. Its context does not end when the caller
	// goes away, only when the agent stops or the caller's credential was
	// revoked. progress never blocks, and is not called after Apply has
	// returned.
	Apply(ctx context.Context, who trust.Identity, req *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) *halliganv1.Result
	// Stop ends an action under way between two objects.
	Stop(who trust.Identity, id string) error
	// Get calls send from one goroutine, and stops when send fails.
	Get(ctx context.Context, who trust.Identity, req *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error)
	// History calls send from one goroutine, newest first, and stops when send
	// fails.
	History(ctx context.Context, who trust.Identity, req *halliganv1.HistoryRequest, send func(*halliganv1.HistoryEntry) error) error
}

// Bundles is the bundle that the agent trusts. Its methods are called
// concurrently.
type Bundles interface {
	// Offer takes a bundle over where it is verified and newer.
	Offer(data []byte) (changed bool, err error)
	// Raw is the file in force.
	Raw() []byte
	Status() *halliganv1.BundleStatus
}

// Alarms are told what somebody should hear of. Raise never blocks.
type Alarms interface {
	Raise(alarm.Event)
}

// Options of a server.
type Options struct {
	Engine Engine
	// Bundles is nil on an agent without a bundle.
	Bundles Bundles
	// Cluster is the name of the cluster in the bundle; may be empty.
	Cluster string
	// Warnings tells what is degraded, each in one line; may be nil.
	Warnings func() []string
	Alarms   Alarms
	Log      zerolog.Logger
}

// The bounds of all doors together. A person needs one connection and one or
// two calls; the rest is room for several people and their scripts.
const (
	maxConnections     = 256
	maxConnectionsEach = 20 // SSH lets one have 12 sessions, each with one
	maxCalls           = 128
	maxCallsEach       = 16
	maxStreams         = 16 // of one connection
	// maxMessage bounds an answer in bytes; a plan for 10,000 objects has about
	// 4 MiB, a stored object at most etcd's 1.5 MiB. A request is a few words,
	// or a bundle of at most 1 MiB.
	maxMessage = 16 << 20
	maxRequest = 1<<20 + 64<<10
	maxHeaders = 32 << 10
	// maxBusy is how many calls of a connection are refused for want of room:
	// gRPC keeps some memory of each until the connection ends.
	maxBusy          = 1000
	handshakeTimeout = 5 * time.Second
	// shutdownGrace is how long calls may take to end after the agent was told
	// to stop, before their connections are closed.
	shutdownGrace = 5 * time.Second
	// idleLimit is how long a connection may be without a call, ageLimit how
	// long it may be at all; calls under way then have ageGrace to end. These
	// are the limits of an SSH session, too.
	idleLimit = 30 * time.Minute
	ageLimit  = 12 * time.Hour
	ageGrace  = time.Hour
	// farewell is how long a connection stays open after its identity ended, so
	// that calls can say why.
	farewell = 200 * time.Millisecond
	// pipeBuffer is each direction of an in-memory connection, in bytes.
	pipeBuffer = 32 << 10
)

// Server is the API behind every door.
type Server struct {
	halliganv1.UnimplementedAgentServer
	engine   Engine
	bundles  Bundles
	cluster  string
	warnings func() []string
	alarms   Alarms
	log      zerolog.Logger

	grpc        *grpc.Server
	connections *admission.Places
	calls       *admission.Places
	handed      *handed
	// stopping ends when the agent is told to stop.
	stopping context.Context
	stop     context.CancelFunc
	serving  sync.WaitGroup
}

// places keeps half of all from automation and drills, and an eighth for somebody
// at the node's console.
func places(what string, total, each int) *admission.Places {
	return admission.NewPlaces(admission.PlacesOptions{What: what, Total: total, Each: each, Reserved: total / 2, Console: total / 8})
}

// New returns a server that takes connections at once. It refuses to start with
// a method that has no row in the table.
func New(o Options) (*Server, error) {
	if o.Warnings == nil {
		o.Warnings = func() []string { return nil }
	}
	s := &Server{engine: o.Engine, bundles: o.Bundles, cluster: o.Cluster, warnings: o.Warnings, alarms: o.Alarms, log: o.Log,
		connections: places("connections", maxConnections, maxConnectionsEach), calls: places("calls", maxCalls, maxCallsEach), handed: newHanded()}
	s.stopping, s.stop = context.WithCancel(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(transport{s}),
		grpc.InTapHandle(s.tap),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.ConnectionTimeout(handshakeTimeout),
		// A peer that was stopped or hangs gives its place back, and so does one
		// that asks nothing; one that stays has to come in anew now and then.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second,
			MaxConnectionIdle: idleLimit, MaxConnectionAge: ageLimit, MaxConnectionAgeGrace: ageGrace}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)
	halliganv1.RegisterAgentServer(s.grpc, s)
	reflection.Register(s.grpc)
	if err := checkMethods(s.grpc.GetServiceInfo()); err != nil {
		return nil, err
	}
	s.serving.Go(func() { _ = s.grpc.Serve(s.handed) }) // ends with the server
	return s, nil
}

// Serve serves the connections of a listener, which all are of type [Conn],
// until the server is shut down or the listener fails.
func (s *Server) Serve(l net.Listener) error {
	err := s.grpc.Serve(l)
	if errors.Is(err, grpc.ErrServerStopped) || s.stopping.Err() != nil {
		return nil
	}
	return err
}

// Hand serves one connection. After an error it is closed.
func (s *Server) Hand(c Conn) error {
	if err := s.handed.put(c); err != nil {
		return errors.Join(err, c.Close())
	}
	return nil
}

// Dial returns a client in this process that is taken for who, as long as held
// lasts. Whoever dials closes it.
func (s *Server) Dial(who trust.Identity, held context.Context) (*grpc.ClientConn, error) {
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		if held.Err() != nil {
			return nil, context.Cause(held)
		}
		pipe := bufconn.Listen(pipeBuffer)
		defer pipe.Close()
		accepted := make(chan net.Conn, 1)
		go func() {
			far, err := pipe.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- far
		}()
		near, err := pipe.DialContext(ctx)
		if err != nil {
			return nil, err
		}
		if err := s.Hand(&local{Conn: <-accepted, who: who, held: held}); err != nil {
			return nil, errors.Join(err, near.Close())
		}
		return near, nil
	}
	return grpc.NewClient("passthrough:///agent", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithReadBufferSize(pipeBuffer), grpc.WithWriteBufferSize(pipeBuffer))
}

// local is this process's end of an in-memory connection.
type local struct {
	net.Conn
	who  trust.Identity
	held context.Context
}

func (c *local) Identity() (trust.Identity, error) { return c.who, nil }
func (c *local) Held() context.Context             { return c.held }

// Shutdown takes no more connections, tells actions under way to stop between
// two objects, and returns when all calls have ended or were cut off.
func (s *Server) Shutdown() {
	s.stop()
	hard := time.AfterFunc(shutdownGrace, s.grpc.Stop)
	s.grpc.GracefulStop()
	hard.Stop()
	s.serving.Wait()
}

// handed is a listener for connections that were accepted elsewhere.
type handed struct {
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func newHanded() *handed {
	h := &handed{conns: make(chan net.Conn), closed: make(chan struct{})}
	h.close = sync.OnceFunc(func() { close(h.closed) })
	return h
}

func (h *handed) put(c net.Conn) error {
	select {
	case h.conns <- c:
		return nil
	case <-h.closed:
		return fault.New(fault.Unreachable, "try another agent", "the agent stops")
	}
}

func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *handed) Close() error   { h.close(); return nil }
func (h *handed) Addr() net.Addr { return nowhere{} }

// nowhere is the address of what has none.
type nowhere struct{}

func (nowhere) Network() string { return "handed" }
func (nowhere) String() string  { return "handed" }
