// Package grpcdoor is the gRPC server behind the doors of a daemon: one server,
// one table of methods, one interceptor, the same for everybody who came in,
// whichever way. What opens the ways authenticates a peer and hands the connection
// over as a [Conn]; what is served is the daemon's.
//
// It must never find out who calls from anything but the Conn, or serve a method
// that has no row in the daemon's table. It stands on floor 1.
package grpcdoor

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

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

// Alarms are told what somebody should hear of. Raise never blocks.
type Alarms interface {
	Raise(alarm.Event)
}

// Record takes down who came and what they asked for. None of its methods may
// block.
type Record interface {
	// Login is told of everybody who is let in, but for who is inside SSH, whose
	// server tells of them, and for bastions, which come every minute with nothing
	// but a bundle. What it returns is told of the end, and of why where the daemon
	// ended it, else nil.
	Login(who trust.Identity) (logout func(why error))
	// Refused is told of a connection that was refused, or taken back.
	Refused(who trust.Identity, err error)
	// Called is told of a call when it has ended, as its row says; request is nil
	// where none was read.
	Called(who trust.Identity, method string, request proto.Message, err error)
}

// Row is one method of the inventory.
type Row struct {
	// May says who may call it at all. What is asked for is decided behind it.
	May    func(trust.Identity) bool
	Record Recording
}

// Recording says which calls of a method are told to the Record. Those that are
// refused always are.
type Recording int

// How calls are recorded.
const (
	// Noted: every call.
	Noted Recording = iota + 1
	// Deed: what serves it records it by itself, before anything happens.
	Deed
	// Routine: it asks for what the daemon tells everybody of itself.
	Routine
)

// Options of a server. All but Record are required.
type Options struct {
	// Register registers the daemon's services.
	Register func(grpc.ServiceRegistrar)
	// Methods is the inventory of what is offered by its full name, reflection
	// included.
	Methods map[string]Row
	// Record is left out in tests only.
	Record Record
	Alarms Alarms
	Log    zerolog.Logger
}

// unrecorded is the Record of tests.
type unrecorded struct{}

func (unrecorded) Login(trust.Identity) func(error)                    { return func(error) {} }
func (unrecorded) Refused(trust.Identity, error)                       {}
func (unrecorded) Called(trust.Identity, string, proto.Message, error) {}

// Reflection are the methods by which clients such as grpcurl learn the others.
// Every server has them.
var Reflection = []string{
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}

// MaxCallsEach is how many calls one person may have under way.
const MaxCallsEach = 16

// The bounds of all doors together. A person needs one connection and one or
// two calls; the rest is room for several people and their scripts.
const (
	maxConnections     = 256
	maxConnectionsEach = 20 // SSH lets one have 12 sessions, each with one
	maxCalls           = 128
	// maxStreams are those of one connection, in which answers stay for as long as
	// their client takes nothing: a call has ended when its answer is written.
	maxStreams = 8
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
	// shutdownGrace is how long calls may take to end after the daemon was
	// told to stop, before their connections are closed.
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

// Server takes connections from every door.
type Server struct {
	o           Options
	grpc        *grpc.Server
	connections *admission.Places
	calls       *admission.Places
	handed      *handed
	// stopping ends when the daemon is told to stop.
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
	if o.Record == nil {
		o.Record = unrecorded{}
	}
	s := &Server{o: o, connections: places("connections", maxConnections, maxConnectionsEach), calls: places("calls", maxCalls, MaxCallsEach), handed: newHanded()}
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
	o.Register(s.grpc)
	reflection.Register(s.grpc)
	if err := checkMethods(s.grpc.GetServiceInfo(), o.Methods); err != nil {
		return nil, err
	}
	s.serving.Go(func() { _ = s.grpc.Serve(s.handed) }) // ends with the server
	return s, nil
}

// Stopping ends when the server is shut down, before calls under way are cut off.
func (s *Server) Stopping() context.Context { return s.stopping }

// Calls returns how many calls are under way.
func (s *Server) Calls() int { return s.calls.Taken() }

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
		if err := s.Hand(&local{Conn: &end{Conn: <-accepted}, who: who, held: held}); err != nil {
			return nil, errors.Join(err, near.Close())
		}
		return &end{Conn: near}, nil
	}
	return grpc.NewClient("passthrough:///door", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)), grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(),
		grpc.WithReadBufferSize(pipeBuffer), grpc.WithWriteBufferSize(pipeBuffer))
}

// end is one end of an in-memory connection. Its deadlines end with it: bufconn
// keeps the buffers until the last one has passed, and gRPC sets some when it
// closes, so that one client in a loop would fill the memory.
type end struct {
	net.Conn
	closed atomic.Bool
}

func (c *end) Close() error {
	c.closed.Store(true)
	return errors.Join(c.Conn.Close(), c.Conn.SetDeadline(time.Time{}))
}

func (c *end) SetDeadline(at time.Time) error      { return c.until(at, c.Conn.SetDeadline) }
func (c *end) SetReadDeadline(at time.Time) error  { return c.until(at, c.Conn.SetReadDeadline) }
func (c *end) SetWriteDeadline(at time.Time) error { return c.until(at, c.Conn.SetWriteDeadline) }

func (c *end) until(at time.Time, set func(time.Time) error) error {
	err := set(at)
	if c.closed.Load() {
		return errors.Join(net.ErrClosed, set(time.Time{}))
	}
	return err
}

// local is this process's end of an in-memory connection.
type local struct {
	net.Conn
	who  trust.Identity
	held context.Context
}

func (c *local) Identity() (trust.Identity, error) { return c.who, nil }
func (c *local) Held() context.Context             { return c.held }

// Shutdown takes no more connections, ends Stopping, and returns when all calls
// have ended or were cut off.
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
		return fault.New(fault.Unreachable, "try another", "the daemon stops")
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
