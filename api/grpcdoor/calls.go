package grpcdoor

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime/debug"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"

	"github.com/halligan-io/halligan/api"
	"github.com/halligan-io/halligan/internal/alarm"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust"
)

func checkMethods(services map[string]grpc.ServiceInfo, rows map[string]Row) error {
	for service, info := range services {
		for _, m := range info.Methods {
			if name := "/" + service + "/" + m.Name; rows[name].May == nil || rows[name].Record == 0 {
				return fmt.Errorf("the method %s has no row in the table of the doors, or not a whole one", name)
			}
		}
	}
	return nil
}

// allow decides whether somebody may call the method at all.
func (s *Server) allow(who trust.Identity, method string) error {
	if may := s.o.Methods[method].May; may != nil && who.Person != "" && may(who) {
		return nil
	}
	as := who.Role.String()
	if who.Role == trust.None { // at a bastion
		as = who.Person
	}
	return fault.New(fault.Refused, "take another role, or ask somebody who has it", "%s may not call %s", as, path.Base(method))
}

// tap takes the place of a call when its headers have come: gRPC would read a
// whole request before an interceptor sees the call, and one person's requests
// that never end would fill the memory.
func (s *Server) tap(ctx context.Context, call *tap.Info) (context.Context, error) {
	if s.o.Methods[call.FullMethodName].May == nil {
		return ctx, nil // gRPC refuses it, and reads nothing of it
	}
	info, err := CallerOf(ctx)
	if err == nil {
		var release func()
		if release, err = s.calls.Take(info.Who); err == nil {
			p := &place{release: release}
			p.users.Store(1)
			context.AfterFunc(ctx, p.leave)
			return context.WithValue(ctx, placeKey{}, p), nil
		}
	}
	if info.busy != nil {
		info.busy()
	}
	return ctx, s.ended(info, call.FullMethodName, nil, err)
}

// place is given back when the call's context has ended and its handler has
// returned: one that goes on without its caller still counts.
type place struct {
	users   atomic.Int32
	release func()
}

type placeKey struct{}

// enter reports false where the place was given back already.
func (p *place) enter() bool {
	for {
		n := p.users.Load()
		if n == 0 || p.users.CompareAndSwap(n, n+1) {
			return n > 0
		}
	}
}

func (p *place) leave() {
	if p.users.Add(-1) == 0 {
		p.release()
	}
}

// enter admits a call that has a place. Its context ends, with the cause, when the
// identity no longer holds; leave is called at its end.
func (s *Server) enter(ctx context.Context, method string) (_ context.Context, _ Caller, leave func(), err error) {
	info, err := CallerOf(ctx)
	if err != nil {
		return nil, info, nil, err
	}
	if info.Held.Err() != nil {
		return nil, info, nil, context.Cause(info.Held)
	}
	if err := s.allow(info.Who, method); err != nil {
		return nil, info, nil, err
	}
	p, _ := ctx.Value(placeKey{}).(*place)
	if p == nil || !p.enter() {
		return nil, info, nil, fault.New(fault.Cancelled, "", "the caller has gone")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	forget := context.AfterFunc(info.Held, func() { cancel(context.Cause(info.Held)) })
	return ctx, info, func() { forget(); cancel(nil); p.leave() }, nil
}

// ended turns the end of a call into what the caller hears, records it, and tells
// the alarms of refusals.
func (s *Server) ended(info Caller, method string, request proto.Message, err error) error {
	if err == nil {
		if s.o.Methods[method].Record == Noted {
			s.o.Record.Called(info.Who, method, request, nil)
		}
		return nil
	}
	f := api.FromStatus(err)
	if f.Code == fault.Cancelled && info.Held != nil && info.Held.Err() != nil {
		f = fault.Of(context.Cause(info.Held))
	}
	switch {
	case info.refusal != nil: // it was told when the connection came
	case f.Code == fault.Refused || f.Code == fault.Unauthenticated:
		s.Refused(info.Who, method, request, f)
	case s.o.Methods[method].Record == Noted:
		s.o.Record.Called(info.Who, method, request, f)
	}
	return api.ToStatus(f)
}

// Refused records and tells the alarms of something that a call asked for and did
// not get. The server does so itself for calls that end with such an error.
func (s *Server) Refused(who trust.Identity, method string, request proto.Message, err error) {
	s.o.Alarms.Raise(alarm.Of(alarm.Refusal, who, fault.Of(err).Message))
	s.o.Record.Called(who, method, request, err)
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer s.Rescue(info.FullMethod, &err)
	who, err := s.answer(ctx, info.FullMethod, func(ctx context.Context) (err error) {
		resp, err = handler(ctx, req)
		return err
	})
	request, _ := req.(proto.Message)
	return resp, s.ended(who, info.FullMethod, request, err)
}

// Noted records a call of a Routine method that was more than that, with what
// became of it.
func (s *Server) Noted(who trust.Identity, method string, became proto.Message) {
	s.o.Record.Called(who, method, became, nil)
}

// answer runs the handler of a call, which may panic.
func (s *Server) answer(ctx context.Context, method string, handler func(context.Context) error) (who Caller, err error) {
	defer s.Rescue(method, &err)
	ctx, who, leave, err := s.enter(ctx, method)
	if err != nil {
		return who, err
	}
	defer leave()
	return who, handler(ctx)
}

// call is a stream with the context of its interceptor, which keeps what was asked
// first.
type call struct {
	grpc.ServerStream
	ctx     context.Context
	request atomic.Pointer[proto.Message]
}

func (c *call) Context() context.Context { return c.ctx }

func (c *call) RecvMsg(m any) error {
	err := c.ServerStream.RecvMsg(m)
	if asked, ok := m.(proto.Message); ok && err == nil {
		c.request.CompareAndSwap(nil, &asked)
	}
	return err
}

func (s *Server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer s.Rescue(info.FullMethod, &err)
	c := &call{ServerStream: stream}
	who, err := s.answer(stream.Context(), info.FullMethod, func(ctx context.Context) error {
		c.ctx = ctx
		return handler(srv, c)
	})
	var request proto.Message
	if asked := c.request.Load(); asked != nil {
		request = *asked
	}
	return s.ended(who, info.FullMethod, request, err)
}

// Rescue, deferred, turns a panic in one call into that call's error.
func (s *Server) Rescue(method string, err *error) {
	r := recover()
	if r == nil {
		return
	}
	s.o.Log.Error().Str("method", method).Str("panic", neutral.LineMax(fmt.Sprint(r), 1024)).Bytes("stack", debug.Stack()).Msg("a call panicked")
	*err = api.ToStatus(fault.New(fault.Failed, "report it with the daemon's log of this moment; `halligan history` tells what was recorded", "%s met a bug in the daemon", method))
}

// Revoked reports whether an identity ended because it was taken back, and not
// because it lapsed or its session ended.
func Revoked(held context.Context) bool { return errors.Is(context.Cause(held), trust.ErrRevoked) }
