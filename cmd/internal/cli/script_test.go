package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/rs/zerolog"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/agent/console"
	"github.com/halligan-io/halligan/agent/door"
	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/bastion/store"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/trust/testfleet"
)

func TestMain(m *testing.M) {
	store.Child()
	if be := map[string]func() error{"agent": beAgent, "bastion": beBastion}[os.Getenv("CLI_TEST_AS")]; be != nil {
		if err := be(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testscript.Main(m, map[string]func(){"halligan": func() { os.Exit(process(2 * time.Second)) }})
}

// TestScripts runs the real command against a real console, behind which an
// engine plays the outcome that the target's name asks for.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("HALLIGAN_UPDATE") != "",
		Setup: func(env *testscript.Env) error {
			s, err := startStage()
			if err != nil {
				return err
			}
			env.Defer(s.stop)
			env.Values["stage"] = s
			env.Setenv("HALLIGAN_SOCKET", s.socket)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits,
			// applications compares how often the engine was asked to apply.
			"applications": func(ts *testscript.TestScript, _ bool, args []string) {
				s := ts.Value("stage").(*stage)
				s.mu.Lock()
				defer s.mu.Unlock()
				if strconv.Itoa(s.applied) != args[0] {
					ts.Fatalf("the engine was asked to apply %d times, want %s", s.applied, args[0])
				}
			},
			// applying waits until the engine has begun to apply.
			"applying": func(ts *testscript.TestScript, _ bool, _ []string) { <-ts.Value("stage").(*stage).begun },
			// stopagent ends the agent.
			"stopagent": func(ts *testscript.TestScript, _ bool, _ []string) { ts.Value("stage").(*stage).stop() },
		},
	})
}

// exits runs a command that must end with the exit status.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	status := "0"
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("running %v: %v", args[1:], err)
		}
		status = strconv.Itoa(exit.ExitCode())
	}
	if status != args[0] {
		ts.Fatalf("exit status %s, want %s", status, args[0])
	}
}

// stage is a playing engine behind doors, which stand behind relays that can be
// cut.
type stage struct {
	node   string
	socket string
	begun  chan struct{} // told of each blocking application
	halt   chan struct{} // closed when the application that can be stopped is
	once   sync.Once     // for halt
	stop   func()
	// approvers verifies approvals; nil: none is asked for.
	approvers func(tokens []string, p *halliganv1.Plan, who trust.Identity) error

	mu         sync.Mutex // guards all below
	live       map[net.Conn]bool
	plans      map[string]*halliganv1.Plan
	entries    []*halliganv1.HistoryEntry
	applied    int
	torn       int // how often that kind was asked for
	leaderless bool
}

func newStage(node string) *stage {
	return &stage{node: node, begun: make(chan struct{}, 1), halt: make(chan struct{}), live: map[net.Conn]bool{}, plans: map[string]*halliganv1.Plan{}}
}

// deaf hears no alarm.
type deaf struct{}

func (deaf) Raise(alarm.Event) {}

// startStage opens a console.
func startStage() (*stage, error) {
	dir, err := os.MkdirTemp("", "cli")
	if err != nil {
		return nil, err
	}
	s := newStage("cp-1")
	s.socket = filepath.Join(dir, "relay.sock")
	inner := filepath.Join(dir, "agent", "agent.sock")
	l, err := console.Listen(inner)
	if err != nil {
		return nil, err
	}
	server, err := door.New(door.Options{Engine: s, Alarms: deaf{}, Log: zerolog.Nop()})
	if err != nil {
		return nil, err
	}
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	relay, err := net.Listen("unix", s.socket)
	if err != nil {
		server.Shutdown()
		return nil, err
	}
	running.Go(func() { s.relay(relay, "unix", inner) })
	s.stop = sync.OnceFunc(func() {
		server.Shutdown()
		relay.Close()
		s.cut()
		running.Wait()
		os.RemoveAll(dir)
	})
	return s, nil
}

