package door

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// scripted is an engine that does what a test says.
type scripted struct {
	plan  func(trust.Identity, *halliganv1.PlanRequest) (*halliganv1.Plan, error)
	apply func(context.Context, func(*halliganv1.Progress)) *halliganv1.Result
	get   func(*halliganv1.GetRequest, func(*halliganv1.Object) error) (*halliganv1.GetSummary, error)
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

func (s *scripted) Undo(ctx context.Context, who trust.Identity, req *halliganv1.UndoRequest) (*halliganv1.Plan, error) {
	return s.Plan(ctx, who, &halliganv1.PlanRequest{Action: "undo", Reason: req.GetReason(), Incident: req.GetIncident(),
		Parameters: &structpb.Struct{Fields: map[string]*structpb.Value{"action": structpb.NewStringValue(req.GetActionId())}}})
}

func (s *scripted) ShowPlan(_ context.Context, who trust.Identity, id string) (*halliganv1.Plan, error) {
	return &halliganv1.Plan{Id: id, Actor: who.Person}, nil
}

func (s *scripted) Apply(ctx context.Context, _ trust.Identity, _ *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) *halliganv1.Result {
	return s.apply(ctx, progress)
}

func (s *scripted) Get(_ context.Context, _ trust.Identity, params *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
	return s.get(params, send)
}

func (s *scripted) History(_ context.Context, _ trust.Identity, req *halliganv1.HistoryRequest, send func(*halliganv1.HistoryEntry) error) error {
	return send(&halliganv1.HistoryEntry{ActionId: req.GetActionId()})
}

// heard are alarms.
type heard struct {
	mu     sync.Mutex // guards events
	events []alarm.Event
}

func (h *heard) Raise(e alarm.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, e)
}

// of returns the texts of one kind.
func (h *heard) of(kind alarm.Kind) (texts []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.events {
		if e.Kind == kind {
			texts = append(texts, e.Person+": "+e.Text)
		}
	}
	return texts
}

// open returns a server over the engine, which ends with the test.
func open(t *testing.T, e Engine) (*Server, *heard) {
	t.Helper()
	h := &heard{}
	s, err := New(Options{Engine: e, Alarms: h, Cluster: "prod", Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s, h
}

var alice = trust.Identity{Person: "alice", Role: trust.Responder, Door: trust.SSH, Kind: trust.Person, Fingerprint: "SHA256:a", Serial: "7", Source: "10.0.0.9:5000"}

// dial comes in as somebody.
func dial(t *testing.T, s *Server, who trust.Identity, held context.Context) halliganv1.AgentClient {
	t.Helper()
	return halliganv1.NewAgentClient(connect(t, s, who, held))
}

func connect(t *testing.T, s *Server, who trust.Identity, held context.Context) *grpc.ClientConn {
	t.Helper()
	c, err := s.Dial(who, held)
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
		get: func(_ *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
			return &halliganv1.GetSummary{Objects: 1}, send(&halliganv1.Object{Name: "web"})
		},
	}
	server, h := open(t, e)
	c, ctx := dial(t, server, alice, t.Context()), t.Context()

	d, err := c.Describe(ctx, nil)
	if err != nil || d.GetVersion() == "" || d.GetActions()[0].GetName() != "scale" {
		t.Errorf("Describe: %v, %v", d, err)
	}
	s, err := c.Status(ctx, &halliganv1.StatusRequest{})
	if err != nil || s.GetActor() != "alice" || s.GetRole() != "responder" || s.GetDoor() != "ssh" || s.GetCluster() != "prod" || s.GetCredentialExpires() != nil {
		t.Errorf("Status: %v, %v", s, err)
	}
	_, err = c.Plan(ctx, &halliganv1.PlanRequest{Action: "scale"})
	if f := api.FromStatus(err); f == nil || f.Code != fault.Refused || f.Next != "ask a commander" || status.Code(err) != codes.PermissionDenied {
		t.Errorf("Plan: %v", err)
	}
	p, err := c.Undo(ctx, &halliganv1.UndoRequest{ActionId: "7", Reason: "r", Incident: "i"})
	if err != nil || p.GetId() != "p" || by.Door != trust.SSH || planned.GetAction() != "undo" || planned.GetReason() != "r" ||
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
	if p, err := c.ShowPlan(ctx, &halliganv1.ShowPlanRequest{PlanId: "x"}); err != nil || p.GetId() != "x" {
		t.Errorf("ShowPlan: %v, %v", p, err)
	}
	if _, err := c.ExchangeBundle(ctx, &halliganv1.ExchangeBundleRequest{}); fault.CodeOf(api.FromStatus(err)) != fault.Usage {
		t.Errorf("ExchangeBundle without a bundle: %v", err)
	}
	if got := h.of(alarm.Refusal); len(got) != 1 || got[0] != "alice: no" {
		t.Errorf("refusals told: %q", got)
	}
}

func TestPanicEndsOneCallOnly(t *testing.T) {
	e := &scripted{
		plan:  func(trust.Identity, *halliganv1.PlanRequest) (*halliganv1.Plan, error) { panic("plan") },
		apply: func(context.Context, func(*halliganv1.Progress)) *halliganv1.Result { panic("apply") },
		get: func(*halliganv1.GetRequest, func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
			panic("get")
		},
	}
	server, _ := open(t, e)
	c := dial(t, server, alice, t.Context())
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
	server, _ := open(t, e)
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := dial(t, server, alice, t.Context()).Apply(ctx, &halliganv1.ApplyRequest{}); err != nil {
		t.Fatal(err)
	}
	<-started
	cancel()
	close(step)
	if err := <-ended; err != nil {
		t.Errorf("the action ended with its caller: %v", err)
	}
	server.Shutdown()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the action was not told of the stop: %v", err)
	}
}

