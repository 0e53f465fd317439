package console

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
	"github.com/halligan-io/halligan/internal/version"
)

// methods is the inventory of what this door offers: every method that the
// server has, with the least role that may call it. What an action needs beyond
// that is in the action's row. A method without a row keeps the agent from
// starting.
var methods = map[string]trust.Role{
	halliganv1.Agent_Describe_FullMethodName: trust.Observer,
	halliganv1.Agent_Status_FullMethodName:   trust.Observer,
	halliganv1.Agent_Plan_FullMethodName:     trust.Observer,
	halliganv1.Agent_Undo_FullMethodName:     trust.Observer,
	halliganv1.Agent_Apply_FullMethodName:    trust.Responder,
	halliganv1.Agent_Stop_FullMethodName:     trust.Responder,
	halliganv1.Agent_Get_FullMethodName:      trust.Observer,
	halliganv1.Agent_History_FullMethodName:  trust.Observer,
	// So that grpcurl works without our .proto file.
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      trust.Observer,
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": trust.Observer,
}

func checkMethods(services map[string]grpc.ServiceInfo) error {
	for service, info := range services {
		for _, m := range info.Methods {
			if name := "/" + service + "/" + m.Name; methods[name] == trust.None {
				return fmt.Errorf("the method %s has no row in the console's table", name)
			}
		}
	}
	return nil
}

// service is the API over the engine.
type service struct {
	halliganv1.UnimplementedAgentServer
	engine Engine
	log    zerolog.Logger
	// stopping ends when the agent is told to stop.
	stopping context.Context
}

// enter decides whether the caller may call the method at all.
func enter(ctx context.Context, method string) error {
	who, err := caller(ctx)
	if err != nil {
		return err
	}
	least, known := methods[method]
	if !known || !who.May(least) {
		return fault.New(fault.Refused, "ask somebody who has the role", "%s may not call %s", who.Role, method)
	}
	return nil
}

func (s *service) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer s.rescue(info.FullMethod, &err)
	if err := enter(ctx, info.FullMethod); err != nil {
		return nil, api.ToStatus(err)
	}
	resp, err = handler(ctx, req)
	return resp, err
}

func (s *service) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer s.rescue(info.FullMethod, &err)
	if err := enter(stream.Context(), info.FullMethod); err != nil {
		return api.ToStatus(err)
	}
	return handler(srv, stream)
}

// rescue turns a panic in one call into that call's error.
func (s *service) rescue(method string, err *error) {
	r := recover()
	if r == nil {
		return
	}
	s.log.Error().Str("method", method).Str("panic", neutral.LineMax(fmt.Sprint(r), 1024)).Bytes("stack", debug.Stack()).Msg("a call panicked")
	*err = api.ToStatus(panicked(method))
}

func panicked(method string) error {
	return fault.New(fault.Failed, "report it with the agent's log of this moment; `halligan history` tells what was recorded", "%s met a bug in the agent", method)
}

func (s *service) Describe(context.Context, *halliganv1.DescribeRequest) (*halliganv1.DescribeResponse, error) {
	return &halliganv1.DescribeResponse{Actions: s.engine.Describe(), Version: version.String()}, nil
}

func (s *service) Status(ctx context.Context, _ *halliganv1.StatusRequest) (*halliganv1.StatusResponse, error) {
	who, err := caller(ctx)
	if err != nil {
		return nil, api.ToStatus(err)
	}
	resp, err := s.engine.Status(ctx, who)
	return resp, api.ToStatus(err)
}

func (s *service) Plan(ctx context.Context, req *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
	who, err := caller(ctx)
	if err != nil {
		return nil, api.ToStatus(err)
	}
	plan, err := s.engine.Plan(ctx, who, req)
	return plan, api.ToStatus(err)
}

// Undo is Plan with the action undo.
func (s *service) Undo(ctx context.Context, req *halliganv1.UndoRequest) (*halliganv1.Plan, error) {
	return s.Plan(ctx, &halliganv1.PlanRequest{
		Action:     "undo",
		Parameters: &structpb.Struct{Fields: map[string]*structpb.Value{"action": structpb.NewStringValue(req.GetActionId())}},
		Reason:     req.GetReason(),
		Incident:   req.GetIncident(),
	})
}

