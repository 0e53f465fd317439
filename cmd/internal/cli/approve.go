package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/api/verb"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/approval"
)

// maxPlan bounds a plan's file, in bytes.
const maxPlan = 16 << 20

// approveCommand signs that somebody else's plan may go ahead.
func (a *app) approveCommand(v *verb.Verbs) *cobra.Command {
	return &cobra.Command{
		Use: "approve [PLAN-FILE|PLAN-ID]", Short: "Sign that another person's plan may be applied",
		Long: "Sign that another person's plan may be applied. The plan is shown, and what is\nsigned is the hash of what is shown. The plan comes from the mailbox\n" +
			"of the bastions, from its agent, or from a file, as `halligan plan ID -o json` or\n--dry-run -o json prints it. Without any, what waits in the mailbox is listed.\n\n" +
			"One line is printed: send it to whoever asked, for halligan apply --approval. Who\nwaits at the mailbox gets it from there.",
		Example:     "  halligan approve\n  halligan approve 0198a7c2\n  halligan approve --node cp-1 0198a7c2\n  halligan approve plan.json",
		Annotations: map[string]string{"effect": "mutate"},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return verb.Usage(cmd, "approve takes one PLAN-FILE or PLAN-ID")
			}
			for _, name := range []string{"reason", "incident", "dry-run", "approval", "alone"} {
				if cmd.Flags().Changed(name) {
					return verb.Usage(cmd, "approve signs a plan as it is: --%s does not apply", name)
				}
			}
			yes, err := cmd.Flags().GetBool("yes")
			if err != nil {
				return err
			}
			a.approver = true
			return a.approve(cmd.Context(), v, strings.Join(args, ""), yes, cmd.Flag("output").Value.String() == "table")
		},
	}
}

func (a *app) approve(ctx context.Context, v *verb.Verbs, what string, yes, table bool) error {
	if socket, err := a.console(); err != nil {
		return err
	} else if socket != "" {
		return fault.New(fault.Usage, "name a bundle with --bundle or HALLIGAN_BUNDLE", "an approval is signed with an approver's key, and at a console there is none")
	}
	if what == "" {
		var err error
		if what, err = a.choose(ctx, v, a.InTTY && table, table); what == "" {
			return err
		}
	}
	if !yes && !a.InTTY {
		return fault.New(fault.Usage, "run it on a terminal, or with --yes once you have read the plan", "nothing was signed, since there is no terminal to ask on")
	}
	plan, err := a.planOf(ctx, v, what)
	if err != nil {
		return err
	}
	f, err := a.open()
	if err != nil {
		return err
	}
	statement, err := f.statement(plan)
	if err != nil {
		return err
	}
	v.ShowWhole(a.Err, plan)
	fmt.Fprintf(a.Err, "sha256: %s\n", statement.PlanSHA256)
	if !yes {
		if err := a.agree(ctx, fmt.Sprintf("Approve this plan of %s as %s, until %s? [y/N] ", plan.GetActor(), f.login.Person, stamp(statement.Expires))); err != nil {
			return err
		}
	}
	if f.login.SecurityKey() && a.ErrTTY {
		fmt.Fprintln(a.Err, "touch the key to sign")
	}
	token, err := approval.Sign(statement, f.login.Signer(), f.login.Certificate)
	if err != nil {
		return fault.New(fault.Failed, "see whether the ssh-agent still holds the key: ssh-add -l", "nothing was signed: %w", err)
	}
	if table {
		if _, err = fmt.Fprintln(a.Out, token); err == nil {
			f.hand(ctx, token)
		}
		return err
	}
	f.hand(ctx, token)
	text, err := json.Marshal(struct {
		Approval  string             `json:"approval"`
		Statement approval.Statement `json:"statement"`
	}{token.String(), token.Statement})
	if err != nil {
		return err
	}
	return v.PrintJSON(text)
}

