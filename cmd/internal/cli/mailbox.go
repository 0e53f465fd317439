package cli

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/approval"
	"github.com/halligan-io/halligan/internal/trust/bundle"
	"github.com/halligan-io/halligan/internal/trust/credential"
)

// The mailbox of the bastions spares people two pasted lines, and is needed for
// nothing. Bastions may share one or have one each, so all of them are told and
// asked. None of it is believed: who approves hashes what they are shown, and who
// applies counts what verifies.

const (
	// posting bounds handing something to the mailboxes, or looking into them.
	posting = 3 * time.Second
	// rewatch is the time before a mailbox is watched again that broke.
	rewatch = time.Second
)

// await posts a plan, and returns the approvals that are there; where a person
// waits, as soon as they are enough.
func (a *app) await(ctx context.Context, plan *halliganv1.Plan, wait bool) []string {
	f := a.fleet
	if f == nil || f.way.direct() {
		return nil
	}
	b := f.newBallot(plan)
	took := f.post(ctx, plan)
	if len(took) == 0 {
		return nil
	}
	if !wait {
		ctx, cancel := context.WithTimeout(ctx, posting)
		defer cancel()
		if !f.complete(ctx, plan) {
			return nil
		}
		b.watch(ctx)
		return b.enough()
	}
	fmt.Fprintln(a.Err, "Waiting for approval… Ctrl-C to leave")
	// The agent's clock decides when the plan ends, and may be behind.
	ctx, cancel := context.WithDeadline(ctx, plan.GetExpires().AsTime().Add(time.Minute))
	defer cancel()
	b.watch(ctx)
	return b.enough()
}

// post puts the plan into the mailboxes, and returns the bastions that took it.
func (f *fleet) post(ctx context.Context, plan *halliganv1.Plan) (took []string) {
	ctx, cancel := context.WithTimeout(ctx, posting)
	defer cancel()
	var mu sync.Mutex // guards all below
	var why error
	f.way.each(ctx, func(ctx context.Context, p *passage) {
		bastion, err := p.bastion(ctx)
		if err == nil {
			_, err = bastion.PostPlan(ctx, &halliganv1.PostPlanRequest{Plan: plan})
		}
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			why = api.FromStatus(err)
			return
		}
		took = append(took, p.host.ID())
	})
	switch {
	case len(took) > 0:
		f.app.note("the plan waits in the mailbox, too: an approver finds it with halligan approve")
	case why != nil && ctx.Err() == nil:
		f.app.note("the plan is in no mailbox: %s", fault.Of(why).Message)
	}
	return took
}

// complete reports whether a mailbox has as many approvals as the plan needs.
func (f *fleet) complete(ctx context.Context, plan *halliganv1.Plan) bool {
	for _, w := range f.waiting(ctx) {
		if w.GetPlanId() == plan.GetId() {
			return len(w.GetApprovers()) >= int(plan.GetApprovalsNeeded())
		}
	}
	return false
}

// waiting returns what the mailboxes have, the oldest first.
func (f *fleet) waiting(ctx context.Context) (list []*halliganv1.WaitingPlan) {
	ctx, cancel := context.WithTimeout(ctx, posting)
	defer cancel()
	var mu sync.Mutex // guards list
	f.way.each(ctx, func(ctx context.Context, p *passage) {
		bastion, err := p.bastion(ctx)
		if err != nil {
			return
		}
		got, err := bastion.ListPlans(ctx, &halliganv1.ListPlansRequest{})
		if err != nil {
			f.app.note("the mailbox of %s: %s", p.host.ID(), api.FromStatus(err).Message)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, w := range got.GetPlans() {
			i := slices.IndexFunc(list, func(o *halliganv1.WaitingPlan) bool { return o.GetPlanId() == w.GetPlanId() })
			if i < 0 {
				list = append(list, w)
			} else if len(w.GetApprovers()) > len(list[i].GetApprovers()) {
				list[i] = w
			}
		}
	})
	slices.SortFunc(list, func(x, y *halliganv1.WaitingPlan) int {
		return cmp.Or(x.GetPosted().AsTime().Compare(y.GetPosted().AsTime()), strings.Compare(x.GetPlanId(), y.GetPlanId()))
	})
	return list
}

// fetch returns a plan out of a mailbox, nil where none has it.
func (f *fleet) fetch(ctx context.Context, id string) (plan *halliganv1.Plan, err error) {
	ctx, cancel := context.WithTimeout(ctx, posting)
	defer cancel()
	var mu sync.Mutex // guards what is returned
	f.way.each(ctx, func(ctx context.Context, p *passage) {
		bastion, berr := p.bastion(ctx)
		if berr != nil {
			return
		}
		got, berr := bastion.ListPlans(ctx, &halliganv1.ListPlansRequest{PlanId: id})
		mu.Lock()
		defer mu.Unlock()
		switch e := api.FromStatus(berr); {
		case e != nil && e.Code == fault.Usage:
			err = e
		case e == nil && len(got.GetPlans()) == 1 && got.GetPlans()[0].GetPlan() != nil:
			plan = got.GetPlans()[0].GetPlan()
		}
	})
	return plan, err
}

// hand puts an approval where its requester waits for it.
func (f *fleet) hand(ctx context.Context, token *approval.Token) {
	if f.way.direct() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, posting)
	defer cancel()
	var mu sync.Mutex // guards took
	took := false
	f.way.each(ctx, func(ctx context.Context, p *passage) {
		bastion, err := p.bastion(ctx)
		if err == nil {
			_, err = bastion.PostApproval(ctx, &halliganv1.PostApprovalRequest{Approval: token.String()})
		}
		mu.Lock()
		defer mu.Unlock()
		took = took || err == nil
	})
	if took {
		f.app.note("the approval is in the mailbox, too: %s need not paste it while waiting there", token.Statement.Requester)
	}
}