func TestReflection(t *testing.T) {
	server, _ := open(t, &scripted{})
	stream, err := reflectionpb.NewServerReflectionClient(connect(t, server, alice, t.Context())).ServerReflectionInfo(t.Context())
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

// TestRoles: every method, for every role, at every door.
func TestRoles(t *testing.T) {
	allowed := map[string]string{ // the least role, and approver where it may too
		"Describe": "observer approver", "Status": "observer approver", "Plan": "observer", "Undo": "observer", "Apply": "responder", "ShowPlan": "observer approver",
		"ExchangeBundle": "observer approver", "Stop": "responder", "Get": "observer", "History": "observer", "Top": "observer", "Logs": "responder", "ServerReflectionInfo": "observer approver",
		"ListLogs": "observer", "ReadLog": "observer", "ReadRecording": "commander", "ReadSealed": "responder", "Witness": "none",
	}
	for method := range methods {
		words := strings.Fields(allowed[method[strings.LastIndexByte(method, '/')+1:]])
		if len(words) == 0 {
			t.Errorf("%s has no row in this test", method)
			continue
		}
		least, err := trust.ParseRole(words[0])
		if err != nil && words[0] != "none" { // which nobody has
			t.Fatal(err)
		}
		for _, role := range append(trust.Roles(), trust.None) {
			for _, d := range []trust.Door{trust.Console, trust.SSH, trust.GRPC} {
				want := role.Has(least) || role == trust.Approver && slices.Contains(words, "approver")
				who := trust.Identity{Person: "p", Role: role, Door: d}
				if got := methods[method].has(who); got != want {
					t.Errorf("%s as %s at %s: %v, want %v", method, role, d, got, want)
				}
				if who.Person = ""; methods[method].has(who) {
					t.Errorf("%s as nobody with the role %s", method, role)
				}
			}
		}
	}
}

// TestApprover reads plans, and nothing else, over the wire too.
func TestApprover(t *testing.T) {
	server, h := open(t, &scripted{})
	bob := trust.Identity{Person: "bob", Role: trust.Approver, Door: trust.GRPC, Kind: trust.Person}
	c := dial(t, server, bob, t.Context())
	if p, err := c.ShowPlan(t.Context(), &halliganv1.ShowPlanRequest{PlanId: "x"}); err != nil || p.GetActor() != "bob" {
		t.Errorf("ShowPlan: %v, %v", p, err)
	}
	if _, err := c.Plan(t.Context(), &halliganv1.PlanRequest{}); fault.CodeOf(api.FromStatus(err)) != fault.Refused {
		t.Errorf("Plan: %v", err)
	}
	apply, err := c.Apply(t.Context(), &halliganv1.ApplyRequest{})
	if err == nil {
		_, err = apply.Recv()
	}
	if fault.CodeOf(api.FromStatus(err)) != fault.Refused {
		t.Errorf("Apply: %v", err)
	}
	if got := h.of(alarm.Refusal); len(got) != 2 || !strings.Contains(got[0], "approver may not call") {
		t.Errorf("refusals told: %q", got)
	}
	if got := h.of(alarm.Login); len(got) != 1 {
		t.Errorf("logins told: %q", got)
	}
}

// TestHeld: whatever is under way ends when the identity does, and says why.
func TestHeld(t *testing.T) {
	for _, c := range []struct {
		name  string
		cause error
		stops bool // an action under way
	}{
		{"revoked", fault.New(fault.Unauthenticated, "", "the credential of alice: %w", trust.ErrRevoked), true},
		{"lapsed", fault.New(fault.Unauthenticated, "renew it", "the credential of alice ended"), false},
		{"hung up", context.Canceled, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			applying, getting := make(chan context.Context, 1), make(chan struct{})
			finish := make(chan struct{})
			server, h := open(t, &scripted{
				apply: func(ctx context.Context, _ func(*halliganv1.Progress)) *halliganv1.Result {
					applying <- ctx
					select {
					case <-ctx.Done():
					case <-finish:
					}
					return &halliganv1.Result{}
				},
				get: func(_ *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
					close(getting)
					for {
						if err := send(&halliganv1.Object{Json: strings.Repeat("x", batchBytes)}); err != nil {
							return nil, err
						}
						time.Sleep(time.Millisecond)
					}
				},
			})
			held, end := context.WithCancelCause(t.Context())
			client := dial(t, server, alice, held)
			if _, err := client.Apply(t.Context(), &halliganv1.ApplyRequest{}); err != nil {
				t.Fatal(err)
			}
			get, err := client.Get(t.Context(), &halliganv1.GetRequest{})
			if err != nil {
				t.Fatal(err)
			}
			action := <-applying
			<-getting
			end(c.cause)
			for err == nil {
				_, err = get.Recv()
			}
			if code := fault.CodeOf(api.FromStatus(err)); code != fault.CodeOf(c.cause) && code != fault.Unreachable {
				t.Errorf("a read under way ended with %v", err)
			}
			if c.stops {
				<-action.Done()
				if !errors.Is(context.Cause(action), trust.ErrRevoked) {
					t.Errorf("the action was stopped for %v", context.Cause(action))
				}
			} else if action.Err() != nil {
				t.Errorf("the action was stopped: %v", context.Cause(action))
			}
			close(finish)
			if n := len(h.of(alarm.Refusal)); (n > 0) != c.stops {
				t.Errorf("%d refusals told", n)
			}
			_, err = client.Status(t.Context(), &halliganv1.StatusRequest{})
			if err == nil {
				t.Error("a call afterwards is answered")
			}
		})
	}
}