// planOf returns the plan of a file, or that a mailbox or an agent keeps under the
// ID. With --node that agent is asked first; without, the mailbox is, and then
// the agents of the cluster.
func (a *app) planOf(ctx context.Context, v *verb.Verbs, what string) (*halliganv1.Plan, error) {
	data, err := readFile(what, maxPlan)
	switch {
	case err == nil:
		return parsePlan(what, data)
	case !errors.Is(err, fs.ErrNotExist) || strings.ContainsAny(what, "/."):
		return nil, fault.New(fault.Usage, "name a file with a plan, or a plan's ID", "the plan cannot be read: %w", err)
	}
	f, err := a.open()
	if err != nil {
		return nil, err
	}
	if f.way.direct() {
		return v.Fetch(ctx, what)
	}
	if err := f.way.ready(ctx); err != nil {
		return nil, err
	}
	if a.node == "" {
		if plan, err := f.fetch(ctx, what); plan != nil || err != nil {
			return plan, err
		}
		return v.Fetch(ctx, what)
	}
	plan, err := v.Fetch(ctx, what)
	if fault.CodeOf(err) == fault.Unreachable {
		if kept, kerr := f.fetch(ctx, what); kept != nil && kerr == nil {
			return kept, nil
		}
	}
	return plan, err
}

// parsePlan reads a plan as JSON, or the result of a mutation that has one.
// What this build cannot read it cannot show, so it must not be signed.
func parsePlan(name string, data []byte) (*halliganv1.Plan, error) {
	var result struct {
		Plan json.RawMessage `json:"plan"`
	}
	if err := json.Unmarshal(data, &result); err == nil && len(result.Plan) > 0 {
		data = result.Plan
	}
	plan := &halliganv1.Plan{}
	if err := protojson.Unmarshal(data, plan); err != nil {
		return nil, fault.New(fault.Usage, "make the file with `halligan plan ID -o json`, and read it with a client as new as the agent", "%s is no plan that this client can read: %w", name, err)
	}
	return plan, nil
}

// statement says what is approved, or why that makes no sense. The hash is that
// of the plan as it is shown.
func (f *fleet) statement(plan *halliganv1.Plan) (approval.Statement, error) {
	a, b := f.app, f.bundles.Current()
	sum, err := api.PlanSHA256(plan)
	if err != nil {
		return approval.Statement{}, fault.New(fault.Failed, "read it with a client as new as the agent", "this client cannot show all of the plan: %w", err)
	}
	now := f.clock.Now()
	expires := now.Add(approval.MaxLife - time.Minute) // the agent's clock may be behind
	if end := plan.GetExpires().AsTime(); plan.GetExpires() != nil && end.Before(expires) {
		expires = end
	}
	refuse := func(code fault.Code, next, text string, args ...any) (approval.Statement, error) {
		return approval.Statement{}, fault.New(code, next, text, args...)
	}
	switch {
	case sum != plan.GetSha256():
		return refuse(fault.Refused, "do not trust whoever sent it; take the plan from its agent with --node", "plan %s has another hash than it says: it was changed", plan.GetId())
	case f.login.Certificate == nil:
		return refuse(fault.Unauthenticated, "use a certificate that names the role approver", "an approval needs a certificate, and %s has none", f.login.Name())
	case plan.GetApprovalsNeeded() == 0:
		return refuse(fault.Usage, "apply it: halligan apply "+plan.GetId(), "plan %s needs nobody's approval", plan.GetId())
	case plan.GetActor() == f.login.Person:
		return refuse(fault.Refused, "ask another person", "plan %s is your own", plan.GetId())
	case plan.GetExpires() != nil && !now.Before(plan.GetExpires().AsTime()):
		return refuse(fault.Stale, "have it planned again", "plan %s ended at %s", plan.GetId(), stamp(plan.GetExpires().AsTime()))
	}
	if _, known := b.Inventory.Cluster(plan.GetClusterName()); !known {
		return refuse(fault.Usage, "take the bundle of the fleet that it is for with --bundle", "plan %s is for cluster %q, which the bundle's inventory does not have", plan.GetId(), plan.GetClusterName())
	}
	if len(plan.GetObjects()) == 0 {
		a.note("the plan changes nothing")
	}
	return approval.Statement{
		Fleet: b.Policy.Fleet, Cluster: plan.GetCluster(), ClusterName: plan.GetClusterName(), Node: plan.GetNode() + "." + plan.GetClusterName(),
		Plan: plan.GetId(), PlanSHA256: sum, Nonce: plan.GetNonce(), Requester: plan.GetActor(), PolicyVersion: plan.GetPolicyVersion(), Expires: expires,
	}, nil
}

// agree returns nil when a person says yes.
func (a *app) agree(ctx context.Context, question string) error {
	said, err := a.reply(ctx, question)
	if err != nil {
		return err
	}
	if said = strings.ToLower(said); said == "y" || said == "yes" {
		return nil
	}
	return fault.New(fault.Cancelled, "nothing was signed", "the plan was not approved")
}
