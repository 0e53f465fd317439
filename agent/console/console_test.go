package console

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// scripted is an engine that does what a test says.
type scripted struct {
	plan  func(trust.Identity, *halliganv1.PlanRequest) (*halliganv1.Plan, error)
	apply func(context.Context, func(*halliganv1.Progress)) *halliganv1.Result
	get   func(*structpb.Struct, func(*halliganv1.Object) error) (*halliganv1.GetSummary, error)
}

func (s *scripted) Describe() []*halliganv1.Action { return []*halliganv1.Action{{Name: "scale"}} }

func (s *scripted) Stop(who trust.Identity, id string) error {
	return fault.New(fault.NotFound, "see: halligan history", "%s asked for %s", who.Person, id)
}

func (s *scripted) Status(_ context.Context, who trust.Identity) (*halliganv1.StatusResponse, error) {
	return &halliganv1.StatusResponse{Actor: who.Person, Role: who.Role.String()}, nil
}

func (s *scripted) Plan(_ context.Context, who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
	return s.plan(who, req)
}

func (s *scripted) Apply(ctx context.Context, _ trust.Identity, _, _ string, progress func(*halliganv1.Progress)) *halliganv1.Result {
	return s.apply(ctx, progress)
}

func (s *scripted) Get(_ context.Context, _ trust.Identity, params *structpb.Struct, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
	return s.get(params, send)
}

func (s *scripted) History(_ context.Context, _ trust.Identity, req *halliganv1.HistoryRequest, send func(*halliganv1.HistoryEntry) error) error {
	return send(&halliganv1.HistoryEntry{ActionId: req.GetActionId()})
}