// TestRefusedAction: a refusal in the result is told like one of a call.
func TestRefusedAction(t *testing.T) {
	server, h := open(t, &scripted{apply: func(context.Context, func(*halliganv1.Progress)) *halliganv1.Result {
		return &halliganv1.Result{Result: "refused", Error: &halliganv1.Error{Code: "refused", Message: "no"}}
	}})
	apply, err := dial(t, server, alice, t.Context()).Apply(t.Context(), &halliganv1.ApplyRequest{PlanId: "p"})
	if err == nil {
		_, err = apply.Recv()
	}
	if got := h.of(alarm.Refusal); err != nil || len(got) != 1 || got[0] != "alice: applying p: no" {
		t.Errorf("refusals told: %q; %v", got, err)
	}
}

// bundles is a store with one version, which takes what begins with "new".
type bundles struct {
	mu  sync.Mutex // guards raw
	raw string
}

func (b *bundles) Offer(data []byte) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case strings.HasPrefix(string(data), "bad"):
		return false, fault.New(fault.Refused, "", "not signed")
	case strings.HasPrefix(string(data), "new"):
		b.raw = string(data)
		return true, nil
	}
	return false, nil
}

func (b *bundles) Raw() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return []byte(b.raw)
}

func (b *bundles) Status() *halliganv1.BundleStatus {
	return &halliganv1.BundleStatus{PolicyVersion: uint64(len(b.Raw()))}
}

func TestExchangeBundle(t *testing.T) {
	h := &heard{}
	server, err := New(Options{Engine: &scripted{}, Alarms: h, Bundles: &bundles{raw: "own"}, Log: zerolog.Nop(),
		Warnings: func() []string { return []string{"the bundle is stale"} }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Shutdown)
	late := alice
	late.Late, late.NotAfter = true, time.Unix(1e9, 0)
	c := dial(t, server, late, t.Context())
	for _, step := range []struct{ offer, back, refused string }{
		{"", "own", ""}, {"own", "", ""}, {"old", "own", ""}, {"bad", "own", "not signed"}, {"newer", "", ""}, {"own", "newer", ""},
	} {
		got, err := c.ExchangeBundle(t.Context(), &halliganv1.ExchangeBundleRequest{Bundle: []byte(step.offer)})
		if err != nil || string(got.GetBundle()) != step.back || got.GetRefused().GetMessage() != step.refused || got.GetStatus().GetPolicyVersion() == 0 {
			t.Errorf("%q: %v, %v", step.offer, got, err)
		}
	}
	if got := h.of(alarm.Refusal); len(got) != 1 || got[0] != "alice: the bundle that was brought: not signed" {
		t.Errorf("refusals told: %q", got)
	}
	st, err := c.Status(t.Context(), &halliganv1.StatusRequest{})
	if err != nil || len(st.GetWarnings()) != 2 || !strings.Contains(st.GetWarnings()[0], "past an edge") || st.GetWarnings()[1] != "the bundle is stale" ||
		st.GetBundle().GetPolicyVersion() != 5 || st.GetCredentialExpires().AsTime().Unix() != 1e9 {
		t.Errorf("status: %v, %v", st, err)
	}
	big := &halliganv1.ExchangeBundleRequest{Bundle: make([]byte, 2<<20)}
	if _, err := c.ExchangeBundle(t.Context(), big); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a bundle of 2 MiB: %v", err)
	}
}

