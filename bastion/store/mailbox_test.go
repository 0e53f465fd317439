package store

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/approval"
)

func plan(n int) *halliganv1.Plan {
	now := time.Now()
	return &halliganv1.Plan{Id: fmt.Sprintf("0198a7c2-%04d", n), Sha256: fmt.Sprintf("%064d", n), Actor: "alice", ClusterName: "prod", Node: "cp-1", Action: "scale",
		Summary: fmt.Sprintf("scale ds/%d", n), ApprovalsNeeded: 1, Created: timestamppb.New(now), Expires: timestamppb.New(now.Add(time.Hour))}
}

func marshal(t *testing.T, m proto.Message) string {
	t.Helper()
	b, err := proto.Marshal(m)
	must(t, err)
	return string(b)
}

// raise raises the alarm of a member whose database is full.
func raise(t *testing.T, c *clientv3.Client, member uint64) {
	t.Helper()
	_, err := pb.NewMaintenanceClient(c.ActiveConnection()).Alarm(t.Context(), &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, MemberID: member, Alarm: pb.AlarmType_NOSPACE})
	must(t, err)
}

func TestMailbox(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Dir: folder(t)})
	works(t, s)
	ctx, id := t.Context(), plan(1).GetId()

	if _, err := s.Plan(ctx, "alice", id); !fault.Is(err, fault.NotFound) {
		t.Errorf("no plan: %v", err)
	}
	if err := s.PostApproval(ctx, "alice", id, "bob", "token"); !fault.Is(err, fault.NotFound) {
		t.Errorf("an approval of no plan: %v", err)
	}
	if err := s.WatchApprovals(ctx, "alice", id, nil); !fault.Is(err, fault.NotFound) {
		t.Errorf("watching no plan: %v", err)
	}
	must(t, s.PostPlan(ctx, "alice", plan(1)))
	must(t, s.PostPlan(ctx, "alice", plan(1))) // again
	other := plan(1)
	other.Sha256 = strings.Repeat("f", 64)
	if err := s.PostPlan(ctx, "alice", other); !fault.Is(err, fault.Refused) {
		t.Errorf("another plan of that name: %v", err)
	}
	must(t, s.PostPlan(ctx, "mallory", other)) // which takes nobody's place
	for _, token := range []string{"token 1", "token 1", "token 2"} {
		must(t, s.PostApproval(ctx, "alice", id, "bob", token))
	}
	list, err := s.Plans(ctx, "")
	if err != nil || len(list) != 2 || list[0].GetRequester() != "alice" || len(list[0].GetApprovers()) != 1 || list[0].GetApprovers()[0] != "bob" || list[0].GetSummary() != "scale ds/1" ||
		list[0].GetPlan() != nil || len(list[1].GetApprovers()) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	if list, err := s.Plans(ctx, "mallory"); err != nil || len(list) != 1 || list[0].GetPlanSha256() != other.GetSha256() {
		t.Errorf("%v, %v", list, err)
	}
	if x, err := s.Plan(ctx, "alice", id); err != nil || x.GetPlan().GetSha256() != plan(1).GetSha256() || len(x.GetApprovers()) != 1 {
		t.Errorf("%v, %v", x, err)
	}

	// Bounds.
	for n := range maxTokensEach - 2 {
		must(t, s.PostApproval(ctx, "alice", id, "bob", fmt.Sprint("more ", n)))
	}
	if err := s.PostApproval(ctx, "alice", id, "bob", "one too many"); !fault.Is(err, fault.Refused) {
		t.Errorf("too many of one approver: %v", err)
	}
	for n := range maxTokens - maxTokensEach {
		must(t, s.PostApproval(ctx, "alice", id, fmt.Sprint("approver-", n), "token"))
	}
	if err := s.PostApproval(ctx, "alice", id, "carol", "token"); !fault.Is(err, fault.Refused) {
		t.Errorf("too many of one plan: %v", err)
	}
	if err := s.PostApproval(ctx, "alice", id, "carol", strings.Repeat("x", approval.MaxToken+1)); !fault.Is(err, fault.Usage) {
		t.Errorf("too long: %v", err)
	}
	for n := range maxPlansEach - 1 {
		must(t, s.PostPlan(ctx, "alice", plan(10+n)))
	}
	if err := s.PostPlan(ctx, "alice", plan(99)); !fault.Is(err, fault.Refused) {
		t.Errorf("too many of one person: %v", err)
	}
	for n := range maxPlans - maxPlansEach - 1 {
		must(t, s.PostPlan(ctx, fmt.Sprint("p", n), plan(1)))
	}
	if err := s.PostPlan(ctx, "carol", plan(1)); !fault.Is(err, fault.Unreachable) {
		t.Errorf("too many at all: %v", err)
	}
	large := plan(98)
	large.Summary = strings.Repeat("x", maxPlan)
	if err := s.PostPlan(ctx, "alice", large); !fault.Is(err, fault.TooLarge) {
		t.Errorf("too large: %v", err)
	}
	for _, bad := range []string{"", "a/b", "../x", strings.Repeat("1", 65), "\x00"} {
		p := plan(1)
		p.Id = bad
		if err := s.PostPlan(ctx, "alice", p); !fault.Is(err, fault.Usage) {
			t.Errorf("identifier %q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "F" + strings.Repeat("0", 63), strings.Repeat("0", 65), strings.Repeat("0", 1<<18)} {
		p := plan(1)
		p.Sha256 = bad
		if err := s.PostPlan(ctx, "alice", p); !fault.Is(err, fault.Usage) {
			t.Errorf("hash %.80q: %v", bad, err)
		}
	}
}

// TestExpiry: a plan, its approvals and who watches them end with it.
func TestExpiry(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Dir: folder(t)})
	works(t, s)
	p := plan(1)
	p.Expires = p.GetCreated()
	// Not at once, or one person's plans, one after the other, would fill the store.
	must(t, s.PostPlan(t.Context(), "mallory", p))
	if x, err := s.Plan(t.Context(), "mallory", p.GetId()); err != nil || x.GetExpires().AsTime().Sub(x.GetPosted().AsTime()) < keepGone || maxPlans*maxPlan*3 > quota {
		t.Errorf("%v, %v", x, err)
	}
	kv, err := s.client.Load().Get(t.Context(), heads+"mallory/", clientv3.WithPrefix())
	must(t, err)
	if left, err := s.client.Load().TimeToLive(t.Context(), clientv3.LeaseID(kv.Kvs[0].Lease)); err != nil || time.Duration(left.GrantedTTL)*time.Second < keepGone {
		t.Errorf("%v, %v", left, err)
	}
	_, err = s.client.Load().Revoke(t.Context(), clientv3.LeaseID(kv.Kvs[0].Lease))
	must(t, err)

	s.leastWait = 2 * time.Second
	must(t, s.PostPlan(t.Context(), "alice", p))
	must(t, s.PostApproval(t.Context(), "alice", p.GetId(), "bob", "token"))
	got := 0
	if err := s.WatchApprovals(t.Context(), "alice", p.GetId(), func(*halliganv1.WatchPlanEvent) error { got++; return nil }); err != nil || got != 1 {
		t.Errorf("%d approvals, then %v", got, err)
	}
	left, err := s.client.Load().Get(t.Context(), root+"approvals/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil || len(left.Kvs) != 0 {
		t.Errorf("left: %v, %v", left.Kvs, err)
	}
}

// TestGivenUp: who no longer waits costs nothing.
func TestGivenUp(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Dir: folder(t)})
	works(t, s)
	must(t, s.PostPlan(t.Context(), "alice", plan(1)))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.WatchApprovals(ctx, "alice", plan(1).GetId(), nil); err == nil {
		t.Error("it goes on")
	}
	if s.Degraded() != "" {
		t.Error(s.Degraded())
	}
}