func (s *stage) relay(l net.Listener, network, inner string) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial(network, inner)
		if err != nil {
			near.Close()
			continue
		}
		s.mu.Lock()
		s.live[near], s.live[far] = true, true
		s.mu.Unlock()
		for _, pair := range [][2]net.Conn{{near, far}, {far, near}} {
			go func() { // ends when either is closed
				_, _ = io.Copy(pair[0], pair[1])
				pair[0].Close()
				pair[1].Close()
			}()
		}
	}
}

// goOn ends the application that can be stopped.
func (s *stage) goOn() { s.once.Do(func() { close(s.halt) }) }

// cut breaks every connection.
func (s *stage) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.live {
		c.Close()
		delete(s.live, c)
	}
}

const evil = "\x1b]0;owned\a\u202eevil\nline"

func (s *stage) Describe() []*halliganv1.Action {
	known, err := api.Actions()
	if err != nil {
		panic(err)
	}
	return append(known, &halliganv1.Action{Name: "quench", Summary: "Of a later release", Effect: "mutate",
		Parameters: []*halliganv1.Parameter{{Name: "target", Type: "string", Positional: true, Required: true, Placeholder: "KIND/NAME"},
			{Name: "veryHard", Type: "bool"}}})
}

func (s *stage) Status(_ context.Context, who trust.Identity) (*halliganv1.StatusResponse, error) {
	actor, now := "console/1000", moment0
	if who.Door != trust.Console {
		actor, now = who.Person, time.Now()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaderless {
		return &halliganv1.StatusResponse{Node: s.node, Version: "v0.1.0", Time: timestamppb.New(now), Actor: actor, Role: who.Role.String(), ReadOnly: "etcd has no leader",
			Etcd: &halliganv1.EtcdStatus{Endpoint: "https://127.0.0.1:2379", Version: "3.7.3", MemberId: "ab", Error: "no leader"}}, nil
	}
	return &halliganv1.StatusResponse{Node: s.node, Version: "v0.1.0", Time: timestamppb.New(now), Actor: actor, Role: who.Role.String(),
		Distribution: "kubeadm", StateFreeBytes: 5 << 30, StateUsedBytes: 1500, Encryption: map[string]string{"secrets": "aesgcm"},
		Etcd: &halliganv1.EtcdStatus{Endpoint: "https://127.0.0.1:2379", Version: "3.7.3", MemberId: "ab", LeaderId: "cd", Revision: 42,
			DbSizeBytes: 25 << 20, DbQuotaBytes: 2 << 30, Quorum: true, LatencyMs: 0.5}}, nil
}

var moment0 = time.Date(2026, 11, 23, 2, 3, 4, 0, time.UTC)

func (s *stage) Plan(_ context.Context, who trust.Identity, req *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
	target := req.GetParameters().GetFields()["target"].GetStringValue()
	_, play, _ := strings.Cut(target, "/")
	if play == "refused" {
		return nil, fault.New(fault.Refused, "choose another", "kube-system is protected")
	}
	if play == "missing" {
		return nil, fault.New(fault.NotFound, "see: halligan get deployments", "no deployment %s", play)
	}
	actor := "console/1000"
	if who.Door != trust.Console {
		actor = who.Person
	}
	p := &halliganv1.Plan{
		Id: "id-" + play, Action: req.GetAction(), Parameters: req.GetParameters(), Actor: actor, Role: "responder", Node: s.node, Cluster: "c0ffee",
		Reason: req.GetReason(), Incident: req.GetIncident(), Via: "etcd", ViaReason: "the only way that this agent has", Revision: 41,
		Summary: req.GetAction() + " " + target, Created: timestamppb.New(moment0), Expires: timestamppb.New(moment0.Add(10 * time.Minute)),
		Bypassed: []string{"admission"}, Needs: []string{"kube-controller-manager"},
	}
	n := 1
	switch play {
	case "many":
		n = 25
	case "nothing":
		n = 0
	}
	for i := range n {
		p.Objects = append(p.Objects, &halliganv1.PlannedObject{Key: fmt.Sprintf("/registry/deployments/shop/%s-%d", play, i), Resource: "deployments.apps",
			Namespace: "shop", Name: fmt.Sprintf("%s-%d", play, i), Uid: fmt.Sprintf("uid-%d", i), Revision: int64(7 + i), Operation: "update",
			Changes: []*halliganv1.FieldChange{{Path: "spec.replicas", Before: "3", After: "0"}, {Path: "spec.paused", After: "true"}}})
	}
	if play == "evil" {
		p.Summary, p.ViaReason, p.Warnings = evil, evil, []string{evil}
		p.Objects[0].Name, p.Objects[0].Changes[0].After, p.Objects[0].Warnings = evil, evil, []string{evil}
	}
	if strings.HasPrefix(play, "guarded") {
		p.ApprovalsNeeded, p.ApprovalReason, p.Nonce, p.ClusterName, p.PolicyVersion = 1, "it is guarded", "nonce", testfleet.Cluster, 2
		p.Created, p.Expires = timestamppb.Now(), timestamppb.New(time.Now().Add(time.Hour))
	}
	sum, err := api.PlanSHA256(p)
	if err != nil {
		return nil, err
	}
	if p.Sha256 = sum; play == "forged" {
		p.Objects[0].Revision = 99
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plans[p.GetId()] = p
	return p, nil
}

func (s *stage) Undo(ctx context.Context, who trust.Identity, req *halliganv1.UndoRequest) (*halliganv1.Plan, error) {
	return s.Plan(ctx, who, &halliganv1.PlanRequest{Action: "undo", Reason: req.GetReason(), Incident: req.GetIncident(),
		Parameters: &structpb.Struct{Fields: map[string]*structpb.Value{"action": structpb.NewStringValue(req.GetActionId())}}})
}

func (s *stage) ShowPlan(_ context.Context, _ trust.Identity, id string) (*halliganv1.Plan, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.plans[id]; p != nil {
		return p, nil
	}
	return nil, fault.New(fault.NotFound, "plan again", "no plan %s waits", id)
}

func (s *stage) Apply(ctx context.Context, who trust.Identity, req *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) *halliganv1.Result {
	id := req.GetPlanId()
	s.mu.Lock()
	p := s.plans[id]
	s.applied++
	s.mu.Unlock()
	r := &halliganv1.Result{Action: id, Result: "applied", Via: "etcd", Plan: p, TimingsMs: map[string]float64{"plan": 1, "write": 2.5, "total": 4}}
	if req.GetPlanSha256() != p.GetSha256() {
		r.Result, r.Error = "stale", api.ErrorOf(fault.New(fault.Stale, "plan again", "another hash"))
		return r
	}
	if p.GetApprovalsNeeded() > 0 {
		if err := s.approvers(req.GetApprovals(), p, who); err != nil {
			r.Result, r.Error = "refused", api.ErrorOf(err)
			return r
		}
	}
	for i, o := range p.GetObjects() {
		r.Objects = append(r.Objects, &halliganv1.ObjectResult{Key: o.GetKey(), Uid: o.GetUid(), RevisionBefore: o.GetRevision(), RevisionAfter: int64(100 + i), Outcome: "applied"})
		progress(&halliganv1.Progress{Done: int64(i + 1), Total: int64(len(p.GetObjects())), PerSecond: 100})
	}
	end := func(result string, code fault.Code) *halliganv1.Result {
		r.Result, r.Error = result, api.ErrorOf(fault.New(code, "look", "%s it was", result))
		if result != "unverified" {
			r.Objects[0].Outcome, r.Objects[0].RevisionAfter = result, 0
		}
		return r
	}
	switch play := strings.TrimPrefix(id, "id-"); play {
	case "stale", "unverified", "unknown":
		return end(play, fault.Code(play))
	case "awaiting":
		return end("awaiting-approval", fault.AwaitingApproval)
	case "audit":
		return end("failed", fault.AuditUnavailable)
	case "many":
		r.Result = "partial"
		r.Objects[3].Outcome, r.Objects[3].Error = "stale", "changed by somebody else"
		for _, o := range r.Objects[5:] {
			o.Outcome, o.Error = "skipped", "not tried: another object had changed"
		}
	case "slow":
		s.begun <- struct{}{}
		<-ctx.Done()
	case "stoppable":
		s.begun <- struct{}{}
		<-s.halt
		return end("partial", fault.Cancelled)
	case "passing":
		s.begun <- struct{}{}
		<-s.halt
		s.mu.Lock()
		s.entries = append(s.entries, &halliganv1.HistoryEntry{ActionId: id, Result: "applied", Objects: 1, Applied: 1, Results: r.GetObjects()})
		s.mu.Unlock()
	case "cut", "cutforever", "cutunrecorded":
		result := map[string]string{"cut": "applied", "cutforever": "unfinished"}[play]
		if result != "" {
			s.mu.Lock()
			s.entries = append(s.entries, &halliganv1.HistoryEntry{ActionId: id, Result: result, Objects: 1, Applied: 1, Results: r.GetObjects()})
			s.mu.Unlock()
		}
		s.cut()
	}
	return r
}

func (s *stage) Stop(_ trust.Identity, id string) error {
	if id != "id-stoppable" {
		return fault.New(fault.NotFound, "see: halligan history", "no action %s is under way", id)
	}
	s.goOn()
	return nil
}

func (s *stage) Get(ctx context.Context, _ trust.Identity, req *halliganv1.GetRequest, send func(*halliganv1.Object) error) (*halliganv1.GetSummary, error) {
	params := req.GetParameters()
	kind, name, one := strings.Cut(params.GetFields()["target"].GetStringValue(), "/")
	full := one || params.GetFields()["full"].GetBoolValue()
	var names []string
	switch {
	case name == "missing":
		return nil, fault.New(fault.NotFound, "see: halligan get deployments", "no deployment missing")
	case one:
		names = []string{name}
	case kind == "torn":
		s.mu.Lock()
		s.torn++
		first := s.torn == 1
		s.mu.Unlock()
		if names = []string{"first", "second"}; first {
			if err := send(&halliganv1.Object{Key: "/registry/deployments/shop/first", Name: "first", State: "3/3"}); err != nil {
				return nil, err
			}
			s.begun <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
	case kind == "nothing":
	case kind == "half":
		if err := send(&halliganv1.Object{Name: "first", Json: `{"kind":"Deployment"}`}); err != nil {
			return nil, err
		}
		return nil, fault.New(fault.NoQuorum, "wait", "etcd went away")
	default:
		names = []string{"web", evil}
	}
	for _, name := range names {
		o := &halliganv1.Object{Key: "/registry/deployments/shop/" + name, Resource: "deployments.apps", Namespace: "shop", Name: name, State: "3/3",
			Revision: 7, Created: timestamppb.New(time.Now().Add(-90*time.Minute - 5*time.Second))}
		if full {
			quoted, err := json.Marshal(name)
			if err != nil {
				return nil, err
			}
			managed := ""
			if one {
				managed = `,"managedFields":[{"manager":"kubectl"}]`
			}
			o.Json = fmt.Sprintf(`{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":%s%s},"spec":{"replicas":3}}`, quoted, managed)
		}
		if err := send(o); err != nil {
			return nil, err
		}
	}
	if kind == "odd" {
		if err := send(&halliganv1.Object{Resource: "deployments.apps", Name: "odd", Note: evil}); err != nil {
			return nil, err
		}
		return &halliganv1.GetSummary{Objects: 2, Undecodable: 1, Stale: "no quorum"}, nil
	}
	return &halliganv1.GetSummary{Objects: int64(len(names))}, nil
}

func (s *stage) History(_ context.Context, _ trust.Identity, req *halliganv1.HistoryRequest, send func(*halliganv1.HistoryEntry) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.entries {
		if req.GetActionId() == e.GetActionId() {
			return send(e)
		}
	}
	done := &halliganv1.HistoryEntry{ActionId: "id-past", Action: "scale", Actor: "console/1000", Reason: "storm", Time: timestamppb.New(moment0),
		Summary: "scale ds/collector to 0", Result: "applied", Objects: 2, Applied: 1, UndoneBy: "id-later"}
	switch req.GetActionId() {
	case "":
		return send(done)
	case "id-past":
		done.Results = []*halliganv1.ObjectResult{{Key: "/registry/x", Outcome: "stale", Error: evil}}
		return send(done)
	}
	return fault.New(fault.NotFound, "see: halligan history", "no action %s", req.GetActionId())
}