// ballot gathers the approvals of one plan.
type ballot struct {
	fleet     *fleet
	plan      *halliganv1.Plan
	facts     approval.Plan
	authority *credential.Authority

	mu     sync.Mutex // guards all below
	tokens []string   // of different people and keys
	seen   map[string]bool
}

func (f *fleet) newBallot(plan *halliganv1.Plan) *ballot {
	b := f.bundles.Current()
	node := plan.GetNode() + "." + plan.GetClusterName()
	facts := approval.Plan{Fleet: b.Policy.Fleet, Cluster: plan.GetCluster(), ClusterName: plan.GetClusterName(), Node: node, ID: plan.GetId(), SHA256: plan.GetSha256(),
		Nonce: plan.GetNonce(), Requester: plan.GetActor(), RequesterKey: gossh.FingerprintSHA256(f.login.Public), PolicyVersion: plan.GetPolicyVersion(), Action: plan.GetAction()}
	for _, o := range plan.GetObjects() {
		if !slices.Contains(facts.Namespaces, o.GetNamespace()) {
			facts.Namespaces = append(facts.Namespaces, o.GetNamespace())
		}
	}
	return &ballot{fleet: f, plan: plan, facts: facts, seen: map[string]bool{},
		authority: credential.New(credential.Options{Bundle: fixed{b}, Clock: f.clock, Cluster: plan.GetClusterName(), Node: plan.GetNode()})}
}

// count takes an approval that verifies, and reports whether they are enough. A
// bastion that makes some up changes nothing.
func (b *ballot) count(e *halliganv1.WatchPlanEvent) (enough bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	need := int(b.plan.GetApprovalsNeeded())
	if len(b.tokens) >= need || b.seen[e.GetApproval()] || len(b.seen) > approval.MaxTokens {
		return len(b.tokens) >= need
	}
	b.seen[e.GetApproval()] = true
	now := b.fleet.clock.Now()
	one, err := approval.Verify([]string{e.GetApproval()}, b.facts, b.authority, now)
	if err != nil {
		b.fleet.app.note("an approval that came is not taken: %s", fault.Of(err).Message)
		return false
	}
	all, err := approval.Verify(append(slices.Clone(b.tokens), e.GetApproval()), b.facts, b.authority, now)
	if err != nil || len(all) <= len(b.tokens) {
		return false // one of a person or a key that is counted
	}
	b.tokens = append(b.tokens, e.GetApproval())
	b.fleet.app.note("approved by %s", one[0].Approver)
	return len(b.tokens) >= need
}

// enough returns the approvals if they are.
func (b *ballot) enough() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.tokens) < int(b.plan.GetApprovalsNeeded()) {
		return nil
	}
	return b.tokens
}

// watch follows all mailboxes until there are enough approvals, the plan is gone
// from all of them, or the context ends. A bastion that breaks, or comes back, is
// watched again.
func (b *ballot) watch(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	way := b.fleet.way
	var watching sync.WaitGroup
	for _, host := range way.bastions {
		watching.Go(func() {
			for ctx.Err() == nil {
				over := b.follow(ctx, host)
				if b.enough() != nil {
					cancel()
				}
				if over {
					return
				}
				select {
				case <-ctx.Done():
				case <-time.After(rewatch):
				}
			}
		})
	}
	watching.Wait()
}

