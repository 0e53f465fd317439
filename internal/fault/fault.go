// Package fault gives every error that a person or a script may meet one
// shape: a stable code, one line of what and why, and what to do next. The code
// decides the exit status of the command line and the status of a gRPC call.
//
// It must never carry object contents: messages are shown and logged as they
// are. It stands on floor 0.
package fault

import (
	"context"
	"errors"
	"fmt"
)

// Code is a stable name of a class of errors. Scripts decide on it.
type Code string

// The codes, and the exit status that each one has.
const (
	Failed           Code = "failed"            // 1: an error without a class of its own
	NotFound         Code = "not-found"         // 1: no such object, action or plan
	Undecodable      Code = "undecodable"       // 1: a stored value that cannot be read or safely edited
	Encrypted        Code = "encrypted"         // 1: a value whose key is not at hand
	NoSpace          Code = "no-space"          // 1: etcd's NOSPACE alarm refuses the write
	NoQuorum         Code = "no-quorum"         // 1: etcd has no leader; only reads work
	TooLarge         Code = "too-large"         // 1: etcd refuses a request of this size
	Unknown          Code = "unknown"           // 1: whether the write happened could not be found out
	Cancelled        Code = "cancelled"         // 1: stopped by the caller
	Usage            Code = "usage"             // 2: wrong words on the command line or in a request
	Stale            Code = "stale"             // 3: the object is not what was planned, or the plan expired
	Refused          Code = "refused"           // 4: policy or a guard says no
	Unverified       Code = "unverified"        // 5: written, but not seen to hold in time
	AwaitingApproval Code = "awaiting-approval" // 6: another person must sign
	AuditUnavailable Code = "audit-unavailable" // 7: the record cannot be made durable
	Unreachable      Code = "unreachable"       // 8: nobody answers there
	Unauthenticated  Code = "unauthenticated"   // 8: the other side does not know the caller
)

var exits = map[Code]int{
	Usage: 2, Stale: 3, Refused: 4, Unverified: 5, AwaitingApproval: 6,
	AuditUnavailable: 7, Unreachable: 8, Unauthenticated: 8,
}

// Exit returns the exit status of a command that ended with this code.
func (c Code) Exit() int {
	if n, ok := exits[c]; ok {
		return n
	}
	return 1
}

// Error is an error made for people: Message says what and why in one line,
// Next what to do about it.
type Error struct {
	Code    Code
	Message string
	Next    string
	// Cause, if any, is reachable with errors.Is and errors.As; its text is
	// part of Message already where it helps.
	Cause error
}

// Error returns the message and the next step in one line.
func (e *Error) Error() string {
	if e.Next == "" {
		return e.Message
	}
	return e.Message + "; " + e.Next
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// New returns an error. A format verb %w keeps its operand as the cause.
func New(code Code, next, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Next: next, Cause: errors.Unwrap(err)}
}

// Of returns err as an *Error: itself when there is one in its chain (with the
// text of whatever was wrapped around it), else one without a class. It returns
// nil for nil.
func Of(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		if error(e) == err {
			return e
		}
		return &Error{Code: e.Code, Message: trimNext(err.Error(), e.Next), Next: e.Next, Cause: err}
	}
	if errors.Is(err, context.Canceled) {
		return &Error{Code: Cancelled, Message: err.Error(), Next: "nothing more was started", Cause: err}
	}
	return &Error{Code: Failed, Message: err.Error(), Cause: err}
}

// CodeOf returns the code of err, Failed where it has none, "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	return Of(err).Code
}

// Is reports whether err has the code.
func Is(err error, code Code) bool { return err != nil && CodeOf(err) == code }

func trimNext(text, next string) string {
	if next == "" {
		return text
	}
	if i := len(text) - len(next) - 2; i > 0 && text[i:] == "; "+next {
		return text[:i]
	}
	return text
}