// serve opens the door and returns the socket and a function that ends it.
func serve(t *testing.T, e Engine) (socket string, stop func() error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "console")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "agent", "agent.sock")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, socket, e, zerolog.Nop()) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	for range 500 {
		if st, err := os.Stat(socket); err == nil && st.Mode().Perm() == 0o600 {
			return socket, stop
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the socket did not appear")
	return "", nil
}

func dial(t *testing.T, socket string, options ...grpc.DialOption) halliganv1.AgentClient {
	t.Helper()
	return halliganv1.NewAgentClient(connect(t, socket, options...))
}

func connect(t *testing.T, socket string, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	c, err := grpc.NewClient("unix://"+socket, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestCalls(t *testing.T) {
	var planned *halliganv1.PlanRequest
	var by trust.Identity
	e := &scripted{
		plan: func(who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
			by, planned = who, req
			if req.GetAction() == "scale" {
				return nil, fault.New(fault.Refused, "ask a commander", "no")
			}
			return &halliganv1.Plan{Id: "p"}, nil
		},
		apply: func(_ context.Context, progress func(*halliganv1.Progress)) *halliganv1.Result {
			for i := range int64(1000) {
				progress(&halliganv1.Progress{Done: i})
			}
			return &halliganv1.Result{Result: "applied"}
		},
		get: func(_ *structpb.Struct, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
			return &halliganv1.GetSummary{Objects: 1}, send(&halliganv1.Object{Name: "web"})
		},
	}
	socket, stop := serve(t, e)
	c, ctx := dial(t, socket), t.Context()

	d, err := c.Describe(ctx, nil)
	if err != nil || d.GetVersion() == "" || d.GetActions()[0].GetName() != "scale" {
		t.Errorf("Describe: %v, %v", d, err)
	}
	s, err := c.Status(ctx, &halliganv1.StatusRequest{})
	if err != nil || !strings.HasPrefix(s.GetActor(), "console/") || s.GetRole() != "responder" {
		t.Errorf("Status: %v, %v", s, err)
	}
	_, err = c.Plan(ctx, &halliganv1.PlanRequest{Action: "scale"})
	if f := api.FromStatus(err); f == nil || f.Code != fault.Refused || f.Next != "ask a commander" || status.Code(err) != codes.PermissionDenied {
		t.Errorf("Plan: %v", err)
	}
	p, err := c.Undo(ctx, &halliganv1.UndoRequest{ActionId: "7", Reason: "r", Incident: "i"})
	if err != nil || p.GetId() != "p" || by.Door != "console" || planned.GetAction() != "undo" || planned.GetReason() != "r" ||
		planned.GetIncident() != "i" || planned.GetParameters().GetFields()["action"].GetStringValue() != "7" {
		t.Errorf("Undo: %v, %v, asked for %v by %v", p, err, planned, by)
	}
	apply, err := c.Apply(ctx, &halliganv1.ApplyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	last := int64(-1)
	var result *halliganv1.Result
	for {
		event, err := apply.Recv()
		if err == io.EOF {
			break
		}
		if err != nil || result != nil {
			t.Fatalf("after the result %v: %v, %v", result, event, err)
		}
		if p := event.GetProgress(); p != nil && p.GetDone() <= last {
			t.Errorf("progress %d after %d", p.GetDone(), last)
		} else if p != nil {
			last = p.GetDone()
		}
		result = event.GetResult()
	}
	if result.GetResult() != "applied" || last != 999 {
		t.Errorf("Apply ended with %v, last progress %d", result, last)
	}
	get, err := c.Get(ctx, &halliganv1.GetRequest{})
	if err != nil {
		t.Fatal(err)
	}
	object, err := get.Recv()
	summary, err2 := get.Recv()
	if err != nil || err2 != nil || object.GetObjects()[0].GetName() != "web" || summary.GetSummary().GetObjects() != 1 {
		t.Errorf("Get: %v, %v, %v, %v", object, err, summary, err2)
	}
	history, err := c.History(ctx, &halliganv1.HistoryRequest{ActionId: "9"})
	if err != nil {
		t.Fatal(err)
	}
	if entry, err := history.Recv(); err != nil || entry.GetActionId() != "9" {
		t.Errorf("History: %v, %v", entry, err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestPanicEndsOneCallOnly(t *testing.T) {
	e := &scripted{
		plan:  func(trust.Identity, *halliganv1.PlanRequest) (*halliganv1.Plan, error) { panic("plan") },
		apply: func(context.Context, func(*halliganv1.Progress)) *halliganv1.Result { panic("apply") },
		get:   func(*structpb.Struct, func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) { panic("get") },
	}
	socket, _ := serve(t, e)
	c := dial(t, socket)
	_, err := c.Plan(t.Context(), &halliganv1.PlanRequest{})
	if f := api.FromStatus(err); f == nil || f.Code != fault.Failed || f.Next == "" {
		t.Errorf("Plan: %v", err)
	}
	get, err := c.Get(t.Context(), &halliganv1.GetRequest{})
	if err == nil {
		_, err = get.Recv()
	}
	if f := api.FromStatus(err); f == nil || f.Code != fault.Failed {
		t.Errorf("Get: %v", err)
	}
	// What a panicking action wrote is not known, and the caller must hear that.
	apply, err := c.Apply(t.Context(), &halliganv1.ApplyRequest{PlanId: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if event, err := apply.Recv(); err != nil || event.GetResult().GetResult() != "unknown" || event.GetResult().GetAction() != "p" || event.GetResult().GetError().GetCode() != "failed" {
		t.Errorf("Apply: %v, %v", event, err)
	}
	if _, err := c.Status(t.Context(), &halliganv1.StatusRequest{}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestApplyOutlivesTheCallerButNotTheAgent(t *testing.T) {
	started, ended := make(chan struct{}), make(chan error, 1)
	step := make(chan struct{})
	e := &scripted{apply: func(ctx context.Context, progress func(*halliganv1.Progress)) *halliganv1.Result {
		close(started)
		<-step
		for range 100 {
			progress(&halliganv1.Progress{}) // nobody listens
		}
		ended <- ctx.Err()
		<-ctx.Done()
		ended <- ctx.Err()
		return &halliganv1.Result{}
	}}
	socket, stop := serve(t, e)
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := dial(t, socket).Apply(ctx, &halliganv1.ApplyRequest{}); err != nil {
		t.Fatal(err)
	}
	<-started
	cancel()
	close(step)
	if err := <-ended; err != nil {
		t.Errorf("the action ended with its caller: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the action was not told of the stop: %v", err)
	}
}

func TestSocketIsPrivateAndSingle(t *testing.T) {
	socket, stop := serve(t, &scripted{})
	if st, err := os.Stat(filepath.Dir(socket)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v", st.Mode(), err)
	}
	err := Serve(t.Context(), socket, &scripted{}, zerolog.Nop())
	if err == nil || !strings.Contains(err.Error(), "another agent is listening") {
		t.Errorf("a second agent: %v", err)
	}
	if _, err := dial(t, socket).Status(t.Context(), &halliganv1.StatusRequest{}); err != nil {
		t.Errorf("the first agent after that: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	// What a killed agent leaves.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if _, _, err := listen(socket); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a live listener without the lock: %v", err)
	}
	l.Close()
	again, unlock, err := listen(socket)
	if err != nil {
		t.Fatalf("a dead agent's socket: %v", err)
	}
	again.Close()
	unlock()

	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := listen(socket); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file in the way: %v", err)
	}
	if err := os.Chmod(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, _, err := listen(socket); err == nil || !strings.Contains(err.Error(), "0755") {
		t.Errorf("a folder open to others: %v", err)
	}
	if _, _, err := listen(strings.Repeat("/x", 60)); !fault.Is(err, fault.Usage) {
		t.Errorf("a long path: %v", err)
	}
}

func TestAdmit(t *testing.T) {
	says := func(text string) func() (string, error) {
		return func() (string, error) { return text, nil }
	}
	for _, c := range []struct {
		uid, own uint32
		login    func() (string, error)
		person   string
	}{
		{0, 0, says("1000"), "console/1000"},
		{0, 0, says("1000\n"), "console/1000"},
		{0, 0, says("4294967295"), "console/0"},
		{0, 0, says("nonsense"), "console/0"},
		{0, 0, func() (string, error) { return "", os.ErrNotExist }, "console/0"},
		{0, 990, says("0"), "console/0"},
		{990, 990, says("4294967295"), "console/990"},
		{1000, 0, says("1000"), ""},
		{1000, 990, says("0"), ""},
	} {
		who, err := admit(c.uid, c.own, c.login)
		if c.person == "" {
			if !fault.Is(err, fault.Unauthenticated) || who.Role != trust.None {
				t.Errorf("uid %d, agent %d: %v, %v", c.uid, c.own, who, err)
			}
			continue
		}
		if want := (trust.Identity{Person: c.person, Role: trust.Responder, Door: "console"}); err != nil || who != want {
			t.Errorf("uid %d, agent %d: %v, %v, want %v", c.uid, c.own, who, err, want)
		}
	}
}

// asNobody runs f with another effective uid. The thread is thrown away.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to become somebody else")
	}
	var done sync.WaitGroup
	done.Go(func() {
		runtime.LockOSThread() // and never unlock
		const keep, nobody = ^uintptr(0), 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, nobody, keep); errno != 0 {
			t.Errorf("setresuid: %v", errno)
			return
		}
		f()
	})
	done.Wait()
}

func TestStrangersAreRefusedAndTakeNobodysPlace(t *testing.T) {
	socket, _ := serve(t, &scripted{})
	// Even where the file modes fail to keep strangers out.
	for path, mode := range map[string]os.FileMode{filepath.Dir(filepath.Dir(socket)): 0o755, filepath.Dir(socket): 0o755, socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	var stranger net.Conn
	asNobody(t, func() {
		var err error
		if stranger, err = net.Dial("unix", socket); err != nil {
			t.Error(err)
		}
		for range maxConnections {
			c, err := net.Dial("unix", socket)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	})
	if stranger == nil {
		return
	}
	c := dial(t, socket, grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return stranger, nil }))
	_, err := c.Describe(t.Context(), &halliganv1.DescribeRequest{})
	if f := api.FromStatus(err); f == nil || f.Code != fault.Unauthenticated || !strings.Contains(f.Message, "65534") {
		t.Errorf("a unary call of a stranger: %v", err)
	}
	history, err := c.History(t.Context(), &halliganv1.HistoryRequest{})
	if err == nil {
		_, err = history.Recv()
	}
	if f := api.FromStatus(err); f == nil || f.Code != fault.Unauthenticated {
		t.Errorf("a stream of a stranger: %v", err)
	}
	if _, err := dial(t, socket).Status(t.Context(), &halliganv1.StatusRequest{}); err != nil {
		t.Errorf("root, with strangers at the door: %v", err)
	}
}

func TestEveryMethodHasARow(t *testing.T) {
	for _, m := range halliganv1.Agent_ServiceDesc.Methods {
		if methods["/"+halliganv1.Agent_ServiceDesc.ServiceName+"/"+m.MethodName] == trust.None {
			t.Errorf("%s has no row", m.MethodName)
		}
	}
	for _, s := range halliganv1.Agent_ServiceDesc.Streams {
		if methods["/"+halliganv1.Agent_ServiceDesc.ServiceName+"/"+s.StreamName] == trust.None {
			t.Errorf("%s has no row", s.StreamName)
		}
	}
	added := map[string]grpc.ServiceInfo{"halligan.v1.Agent": {Methods: []grpc.MethodInfo{{Name: "Reboot"}}}}
	if err := checkMethods(added); err == nil || !strings.Contains(err.Error(), "/halligan.v1.Agent/Reboot") {
		t.Errorf("a method without a row: %v", err)
	}
}

func TestReflection(t *testing.T) {
	socket, _ := serve(t, &scripted{})
	stream, err := reflectionpb.NewServerReflectionClient(connect(t, socket)).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "halligan.v1.Agent"}}
	if err := stream.Send(ask); err != nil {
		t.Fatal(err)
	}
	if answer, err := stream.Recv(); err != nil || len(answer.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("%v, %v", answer, err)
	}
}
