package store

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/neutral"
	"github.com/halligan-io/halligan/internal/trust/approval"
)

// A plan is in two keys, what a list shows and the whole of it, and each approval
// is in one below the plan's. The requester's name is in all of them, so that
// nobody can take the place of another's plan; all end with the plan's lease.
const (
	heads  = root + "approvals/plans/"  // REQUESTER/PLAN
	bodies = root + "approvals/bodies/" // REQUESTER/PLAN
	tokens = root + "approvals/tokens/" // REQUESTER/PLAN/APPROVER/HASH
)

const (
	// maxPlan bounds a plan, in bytes. One for some thousand objects is larger:
	// its approvers read it at the agent.
	maxPlan = 512 << 10
	// maxPlans bounds those that wait, maxPlansEach those of one requester.
	maxPlans     = 128
	maxPlansEach = 16
	// maxTokens bounds the approvals of one plan, maxTokensEach those of one
	// approver for it, who may have erred before.
	maxTokens     = 64
	maxTokensEach = 4
	// maxHeadText bounds each text of what a list shows, in bytes.
	maxHeadText = 512
	// A plan waits for as long as it lives by its own word, within these bounds.
	// The least is as long as the embedded store keeps what is gone: shorter ones,
	// one after the other, would fill it, though few are there at any time.
	leastWait = keepGone
	mostWait  = time.Hour
)

var (
	planForm = regexp.MustCompile(`^[0-9A-Za-z-]{1,64}$`)
	hashForm = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// PostPlan puts a plan of the requester's into the mailbox, where it is until it
// expires; putting it there again changes nothing. That the requester made it is
// the caller's to check.
func (s *Store) PostPlan(ctx context.Context, requester string, plan *halliganv1.Plan) error {
	if !planForm.MatchString(plan.GetId()) || !hashForm.MatchString(plan.GetSha256()) {
		return fault.New(fault.Usage, "post the plan as the agent gave it", "%.80q is no plan's identifier, or %.80q no plan's hash", plan.GetId(), plan.GetSha256())
	}
	body, err := proto.Marshal(plan)
	if err != nil {
		return err
	}
	if len(body) > maxPlan {
		return fault.New(fault.TooLarge, "send your approver the line that names the plan: it is read at the agent", "the plan has %d KiB; the mailbox takes %d", len(body)>>10, maxPlan>>10)
	}
	// By the agent's clock alone: the bastion's may be another.
	wait := min(max(plan.GetExpires().AsTime().Sub(plan.GetCreated().AsTime()), s.leastWait), mostWait)
	head, err := proto.Marshal(headOf(requester, plan, wait))
	if err != nil {
		return err
	}
	at := requester + "/" + plan.GetId()
	return s.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
		counted, err := c.Txn(ctx).Then(clientv3.OpGet(heads+at), clientv3.OpGet(heads+requester+"/", clientv3.WithPrefix(), clientv3.WithCountOnly()),
			clientv3.OpGet(heads, clientv3.WithPrefix(), clientv3.WithCountOnly())).Commit()
		if err != nil {
			return err
		}
		there := counted.Responses[0].GetResponseRange().Kvs
		switch {
		case len(there) > 0:
			return same(there[0].Value, plan)
		case counted.Responses[1].GetResponseRange().Count >= maxPlansEach:
			return fault.New(fault.Refused, "let some of them expire, or send your approver the line that names the plan", "%s has %d plans in the mailbox already", requester, maxPlansEach)
		case counted.Responses[2].GetResponseRange().Count >= maxPlans:
			return fault.New(fault.Unreachable, "send your approver the line that names the plan", "the mailbox has %d plans already", maxPlans)
		}
		lease, err := c.Grant(ctx, int64(wait/time.Second))
		if err != nil {
			return err
		}
		put, err := c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(heads+at), "=", 0)).
			Then(clientv3.OpPut(heads+at, string(head), clientv3.WithLease(lease.ID)), clientv3.OpPut(bodies+at, string(body), clientv3.WithLease(lease.ID))).
			Else(clientv3.OpGet(heads + at)).Commit()
		if err != nil {
			return err
		}
		if !put.Succeeded {
			_, _ = c.Revoke(ctx, lease.ID) // which has nothing, and ends by itself
			if there := put.Responses[0].GetResponseRange().Kvs; len(there) > 0 {
				return same(there[0].Value, plan)
			}
		}
		return nil
	})
}

// same refuses another plan under an identifier that is there already.
func same(head []byte, plan *halliganv1.Plan) error {
	x := &halliganv1.WaitingPlan{}
	if proto.Unmarshal(head, x) == nil && x.GetPlanSha256() == plan.GetSha256() {
		return nil
	}
	return fault.New(fault.Refused, "plan anew", "the mailbox has another plan %s already", plan.GetId())
}