// Apply runs the action in the agent's own time: a terminal that breaks or is
// stopped neither ends nor slows it.
func (s *service) Apply(req *halliganv1.ApplyRequest, stream grpc.ServerStreamingServer[halliganv1.ApplyEvent]) error {
	who, err := caller(stream.Context())
	if err != nil {
		return api.ToStatus(err)
	}
	latest := make(chan *halliganv1.Progress, 1)
	var sender sync.WaitGroup
	sender.Go(func() {
		for p := range latest {
			// A caller that went away shows in the last Send.
			_ = stream.Send(&halliganv1.ApplyEvent{Event: &halliganv1.ApplyEvent_Progress{Progress: p}})
		}
	})
	var lock sync.Mutex // guards the swap below against a progress of another goroutine
	result := s.apply(who, req, func(p *halliganv1.Progress) {
		lock.Lock()
		defer lock.Unlock()
		select {
		case <-latest: // nobody took the one before
		default:
		}
		latest <- p
	})
	close(latest)
	sender.Wait()
	return stream.Send(&halliganv1.ApplyEvent{Event: &halliganv1.ApplyEvent_Result{Result: result}})
}

// apply returns a result even where the engine panics, since something may
// have been written: that is not known.
func (s *service) apply(who trust.Identity, req *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) (result *halliganv1.Result) {
	var err error
	defer func() {
		if err != nil {
			e := api.ErrorOf(api.FromStatus(err))
			result = &halliganv1.Result{Action: req.GetPlanId(), Result: "unknown", Error: e}
		}
	}()
	defer s.rescue(halliganv1.Agent_Apply_FullMethodName, &err)
	return s.engine.Apply(s.stopping, who, req.GetPlanId(), req.GetPlanSha256(), progress)
}

func (s *service) Stop(ctx context.Context, req *halliganv1.StopRequest) (*halliganv1.StopResponse, error) {
	who, err := caller(ctx)
	if err != nil {
		return nil, api.ToStatus(err)
	}
	return &halliganv1.StopResponse{}, api.ToStatus(s.engine.Stop(who, req.GetActionId()))
}

func (s *service) Get(req *halliganv1.GetRequest, stream grpc.ServerStreamingServer[halliganv1.GetEvent]) error {
	who, err := caller(stream.Context())
	if err != nil {
		return api.ToStatus(err)
	}
	params := req.GetParameters()
	if params == nil {
		params = &structpb.Struct{}
	}
	out := batch{stream: stream}
	summary, err := s.engine.Get(stream.Context(), who, params, out.add)
	if serr := out.send(); err == nil {
		err = serr
	}
	if err != nil {
		return api.ToStatus(err)
	}
	return stream.Send(&halliganv1.GetEvent{Summary: summary})
}

// batch sends objects some at a time, since a message costs as much as an
// object.
type batch struct {
	stream  grpc.ServerStreamingServer[halliganv1.GetEvent]
	objects []*halliganv1.Object
	size    int // bytes of JSON
}

// Bounds of a batch: rows of a table, or bytes of whole objects. One object
// more may be in it.
const (
	batchObjects = 100
	batchBytes   = 64 << 10
)

func (b *batch) add(o *halliganv1.Object) error {
	b.objects = append(b.objects, o)
	if b.size += len(o.GetJson()); len(b.objects) < batchObjects && b.size < batchBytes {
		return nil
	}
	return b.send()
}

func (b *batch) send() error {
	if len(b.objects) == 0 {
		return nil
	}
	err := b.stream.Send(&halliganv1.GetEvent{Objects: b.objects})
	clear(b.objects)
	b.objects, b.size = b.objects[:0], 0
	return err
}

func (s *service) History(req *halliganv1.HistoryRequest, stream grpc.ServerStreamingServer[halliganv1.HistoryEntry]) error {
	who, err := caller(stream.Context())
	if err != nil {
		return api.ToStatus(err)
	}
	return api.ToStatus(s.engine.History(stream.Context(), who, req, stream.Send))
}