// follow watches one mailbox, and reports whether there is nothing more to come.
func (b *ballot) follow(ctx context.Context, host bundle.Host) (over bool) {
	way := b.fleet.way
	p, err := way.by(ctx, host)
	if err != nil {
		return errors.Is(err, errTouch)
	}
	bastion, err := p.bastion(ctx)
	if err != nil {
		return false
	}
	stream, err := bastion.WatchPlan(ctx, &halliganv1.WatchPlanRequest{PlanId: b.plan.GetId()})
	for err == nil {
		var event *halliganv1.WatchPlanEvent
		if event, err = stream.Recv(); err == nil && b.count(event) {
			return true
		}
	}
	if errors.Is(err, io.EOF) {
		return true // it expired
	}
	if api.FromStatus(err).Code == fault.NotFound && ctx.Err() == nil {
		// One that was not there when it was posted, or has lost it.
		post, cancel := context.WithTimeout(ctx, posting)
		defer cancel()
		_, _ = bastion.PostPlan(post, &halliganv1.PostPlanRequest{Plan: b.plan})
	}
	return false
}

// choose shows what waits for the caller's approval and asks which; "" where
// nothing does, or nobody can be asked.
func (a *app) choose(ctx context.Context, v *verb.Verbs, ask, table bool) (string, error) {
	f, err := a.open()
	if err != nil {
		return "", err
	}
	if f.way.direct() {
		return "", fault.New(fault.Usage, "name a PLAN-FILE or a PLAN-ID", "there is no mailbox to look into without a bastion")
	}
	if err := f.way.ready(ctx); err != nil {
		return "", err
	}
	list := slices.DeleteFunc(f.waiting(ctx), func(w *halliganv1.WaitingPlan) bool {
		return w.GetRequester() == f.login.Person || slices.Contains(w.GetApprovers(), f.login.Person) || a.cluster != "" && w.GetCluster() != a.cluster
	})
	if !table {
		text, err := waitingJSON(list)
		if err != nil {
			return "", err
		}
		return "", v.PrintJSON(text)
	}
	if len(list) == 0 {
		a.note("nothing waits for your approval")
		return "", nil
	}
	out := a.Out
	if ask {
		out = a.Err // the output is the approval
	}
	if err := a.showWaiting(out, list, ask); err != nil || !ask {
		return "", err
	}
	said, err := a.reply(ctx, fmt.Sprintf("Which one? [1-%d] ", len(list)))
	if err != nil {
		return "", err
	}
	if n, err := strconv.Atoi(said); err == nil && n >= 1 && n <= len(list) {
		return list[n-1].GetPlanId(), nil
	}
	for _, w := range list {
		if said != "" && strings.HasPrefix(w.GetPlanId(), said) {
			return w.GetPlanId(), nil
		}
	}
	return "", fault.New(fault.Cancelled, "nothing was signed", "none was chosen")
}

func waitingJSON(list []*halliganv1.WaitingPlan) ([]byte, error) {
	all := make([]string, len(list))
	for i, w := range list {
		text, err := api.CanonicalJSON(w)
		if err != nil {
			return nil, err
		}
		all[i] = string(text)
	}
	return []byte("[" + strings.Join(all, ",") + "]"), nil
}

func (a *app) showWaiting(out io.Writer, list []*halliganv1.WaitingPlan, numbers bool) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	number := func(text string) string {
		if numbers {
			return text + "\t"
		}
		return ""
	}
	fmt.Fprintf(w, "%sPLAN\tREQUESTER\tWHERE\tENDS\tAPPROVED\tWHAT\n", number(""))
	for i, p := range list {
		fmt.Fprintf(w, "%s%s\t%s\t%s\t%s\t%d of %d\t%s\n", number(strconv.Itoa(i+1)), cell(p.GetPlanId()), cell(p.GetRequester()), cell(p.GetNode()+"."+p.GetCluster()),
			until(p.GetExpires().AsTime().Sub(a.Now())), len(p.GetApprovers()), p.GetApprovalsNeeded(), cell(p.GetSummary()+": "+p.GetReason()))
	}
	return w.Flush()
}

// reply asks a person for a line.
func (a *app) reply(ctx context.Context, question string) (string, error) {
	fmt.Fprint(a.Err, question)
	answer := make(chan string, 1)
	// It ends with the process at the latest: a read of a terminal cannot be
	// called off.
	go func() {
		if a.input == nil {
			a.input = bufio.NewReader(a.In)
		}
		line, _ := a.input.ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.Err)
		return "", ctx.Err()
	case said := <-answer:
		return said, nil
	}
}
