package door

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/api/grpcdoor"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/version"
)

// Describe lists the actions.
func (s *Server) Describe(context.Context, *halliganv1.DescribeRequest) (*halliganv1.DescribeResponse, error) {
	return &halliganv1.DescribeResponse{Actions: s.engine.Describe(), Version: version.String()}, nil
}

// Status tells what works, for this caller.
func (s *Server) Status(ctx context.Context, _ *halliganv1.StatusRequest) (*halliganv1.StatusResponse, error) {
	info, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	out, err := s.engine.Status(ctx, info.Who)
	if err != nil {
		return nil, err
	}
	out.Cluster, out.Door = s.cluster, string(info.Who.Door)
	if s.bundles != nil {
		out.Bundle = s.bundles.Status()
	}
	if !info.Who.NotAfter.IsZero() {
		out.CredentialExpires = timestamppb.New(info.Who.NotAfter)
	}
	if info.Who.Late {
		out.Warnings = append(out.Warnings, "your credential is past an edge of its validity: you are admitted since clocks may lie; renew it (halligan ca renew)")
	}
	if out.Audit = s.audit(); out.ReadOnly == "" && out.Audit.GetRefused() != "" {
		out.ReadOnly = "nothing can be recorded: " + out.Audit.GetRefused()
	}
	out.Warnings = append(out.Warnings, s.warnings()...)
	return out, nil
}

// Plan computes what an action would do.
func (s *Server) Plan(ctx context.Context, req *halliganv1.PlanRequest) (*halliganv1.Plan, error) {
	info, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	return s.engine.Plan(ctx, info.Who, req)
}

// Undo plans the reversal of an action.
func (s *Server) Undo(ctx context.Context, req *halliganv1.UndoRequest) (*halliganv1.Plan, error) {
	info, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	return s.engine.Undo(ctx, info.Who, req)
}

// ShowPlan returns a plan that waits.
func (s *Server) ShowPlan(ctx context.Context, req *halliganv1.ShowPlanRequest) (*halliganv1.Plan, error) {
	info, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	return s.engine.ShowPlan(ctx, info.Who, req.GetPlanId())
}

// ExchangeBundle takes over what is newer of the caller's bundle, and returns
// the agent's own where the caller's is another.
func (s *Server) ExchangeBundle(ctx context.Context, req *halliganv1.ExchangeBundleRequest) (*halliganv1.ExchangeBundleResponse, error) {
	info, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	if s.bundles == nil {
		return nil, fault.New(fault.Usage, "name one in its configuration (trust.bundle)", "this agent has no bundle")
	}
	out := &halliganv1.ExchangeBundleResponse{}
	if len(req.GetBundle()) > 0 {
		changed, err := s.bundles.Offer(req.GetBundle())
		if changed {
			s.Noted(info.Who, halliganv1.Agent_ExchangeBundle_FullMethodName, s.bundles.Status())
		}
		if err != nil {
			out.Refused = api.ErrorOf(err)
			s.Refused(info.Who, halliganv1.Agent_ExchangeBundle_FullMethodName, nil, fmt.Errorf("the bundle that was brought: %w", err))
		}
	}
	if raw := s.bundles.Raw(); !bytes.Equal(raw, req.GetBundle()) {
		out.Bundle = raw
	}
	out.Status = s.bundles.Status()
	return out, nil
}

// Apply runs the action in the agent's own time: a terminal that breaks or is
// stopped neither ends nor slows it. A revocation of the caller's credential
// stops it between two objects.
func (s *Server) Apply(req *halliganv1.ApplyRequest, stream grpc.ServerStreamingServer[halliganv1.ApplyEvent]) error {
	info, err := grpcdoor.CallerOf(stream.Context())
	if err != nil {
		return err
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
	result := s.apply(info, req, func(p *halliganv1.Progress) {
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
func (s *Server) apply(info grpcdoor.Caller, req *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) (result *halliganv1.Result) {
	var err error
	defer func() {
		if err != nil {
			result = &halliganv1.Result{Action: req.GetPlanId(), Result: "unknown", Error: api.ErrorOf(api.FromStatus(err))}
		}
		if e := result.GetError(); e.GetCode() == string(fault.Refused) || e.GetCode() == string(fault.Unauthenticated) {
			s.Refused(info.Who, halliganv1.Agent_Apply_FullMethodName, req, &fault.Error{Code: fault.Code(e.GetCode()), Message: "applying " + req.GetPlanId() + ": " + e.GetMessage()})
		}
	}()
	defer s.Rescue(halliganv1.Agent_Apply_FullMethodName, &err)
	ctx, cancel := context.WithCancelCause(s.Stopping())
	defer cancel(nil)
	defer context.AfterFunc(info.Held, func() {
		if grpcdoor.Revoked(info.Held) {
			cancel(context.Cause(info.Held))
		}
	})()
	return s.engine.Apply(ctx, info.Who, req, progress)
}

// Stop ends an action under way between two objects.
func (s *Server) Stop(ctx context.Context, req *halliganv1.StopRequest) (*halliganv1.StopResponse, error) {
	info, err := grpcdoor.CallerOf(ctx)
	if err != nil {
		return nil, err
	}
	return &halliganv1.StopResponse{}, s.engine.Stop(info.Who, req.GetActionId())
}

// Get streams objects.
func (s *Server) Get(req *halliganv1.GetRequest, stream grpc.ServerStreamingServer[halliganv1.GetEvent]) error {
	info, err := grpcdoor.CallerOf(stream.Context())
	if err != nil {
		return err
	}
	out := batch{stream: stream}
	summary, err := s.engine.Get(stream.Context(), info.Who, req, out.add)
	if serr := out.send(); err == nil {
		err = serr
	}
	if err != nil {
		return err
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

// Top streams what is found out about who overloads the control plane.
func (s *Server) Top(req *halliganv1.TopRequest, stream grpc.ServerStreamingServer[halliganv1.TopEvent]) error {
	info, err := grpcdoor.CallerOf(stream.Context())
	if err != nil {
		return err
	}
	if s.look == nil {
		return fault.New(fault.Usage, "ask the agent of a control-plane node", "this agent does not look for offenders")
	}
	return s.look.Top(stream.Context(), info.Who, req, stream.Send)
}

// Logs streams lines of logs. Whoever follows them is on record from the beginning,
// and leaves as they please.
func (s *Server) Logs(req *halliganv1.LogsRequest, stream grpc.ServerStreamingServer[halliganv1.LogLines]) error {
	info, err := grpcdoor.CallerOf(stream.Context())
	if err != nil {
		return err
	}
	if s.logs == nil {
		return fault.New(fault.NotFound, "look at the node itself", "this agent reads no logs")
	}
	if req.GetFollow() {
		s.Noted(info.Who, halliganv1.Agent_Logs_FullMethodName, req)
	}
	err = s.logs.Read(stream.Context(), req, stream.Send)
	if req.GetFollow() && stream.Context().Err() != nil && info.Held.Err() == nil {
		return nil
	}
	return err
}

// History streams recorded actions.
func (s *Server) History(req *halliganv1.HistoryRequest, stream grpc.ServerStreamingServer[halliganv1.HistoryEntry]) error {
	info, err := grpcdoor.CallerOf(stream.Context())
	if err != nil {
		return err
	}
	return s.engine.History(stream.Context(), info.Who, req, stream.Send)
}
