package grpcdoor_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// service answers that all is well, or panics for whoever wants that.
type service struct {
	healthpb.UnimplementedHealthServer
}

func (service) Check(_ context.Context, req *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if req.GetService() == "panic" {
		panic("as asked")
	}
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
}

type silent struct{}

func (silent) Raise(alarm.Event) {}

// anybody is somebody.
func anybody(trust.Identity) bool { return true }

func ada(who trust.Identity) bool { return who.Person == "ada" }

func options() grpcdoor.Options {
	o := grpcdoor.Options{Alarms: silent{}, Log: zerolog.Nop(), Register: func(r grpc.ServiceRegistrar) { healthpb.RegisterHealthServer(r, service{}) },
		Methods: map[string]grpcdoor.Row{healthpb.Health_Check_FullMethodName: {May: ada, Record: grpcdoor.Noted}, healthpb.Health_List_FullMethodName: {May: anybody, Record: grpcdoor.Routine},
			healthpb.Health_Watch_FullMethodName: {May: anybody, Record: grpcdoor.Deed}}}
	for _, m := range grpcdoor.Reflection {
		o.Methods[m] = grpcdoor.Row{May: anybody, Record: grpcdoor.Routine}
	}
	return o
}

func open(t *testing.T) *grpcdoor.Server {
	t.Helper()
	s, err := grpcdoor.New(options())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

// TestRows: a server with a method that nobody has thought of does not start.
func TestRows(t *testing.T) {
	for method := range options().Methods {
		o := options()
		delete(o.Methods, method)
		if _, err := grpcdoor.New(o); err == nil || !strings.Contains(err.Error(), method) {
			t.Errorf("without a row for %s: %v", method, err)
		}
	}
}

// TestAllow: a row decides, nobody is nobody, and a panic ends one call.
func TestAllow(t *testing.T) {
	s := open(t)
	check := func(who trust.Identity, name string) error {
		c, err := s.Dial(who, t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, err = healthpb.NewHealthClient(c).Check(t.Context(), &healthpb.HealthCheckRequest{Service: name})
		return err
	}
	for person, want := range map[string]fault.Code{"ada": "", "bob": fault.Refused, "": fault.Refused} {
		err := check(trust.Identity{Person: person, Door: trust.SSH}, "")
		if (err == nil) != (want == "") || err != nil && api.FromStatus(err).Code != want {
			t.Errorf("%q: %v, want %q", person, err, want)
		}
	}
	who := trust.Identity{Person: "ada", Door: trust.SSH}
	if err := check(who, "panic"); err == nil || !strings.Contains(err.Error(), "met a bug") {
		t.Errorf("a panic: %v", err)
	}
	if err := check(who, ""); err != nil {
		t.Errorf("after a panic: %v", err)
	}
	if n := s.Calls(); n > 1 { // the last one may just end
		t.Errorf("%d calls are under way", n)
	}
}

// record keeps what it is told, one line each.
type record struct {
	mu    sync.Mutex // guards lines
	lines []string
	add   chan struct{}
}

func (r *record) note(who trust.Identity, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if who.Session == "" {
		format += ", in no session"
	}
	r.lines = append(r.lines, who.Person+" "+fmt.Sprintf(format, args...))
	r.add <- struct{}{}
}

func (r *record) Login(who trust.Identity) func(error) {
	r.note(who, "in")
	return func(why error) { r.note(who, "out: %v", why) }
}
func (r *record) Refused(who trust.Identity, err error) { r.note(who, "refused: %v", err) }
func (r *record) Called(who trust.Identity, method string, request proto.Message, err error) {
	asked := ""
	if q, ok := request.(*healthpb.HealthCheckRequest); ok {
		asked = q.GetService()
	}
	r.note(who, "%s(%s): %v", path.Base(method), asked, fault.CodeOf(err))
}

// TestRecord: what happens at a door is recorded once, and what its row leaves out
// is not, unless it is refused.
func TestRecord(t *testing.T) {
	r := &record{add: make(chan struct{}, 64)}
	o := options()
	o.Record = r
	s, err := grpcdoor.New(o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	held, revoke := context.WithCancelCause(t.Context())
	for _, c := range []struct {
		who  trust.Identity
		held context.Context
		ask  func(healthpb.HealthClient) error
		want string
	}{
		{trust.Identity{Person: "ada", Door: trust.GRPC}, t.Context(), func(c healthpb.HealthClient) error {
			_, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "x"})
			return err
		}, "ada in, ada Check(x): , ada out: <nil>"},
		{trust.Identity{Person: "ada", Door: trust.GRPC}, t.Context(), func(c healthpb.HealthClient) error {
			_, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "panic"})
			return err
		}, "ada in, ada Check(panic): failed, ada out: <nil>"},
		{trust.Identity{Person: "bob", Door: trust.GRPC}, t.Context(), func(c healthpb.HealthClient) error {
			_, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "x"})
			return err
		}, "bob in, bob Check(x): refused, bob out: <nil>"},
		// Routine, and what records itself.
		{trust.Identity{Person: "eve", Door: trust.GRPC}, t.Context(), func(c healthpb.HealthClient) error {
			_, err := c.List(t.Context(), &healthpb.HealthListRequest{})
			return err
		}, "eve in, eve out: <nil>"},
		{trust.Identity{Person: "eve", Door: trust.GRPC}, t.Context(), func(c healthpb.HealthClient) error {
			w, err := c.Watch(t.Context(), &healthpb.HealthCheckRequest{})
			if err == nil {
				_, err = w.Recv()
			}
			return err
		}, "eve in, eve out: <nil>"},
		// SSH tells of itself, and names its sessions; nobody is no caller.
		{trust.Identity{Person: "ada", Door: trust.SSH, Session: "s"}, t.Context(), func(c healthpb.HealthClient) error {
			_, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{})
			return err
		}, "ada Check(): "},
		{trust.Identity{Door: trust.GRPC}, t.Context(), func(c healthpb.HealthClient) error {
			_, err := c.List(t.Context(), &healthpb.HealthListRequest{})
			return err
		}, " in,  List(): refused,  out: <nil>"},
		{trust.Identity{Person: "bob", Door: trust.GRPC, Kind: trust.Bastion}, t.Context(), func(c healthpb.HealthClient) error {
			_, err := c.List(t.Context(), &healthpb.HealthListRequest{})
			return err
		}, ""},
		{trust.Identity{Person: "ada", Door: trust.GRPC}, held, func(c healthpb.HealthClient) error {
			_, err := c.List(t.Context(), &healthpb.HealthListRequest{})
			revoke(fault.New(fault.Unauthenticated, "", "taken back: %w", trust.ErrRevoked))
			return err
		}, "ada in, ada refused: taken back: " + trust.ErrRevoked.Error() + ", ada out: taken back: " + trust.ErrRevoked.Error()},
	} {
		conn, err := s.Dial(c.who, c.held)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.ask(healthpb.NewHealthClient(conn)) // what is answered is other tests' to look at
		if c.held == held {
			// Else the peer would have hung up, perhaps.
			<-r.add
			<-r.add
			<-r.add
		}
		conn.Close()
		want := []string{}
		if c.want != "" {
			want = strings.Split(c.want, ", ")
		}
		if c.held != held {
			for range want {
				<-r.add
			}
		}
		r.mu.Lock()
		if !slices.Equal(r.lines, want) {
			t.Errorf("%q, want %q", r.lines, want)
		}
		r.lines = nil
		r.mu.Unlock()
	}
}