// TestBusy: one person's calls have an end, and others still get through.
func TestBusy(t *testing.T) {
	started, finish := make(chan struct{}), make(chan struct{})
	server, _ := open(t, &scripted{plan: func(trust.Identity, *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
		started <- struct{}{}
		<-finish
		return &halliganv1.Plan{}, nil
	}})
	c := dial(t, server, alice, t.Context())
	var calls sync.WaitGroup
	for range grpcdoor.MaxCallsEach {
		calls.Go(func() {
			if _, err := dial(t, server, alice, t.Context()).Plan(t.Context(), &halliganv1.PlanRequest{}); err != nil {
				t.Error(err)
			}
		})
		<-started
	}
	if _, err := c.Status(t.Context(), &halliganv1.StatusRequest{}); fault.CodeOf(api.FromStatus(err)) != fault.Unreachable {
		t.Errorf("one call too many: %v", err)
	}
	carol := alice
	carol.Person = "carol"
	if _, err := dial(t, server, carol, t.Context()).Status(t.Context(), &halliganv1.StatusRequest{}); err != nil {
		t.Errorf("somebody else: %v", err)
	}
	close(finish)
	calls.Wait()
}

// TestUnfinishedRequests: a request that has not come yet takes its caller's
// place already, so that one person cannot fill the memory with many.
func TestUnfinishedRequests(t *testing.T) {
	server, h := open(t, &scripted{})
	desc := &grpc.StreamDesc{StreamName: "ExchangeBundle", ClientStreams: true}
	begin := func(c *grpc.ClientConn) grpc.ClientStream {
		stream, err := c.NewStream(t.Context(), desc, halliganv1.Agent_ExchangeBundle_FullMethodName)
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	first, another := connect(t, server, alice, t.Context()), connect(t, server, alice, t.Context())
	var open []grpc.ClientStream
	for range grpcdoor.MaxCallsEach / 2 {
		open = append(open, begin(first), begin(another))
	}
	eventually(t, "all places to be taken", func() bool { return server.Calls() == grpcdoor.MaxCallsEach })
	remote := alice
	remote.Door = trust.GRPC
	second := connect(t, server, remote, t.Context())
	if err := begin(second).RecvMsg(&halliganv1.ExchangeBundleResponse{}); fault.CodeOf(api.FromStatus(err)) != fault.Unreachable {
		t.Errorf("one request too many: %v", err)
	}
	carol := alice
	carol.Person = "carol"
	if _, err := dial(t, server, carol, t.Context()).Status(t.Context(), &halliganv1.StatusRequest{}); err != nil {
		t.Errorf("somebody else: %v", err)
	}
	for _, stream := range open {
		_ = stream.CloseSend() // without a request: refused, and the place is free
	}
	eventually(t, "the places to be free", func() bool { return server.Calls() == 0 })

	// Who goes on all the same is hung up on.
	for range grpcdoor.MaxCallsEach / 2 {
		begin(first)
		begin(another)
	}
	eventually(t, "all places to be taken again", func() bool { return server.Calls() == grpcdoor.MaxCallsEach })
	client := halliganv1.NewAgentClient(second)
	for calls := 0; len(h.of(alarm.Login)) < 2; calls++ { // until the client had to come in again
		if _, err := client.Status(t.Context(), &halliganv1.StatusRequest{}); err == nil || calls > 2000 {
			t.Fatalf("after %d calls: %v", calls, err)
		}
	}
}

// TestGoneCaller: an action that goes on without its caller still counts.
func TestGoneCaller(t *testing.T) {
	began, finish := make(chan struct{}), make(chan struct{})
	server, _ := open(t, &scripted{apply: func(context.Context, func(*halliganv1.Progress)) *halliganv1.Result {
		close(began)
		<-finish
		return &halliganv1.Result{}
	}})
	ctx, leave := context.WithCancel(t.Context())
	conn := connect(t, server, alice, t.Context())
	if _, err := halliganv1.NewAgentClient(conn).Apply(ctx, &halliganv1.ApplyRequest{}); err != nil {
		t.Fatal(err)
	}
	<-began
	leave()
	conn.Close()
	time.Sleep(50 * time.Millisecond) // for the server to notice; too short a time hides a fault, and makes none
	if n := server.Calls(); n != 1 {
		t.Errorf("%d calls are counted while an action goes on", n)
	}
	close(finish)
	eventually(t, "the place to be free", func() bool { return server.Calls() == 0 })
}

// eventually waits for what happens by itself.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			t.Fatal("waited too long for " + what)
		}
	}
}
