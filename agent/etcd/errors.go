package etcd

import (
	"context"
	"errors"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
)

// verdict is what a failed call says about the effect of its request.
type verdict int

const (
	unsent   verdict = iota + 1 // never given to a connection: not done
	refused                     // not proposed to Raft: not done, another try may work
	rejected                    // etcd will not do it: not done, another try is no use
	noSpace                     // the alarm is up; done or not done, but settled
	doubtful                    // sent: done, not done, or yet to be done
)

var errLearner = rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner)

// judge looks at the error of a request. Whatever is not known to come from
// before the proposal or from its refusal is doubtful.
//
// NOSPACE is its own case: the door of etcd refuses before the proposal
// (server/etcdserver/api/v3rpc/quota.go), but the applier that finds the quota
// exceeded first carries the request out and then returns the same error
// (server/etcdserver/apply/quota.go: quotaApplierV3).
func judge(err error, sent bool) verdict {
	if !sent {
		return unsent
	}
	switch rpctypes.Error(err) {
	case rpctypes.ErrTooManyRequests, rpctypes.ErrNoLeader, rpctypes.ErrAuthOldRevision:
		// Leader and apply lag are checked before the proposal
		// (v3rpc/interceptor.go, v3_server.go: processInternalRaftRequestOnce).
		return refused
	case rpctypes.ErrNoSpace:
		return noSpace
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.OutOfRange, codes.PermissionDenied,
		codes.Unauthenticated, codes.ResourceExhausted, codes.DataLoss, codes.Unimplemented:
		return rejected
	case codes.Unknown:
		if strings.Contains(rpctypes.ErrorDesc(err), "raft proposal dropped") { // raft/v3 ErrProposalDropped
			return refused
		}
	}
	return doubtful
}

// leaderless reports whether a read failed for want of a leader or a quorum.
func leaderless(err error) bool {
	switch rpctypes.Error(err) {
	case rpctypes.ErrNoLeader, rpctypes.ErrLeaderChanged, rpctypes.ErrTimeout, rpctypes.ErrTimeoutDueToLeaderFail,
		rpctypes.ErrTimeoutDueToConnectionLost, rpctypes.ErrTimeoutWaitAppliedIndex, rpctypes.ErrUnhealthy:
		return true
	}
	return false
}

func tooLong(err error) bool {
	return status.Code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded)
}

// overLimit reports whether gRPC refused a message for its size, on either
// side (grpc/rpc_util.go).
func overLimit(err error) bool {
	return status.Code(err) == codes.ResourceExhausted && strings.Contains(status.Convert(err).Message(), "message larger than max")
}

// explain makes an error for people out of a failed call. ctx is the caller's.
func (c *Client) explain(ctx context.Context, what string, err error, sent bool) error {
	if ctx.Err() == context.Canceled {
		return fault.New(fault.Cancelled, "nothing more was started", "%s: %w", what, context.Canceled)
	}
	desc := neutral.Line(rpctypes.ErrorDesc(err))
	switch rpctypes.Error(err) {
	case rpctypes.ErrNoSpace:
		return fault.New(fault.NoSpace, "deletes still work: delete, compact, defragment, then disarm the alarm",
			"%s: etcd's NOSPACE alarm refuses writes", what)
	case rpctypes.ErrCorrupt:
		return fault.New(fault.Failed, "never disarm it: find the corrupt member and replace it from its peers",
			"%s: etcd's CORRUPT alarm is up", what)
	case rpctypes.ErrRequestTooLarge:
		return fault.New(fault.TooLarge, "the object is too large for one request (etcd's --max-request-bytes)", "%s: etcd refuses a request of this size", what)
	case rpctypes.ErrCompacted:
		return fault.New(fault.Failed, "read again from the start", "%s: compacted while reading", what)
	case rpctypes.ErrTooManyRequests:
		return fault.New(fault.Failed, "etcd applies writes more slowly than it accepts them: try again in some seconds", "%s: etcd refuses: too many requests", what)
	case errLearner:
		return fault.New(fault.Failed, "use the agent of a voting member", "%s: this etcd member is a learner", what)
	}
	if leaderless(err) {
		return fault.New(fault.NoQuorum, "bring back enough members; until then only reads work", "%s: etcd has no leader (%s)", what, desc)
	}
	switch {
	case overLimit(err):
		return fault.New(fault.TooLarge, "the object is too large for one request (etcd's --max-request-bytes)", "%s: %s", what, desc)
	case status.Code(err) == codes.PermissionDenied, status.Code(err) == codes.Unauthenticated,
		rpctypes.Error(err) == rpctypes.ErrUserEmpty, rpctypes.Error(err) == rpctypes.ErrInvalidAuthToken:
		return fault.New(fault.Unauthenticated, "use a client certificate whose etcd user may do this", "%s: etcd refuses the client: %s", what, desc)
	case !sent && (strings.Contains(desc, "tls: ") || strings.Contains(desc, "x509: ")):
		return fault.New(fault.Unauthenticated, "check the CA, certificate and key files of etcd", "%s: TLS with etcd at %s fails: %s", what, c.where(), desc)
	case !sent && (status.Code(err) == codes.Unavailable || tooLong(err)):
		return fault.New(fault.Unreachable, "check that etcd runs, listens there and takes this client certificate", "%s: etcd at %s does not answer: %s", what, c.where(), desc)
	case tooLong(err):
		return fault.New(fault.Unreachable, "it hangs, is overloaded or has lost its quorum: try again, or use the agent of another control-plane node", "%s: etcd at %s gave no answer in time", what, c.where())
	case status.Code(err) == codes.Unavailable:
		return fault.New(fault.Unreachable, "try again", "%s: the connection to etcd at %s broke: %s", what, c.where(), desc)
	}
	return fault.New(fault.Failed, "", "%s: etcd says: %s", what, desc)
}

func (c *Client) where() string { return strings.Join(c.cfg.Endpoints, ", ") }

func name(key string) string { return neutral.Line(key) }