func headOf(requester string, p *halliganv1.Plan, wait time.Duration) *halliganv1.WaitingPlan {
	now := time.Now()
	return &halliganv1.WaitingPlan{PlanId: p.GetId(), PlanSha256: p.GetSha256(), Requester: requester, Cluster: brief(p.GetClusterName()), Node: brief(p.GetNode()),
		Action: brief(p.GetAction()), Summary: brief(p.GetSummary()), Reason: brief(p.GetReason()), Incident: brief(p.GetIncident()),
		ApprovalsNeeded: p.GetApprovalsNeeded(), ApprovalReason: brief(p.GetApprovalReason()),
		Posted: timestamppb.New(now), Expires: timestamppb.New(now.Add(wait))}
}

func brief(text string) string { return neutral.LineMax(text, maxHeadText) }

// Plans lists what waits, of one requester or of all for "", the oldest first.
func (s *Store) Plans(ctx context.Context, requester string) (list []*halliganv1.WaitingPlan, err error) {
	below := ""
	if requester != "" {
		below = requester + "/"
	}
	err = s.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
		got, err := c.Txn(ctx).Then(clientv3.OpGet(heads+below, clientv3.WithPrefix(), clientv3.WithLimit(2*maxPlans)),
			clientv3.OpGet(tokens+below, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(2*maxPlans*maxTokens))).Commit()
		if err != nil {
			return err
		}
		approvers := map[string][]string{}
		for _, kv := range got.Responses[1].GetResponseRange().Kvs {
			if at, approver := whose(string(kv.Key)); !slices.Contains(approvers[at], approver) {
				approvers[at] = append(approvers[at], approver)
			}
		}
		list = nil
		for _, kv := range got.Responses[0].GetResponseRange().Kvs {
			at := strings.TrimPrefix(string(kv.Key), heads)
			if x := readHead(at, kv.Value); x != nil {
				x.Approvers = approvers[at]
				list = append(list, x)
			}
		}
		return nil
	})
	slices.SortFunc(list, func(a, b *halliganv1.WaitingPlan) int {
		return cmp.Or(a.GetPosted().AsTime().Compare(b.GetPosted().AsTime()), cmp.Compare(a.GetPlanId(), b.GetPlanId()))
	})
	return list, err
}

// whose returns REQUESTER/PLAN and the approver of an approval's key.
func whose(key string) (at, approver string) {
	parts := strings.SplitN(strings.TrimPrefix(key, tokens), "/", 4)
	if len(parts) != 4 {
		return "", ""
	}
	return parts[0] + "/" + parts[1], neutral.LineMax(parts[2], maxText)
}

// readHead returns what a list shows of a plan, nil where that is not what
// PostPlan writes.
func readHead(at string, value []byte) *halliganv1.WaitingPlan {
	x := &halliganv1.WaitingPlan{}
	if !fromStore(value, x, func() []*timestamppb.Timestamp { return []*timestamppb.Timestamp{x.Posted, x.Expires} }) || x.GetRequester()+"/"+x.GetPlanId() != at || x.GetPlan() != nil || len(x.GetApprovers()) > 0 {
		return nil
	}
	for _, text := range []*string{&x.PlanId, &x.PlanSha256, &x.Requester, &x.Cluster, &x.Node, &x.Action, &x.Summary, &x.Reason, &x.Incident, &x.ApprovalReason} {
		*text = brief(*text)
	}
	return x
}

// Plan returns what waits under the identifier of one requester, with the whole
// plan. Whoever decides on it verifies it.
func (s *Store) Plan(ctx context.Context, requester, id string) (x *halliganv1.WaitingPlan, err error) {
	at := requester + "/" + id
	err = s.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
		got, err := c.Txn(ctx).Then(clientv3.OpGet(heads+at), clientv3.OpGet(bodies+at), clientv3.OpGet(tokens+at+"/", clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(2*maxTokens))).Commit()
		if err != nil {
			return err
		}
		head, body := got.Responses[0].GetResponseRange().Kvs, got.Responses[1].GetResponseRange().Kvs
		if len(head) == 0 || len(body) == 0 {
			return notThere(id)
		}
		plan := &halliganv1.Plan{}
		if x = readHead(at, head[0].Value); x == nil || proto.Unmarshal(body[0].Value, plan) != nil || plan.GetId() != x.GetPlanId() || plan.GetSha256() != x.GetPlanSha256() {
			return fault.New(fault.Undecodable, "look at the plan at the agent: halligan plan "+id, "the mailbox has something else where plan %s was", id)
		}
		x.Plan = plan
		for _, kv := range got.Responses[2].GetResponseRange().Kvs {
			if _, approver := whose(string(kv.Key)); !slices.Contains(x.Approvers, approver) {
				x.Approvers = append(x.Approvers, approver)
			}
		}
		return nil
	})
	return x, err
}

