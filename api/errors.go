package api

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// maxErrorText bounds each text of an error in bytes. gRPC carries a status in
// HTTP/2 trailers, which some relays limit to 8 KiB in all.
const maxErrorText = 1024

// statusCodes says what generic gRPC tools see for each class of errors.
// Nothing maps to Unavailable that a retry could do harm to.
var statusCodes = map[fault.Code]codes.Code{
	fault.Failed:           codes.Internal,
	fault.NotFound:         codes.NotFound,
	fault.Undecodable:      codes.DataLoss,
	fault.Encrypted:        codes.FailedPrecondition,
	fault.NoSpace:          codes.ResourceExhausted,
	fault.NoQuorum:         codes.FailedPrecondition,
	fault.TooLarge:         codes.OutOfRange,
	fault.Unknown:          codes.Unknown,
	fault.Cancelled:        codes.Canceled,
	fault.Usage:            codes.InvalidArgument,
	fault.Stale:            codes.Aborted,
	fault.Refused:          codes.PermissionDenied,
	fault.Unverified:       codes.DeadlineExceeded,
	fault.AwaitingApproval: codes.FailedPrecondition,
	fault.AuditUnavailable: codes.FailedPrecondition,
	fault.Unreachable:      codes.Unavailable,
	fault.Unauthenticated:  codes.Unauthenticated,
}

// ErrorOf returns the message that carries err, nil for nil. Its texts are
// neutralised and bounded, so that no log on the way has to do it.
func ErrorOf(err error) *halliganv1.Error {
	f := fault.Of(err)
	if f == nil {
		return nil
	}
	return &halliganv1.Error{
		Code:    string(f.Code),
		Message: neutral.LineMax(f.Message, maxErrorText),
		Next:    neutral.LineMax(f.Next, maxErrorText),
	}
}

// ToStatus returns err as a gRPC status that carries its code, message and next
// step as a detail. It returns nil for nil.
func ToStatus(err error) error {
	e := ErrorOf(err)
	if e == nil {
		return nil
	}
	code, known := statusCodes[fault.Code(e.Code)]
	if !known {
		code = codes.Internal
	}
	s := status.New(code, e.Message)
	if detailed, err := s.WithDetails(e); err == nil {
		s = detailed
	}
	return s.Err()
}

// FromStatus returns the error that a call ended with as a fault. Where the
// other side sent no detail, because it is no agent, an older one, or not there
// at all, the class follows from the gRPC code. It returns nil for nil.
func FromStatus(err error) *fault.Error {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if errors.As(err, &f) {
		return fault.Of(err)
	}
	cause := err
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		err = status.FromContextError(err).Err()
	}
	s, isStatus := status.FromError(err)
	if !isStatus {
		return fault.Of(err)
	}
	for _, d := range s.Details() {
		if e, ok := d.(*halliganv1.Error); ok && e.GetCode() != "" {
			return &fault.Error{Code: fault.Code(e.GetCode()), Message: e.GetMessage(), Next: e.GetNext(), Cause: cause}
		}
	}
	f = &fault.Error{Code: fault.Failed, Message: s.Message(), Cause: cause}
	switch s.Code() {
	case codes.Unavailable:
		f.Code, f.Next = fault.Unreachable, "see whether the agent runs, then try again"
		f.Message = "the agent cannot be reached: " + strings.TrimPrefix(s.Message(), "connection error: desc = ")
	case codes.DeadlineExceeded:
		f.Code, f.Next = fault.Unreachable, "look at the load of the node, then try again with a longer --timeout"
		f.Message = "the agent did not answer in time"
	case codes.Canceled:
		f.Code, f.Next = fault.Cancelled, "nothing more was started"
		f.Message = "stopped before the answer came"
	case codes.Unauthenticated:
		f.Code, f.Next = fault.Unauthenticated, "use an identity that the agent knows; at a node's console that is root"
	case codes.PermissionDenied:
		f.Code, f.Next = fault.Refused, "ask somebody who has the role"
	case codes.InvalidArgument:
		f.Code = fault.Usage
	case codes.Unimplemented:
		f.Next = "the agent is older than this client or is no Halligan agent; compare `halligan version` on both sides"
	case codes.ResourceExhausted:
		f.Next = "ask for less, such as one namespace, or wait for other calls to end"
	}
	if f.Message == "" {
		f.Message = fmt.Sprintf("the call failed with the gRPC status %s", s.Code())
	}
	return f
}
