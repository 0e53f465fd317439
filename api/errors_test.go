package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/halligan-io/halligan/internal/fault"
)

func TestErrorsCrossTheWire(t *testing.T) {
	for code := range statusCodes {
		sent := fmt.Errorf("scaling web: %w", fault.New(code, "do that", "this went wrong"))
		got := FromStatus(ToStatus(sent))
		if got.Code != code || got.Message != "scaling web: this went wrong" || got.Next != "do that" {
			t.Errorf("%s arrived as %+v", code, got)
		}
	}
	if ToStatus(nil) != nil || FromStatus(nil) != nil || ErrorOf(nil) != nil {
		t.Error("no error became one")
	}
	if s := status.Convert(ToStatus(fault.New("later-code", "", "x"))); s.Code() != codes.Internal {
		t.Errorf("a code without a row became %s", s.Code())
	}
}

func TestErrorTextIsSafeAndBounded(t *testing.T) {
	got := FromStatus(ToStatus(fault.New(fault.Failed, "\x1b[2J", "bad \xff name\n%s", strings.Repeat("x", 1<<20))))
	if !strings.HasPrefix(got.Message, `bad \xff name\nxxx`) || len(got.Message) > maxErrorText || got.Next != `\x1b[2J` {
		t.Errorf("arrived as %.60q (%d bytes), %q", got.Message, len(got.Message), got.Next)
	}
}

func TestStatusWithoutDetail(t *testing.T) {
	for _, c := range []struct {
		err  error
		code fault.Code
		next bool
	}{
		{status.Error(codes.Unavailable, "connection error: desc = dial"), fault.Unreachable, true},
		{status.Error(codes.DeadlineExceeded, ""), fault.Unreachable, true},
		{context.DeadlineExceeded, fault.Unreachable, true},
		{status.Error(codes.Canceled, ""), fault.Cancelled, true},
		{context.Canceled, fault.Cancelled, true},
		{status.Error(codes.Unauthenticated, "who"), fault.Unauthenticated, true},
		{status.Error(codes.PermissionDenied, "no"), fault.Refused, true},
		{status.Error(codes.InvalidArgument, "bad"), fault.Usage, false},
		{status.Error(codes.Unimplemented, "unknown service"), fault.Failed, true},
		{status.Error(codes.ResourceExhausted, "too large"), fault.Failed, true},
		{status.Error(codes.Internal, ""), fault.Failed, false},
		{io.ErrUnexpectedEOF, fault.Failed, false},
		{fault.New(fault.Stale, "plan again", "gone"), fault.Stale, true},
	} {
		got := FromStatus(c.err)
		if got.Code != c.code || (got.Next != "") != c.next || got.Message == "" || !errors.Is(got, c.err) && error(got) != c.err {
			t.Errorf("%v became %+v", c.err, got)
		}
	}
}