func notThere(id string) error {
	return fault.New(fault.NotFound, "it may have expired, or never been put there: approvals can be pasted by hand", "the mailbox has no plan %.80s", id)
}

// PostApproval hands in an approver's token for a plan that waits. Nothing of it
// is verified here; that it is the approver's own, in form, is the caller's to
// check.
func (s *Store) PostApproval(ctx context.Context, requester, id, approver, token string) error {
	if len(token) > approval.MaxToken {
		return fault.New(fault.Usage, "", "an approval has at most %d bytes", approval.MaxToken)
	}
	at := requester + "/" + id
	sum := sha256.Sum256([]byte(token))
	key := tokens + at + "/" + approver + "/" + hex.EncodeToString(sum[:8])
	return s.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
		got, err := c.Txn(ctx).Then(clientv3.OpGet(heads+at), clientv3.OpGet(key, clientv3.WithKeysOnly()),
			clientv3.OpGet(tokens+at+"/"+approver+"/", clientv3.WithPrefix(), clientv3.WithCountOnly()),
			clientv3.OpGet(tokens+at+"/", clientv3.WithPrefix(), clientv3.WithCountOnly())).Commit()
		if err != nil {
			return err
		}
		head := got.Responses[0].GetResponseRange().Kvs
		switch {
		case len(head) == 0:
			return notThere(id)
		case len(got.Responses[1].GetResponseRange().Kvs) > 0:
			return nil
		case got.Responses[2].GetResponseRange().Count >= maxTokensEach, got.Responses[3].GetResponseRange().Count >= maxTokens:
			return fault.New(fault.Refused, "hand the line to the requester yourself", "the mailbox has enough approvals of plan %s", id)
		}
		_, err = c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(heads+at), "!=", 0), clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, token, clientv3.WithLease(clientv3.LeaseID(head[0].Lease)))).Commit()
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return notThere(id)
		}
		return err
	})
}

// WatchApprovals sends the approvals of a plan that waits, those that are there
// first and each once, until the plan expires (nil), the context ends, sending
// fails, or the store does.
func (s *Store) WatchApprovals(ctx context.Context, requester, id string, send func(*halliganv1.WatchPlanEvent) error) error {
	at := requester + "/" + id
	sent, wasThere := map[string]bool{}, false
	for {
		var revision int64
		var there []*halliganv1.WatchPlanEvent
		var keys []string
		err := s.call(ctx, func(ctx context.Context, c *clientv3.Client) error {
			got, err := c.Txn(ctx).Then(clientv3.OpGet(heads+at, clientv3.WithKeysOnly()), clientv3.OpGet(tokens+at+"/", clientv3.WithPrefix(), clientv3.WithLimit(2*maxTokens))).Commit()
			if err != nil {
				return err
			}
			if len(got.Responses[0].GetResponseRange().Kvs) == 0 {
				return notThere(id)
			}
			revision, there, keys = got.Header.Revision, nil, nil
			for _, kv := range got.Responses[1].GetResponseRange().Kvs {
				if _, approver := whose(string(kv.Key)); approver != "" && len(kv.Value) <= approval.MaxToken && len(sent) < 2*maxTokens {
					there, keys = append(there, &halliganv1.WatchPlanEvent{Approver: approver, Approval: strings.ToValidUTF8(string(kv.Value), "")}), append(keys, string(kv.Key))
				}
			}
			return nil
		})
		switch {
		case fault.Is(err, fault.NotFound) && wasThere:
			return nil
		case err != nil:
			return err
		}
		for i, e := range there {
			if !sent[keys[i]] {
				sent[keys[i]] = true
				if err := send(e); err != nil {
					return err
				}
			}
		}
		wasThere = true
		if err := s.changed(ctx, at, revision); err != nil {
			return err
		}
	}
}

// lookAgain is how long a change may go unnoticed where a watch does not tell of
// it.
const lookAgain = 5 * time.Second

// changed waits until something of a plan may have changed since the revision.
func (s *Store) changed(ctx context.Context, at string, revision int64) error {
	c := s.client.Load()
	watch, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), lookAgain)
	defer cancel()
	// Two small watches on one stream, which ends with them.
	approvals := c.Watch(watch, tokens+at+"/", clientv3.WithPrefix(), clientv3.WithRev(revision+1))
	plan := c.Watch(watch, heads+at, clientv3.WithRev(revision+1), clientv3.WithFilterPut())
	for {
		var heard clientv3.WatchResponse
		var open bool
		select {
		case heard, open = <-approvals:
		case heard, open = <-plan:
		case <-watch.Done():
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case len(heard.Events) > 0, watch.Err() != nil:
			return nil
		case !open || heard.Err() != nil:
			// It broke, and calls will say why, or not.
			select {
			case <-watch.Done():
			case <-time.After(tryTimeout / 4):
			}
			return nil
		}
	}
}