// once is a listener with one connection.
type once struct {
	net.Listener
	conn chan net.Conn
}

func (o once) Accept() (net.Conn, error) {
	if c, ok := <-o.conn; ok {
		return c, nil
	}
	return nil, io.EOF
}

func (once) Close() error   { return nil }
func (once) Addr() net.Addr { return &net.UnixAddr{} }

// somebody is an authenticated connection.
type somebody struct {
	net.Conn
	held context.Context
}

func (s somebody) Identity() (trust.Identity, error) { return trust.Identity{Person: "ada"}, nil }
func (s somebody) Held() context.Context             { return s.held }

// TestUnknownConnections: what no door has authenticated is not served.
func TestUnknownConnections(t *testing.T) {
	s := open(t)
	near, far := net.Pipe()
	defer near.Close()
	conns := make(chan net.Conn, 1)
	conns <- far
	close(conns)
	if err := s.Serve(once{conn: conns}); err == nil {
		t.Error("a listener without connections goes on")
	}
	_ = near.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := near.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a plain connection is served: %v", err)
	}
	s.Shutdown()
	if s.Stopping().Err() == nil {
		t.Error("a stopped server does not say so")
	}
	if err := s.Hand(somebody{far, t.Context()}); !fault.Is(err, fault.Unreachable) {
		t.Errorf("a connection for a stopped server: %v", err)
	}
	if c, err := s.Dial(trust.Identity{Person: "ada"}, t.Context()); err == nil {
		defer c.Close()
		if _, err := healthpb.NewHealthClient(c).Check(t.Context(), nil); err == nil {
			t.Error("a stopped server answers")
		}
	}
}

// TestClosed: a connection in this process leaves nothing behind, or one client in
// a loop would fill the memory.
func TestClosed(t *testing.T) {
	s := open(t)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	one := func() {
		t.Helper()
		c, err := s.Dial(trust.Identity{Person: "ada"}, t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := healthpb.NewHealthClient(c).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Error(err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	one()
	before := heap()
	const calls = 400 // of 64 KiB each
	for range calls {
		one()
	}
	if left := int64(heap()) - int64(before); left > 8<<20 {
		t.Errorf("%d connections that are closed hold %d KiB", calls, left>>10)
	}
}
