package verb

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust/approval"
)

// planCommand shows a plan that waits.
func (v *Verbs) planCommand() *cobra.Command {
	return &cobra.Command{
		Use: "plan PLAN-ID", Aliases: []string{"show"}, Short: "Show a plan that waits to be applied", Args: onePlan,
		Long: "Show a plan that waits to be applied, to whoever made it and to those who may\napprove it. -o json is what halligan approve takes as a file.",
		RunE: func(cmd *cobra.Command, args []string) error {
			plan, err := v.Fetch(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if v.output == "table" {
				v.ShowPlan(v.Out, plan)
			}
			return v.report(planned(plan))
		},
	}
}

// applyCommand applies a plan that somebody else has approved meanwhile.
func (v *Verbs) applyCommand(actions []*halliganv1.Action) *cobra.Command {
	return &cobra.Command{
		Use: "apply PLAN-ID", Short: "Apply a plan that waits, with the approvals that it needs", Args: onePlan,
		Long: "Apply a plan that waits, with the approvals that it needs. The plan is shown again\nand must be the one that was approved.",
		Example: "  halligan apply 0198a7c2 --approval halligan-approval-1:...\n" +
			"  halligan apply 0198a7c2 --alone --yes",
		Annotations: map[string]string{"effect": "mutate"},
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range []string{"reason", "incident"} {
				if cmd.Flags().Changed(name) {
					return Usage(cmd, "the plan has its %s already: --%s does not apply", name, name)
				}
			}
			tokens, err := v.tokens(cmd)
			if err != nil {
				return err
			}
			plan, err := v.Fetch(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return v.decide(cmd.Context(), actionOf(actions, plan), plan, tokens)
		},
	}
}

func onePlan(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return Usage(cmd, "%s needs one PLAN-ID", cmd.Name())
	}
	return nil
}

// actionOf returns the row of a plan's action, or where this client has none
// the time of the slowest.
func actionOf(actions []*halliganv1.Action, plan *halliganv1.Plan) *halliganv1.Action {
	slowest := &halliganv1.Action{Name: plan.GetAction()}
	for _, a := range actions {
		if a.GetName() == plan.GetAction() {
			return a
		}
		slowest.TimeoutSeconds = max(slowest.TimeoutSeconds, a.GetTimeoutSeconds())
	}
	return slowest
}

// Fetch returns a plan that waits at the agent, connecting to it where that was
// not done.
func (v *Verbs) Fetch(ctx context.Context, id string) (*halliganv1.Plan, error) {
	if v.agent == nil {
		if err := v.connect(ctx); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, v.limit(nil))
	defer cancel()
	plan, err := v.agent.ShowPlan(ctx, &halliganv1.ShowPlanRequest{PlanId: id})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	return plan, v.check(plan)
}

// check makes sure that what is shown is what will be applied. A newer agent
// may say more in its plan than this client can show.
func (v *Verbs) check(plan *halliganv1.Plan) error {
	if sum, err := api.PlanSHA256(plan); err != nil {
		v.Note("this client is older than the agent and cannot show all of the plan")
	} else if sum != plan.GetSha256() {
		return fault.New(fault.Failed, "nothing was changed; report it", "the agent's plan %s does not have the hash that it names", plan.GetId())
	}
	return nil
}

// tokens returns the approvals that --approval brings.
func (v *Verbs) tokens(cmd *cobra.Command) ([]string, error) {
	var tokens []string
	for _, given := range v.approvals {
		if !strings.HasPrefix(given, approval.Prefix) {
			if v.with.ReadFile == nil {
				return nil, fault.New(fault.Usage, "paste the approval itself, which begins with "+approval.Prefix, "no files can be read here")
			}
			text, err := v.with.ReadFile(given)
			if err != nil {
				if path := (*fs.PathError)(nil); errors.As(err, &path) {
					err = path.Err // without the path, which may be half a token
				}
				return nil, fault.New(fault.Usage, "paste the whole line that halligan approve printed, or name a file of it",
					"--approval %.32q is no token, which begins with %s, and no file that can be read: %w", given, approval.Prefix, err)
			}
			given = string(text)
		}
		for token := range strings.FieldsSeq(given) {
			if _, err := approval.Parse(token); err != nil {
				return nil, err
			}
			tokens = append(tokens, token)
		}
	}
	if len(tokens) == 0 && len(v.approvals) > 0 {
		return nil, Usage(cmd, "--approval brings no approval")
	}
	if len(tokens) > approval.MaxTokens {
		return nil, Usage(cmd, "%d approvals are too many", len(tokens))
	}
	return tokens, nil
}

// approved returns the plan that approvals name, if it does what the line says.
func (v *Verbs) approved(cmd *cobra.Command, action *halliganv1.Action, parameters *structpb.Struct, tokens []string) (*halliganv1.Plan, error) {
	id := ""
	for _, token := range tokens {
		t, err := approval.Parse(token)
		if err != nil {
			return nil, err
		}
		if id != "" && t.Statement.Plan != id {
			return nil, Usage(cmd, "the approvals are for different plans, %s and %s", id, t.Statement.Plan)
		}
		id = t.Statement.Plan
	}
	plan, err := v.Fetch(cmd.Context(), id)
	if err != nil {
		return nil, err
	}
	refuse := func(what string) error {
		return fault.New(fault.Usage, "look at it: halligan plan "+id+", and if it is meant: halligan apply "+id+" --approval ...",
			"what was approved has another %s than this line", what)
	}
	switch {
	case plan.GetAction() != action.GetName():
		return nil, refuse("action")
	case !proto.Equal(plan.GetParameters(), parameters):
		return nil, refuse("target or value")
	case cmd.Flags().Changed("reason") && plan.GetReason() != v.reason:
		return nil, refuse("reason")
	case cmd.Flags().Changed("incident") && plan.GetIncident() != v.incident:
		return nil, refuse("incident")
	}
	return plan, nil
}

// awaiting is what becomes of a plan that others have to approve first.
func (v *Verbs) awaiting(plan *halliganv1.Plan) *halliganv1.Result {
	next := "send the first line to an approver, then run the second"
	if v.output != "table" {
		lines := v.approvalLines(plan)
		next = "have it approved: " + lines[0] + ", then run: " + lines[1]
	}
	if plan.GetAloneAllowed() {
		next += ", or, where nobody else is awake, apply it with --alone"
	}
	err := fault.New(fault.AwaitingApproval, next, "plan %s awaits %s", plan.GetId(), signatures(plan))
	return &halliganv1.Result{Action: plan.GetId(), Result: string(fault.AwaitingApproval), Via: plan.GetVia(), Plan: plan, Error: api.ErrorOf(err)}
}

// await hands on a plan to whoever brings approvals. The lines for approvers are
// there before, since nothing but them is sure.
func (v *Verbs) await(ctx context.Context, plan *halliganv1.Plan) []string {
	if v.with.Await == nil {
		return nil
	}
	people := v.output == "table"
	if people {
		v.askApprovers(plan)
	}
	return v.with.Await(ctx, plan, people && v.InTTY && v.ErrTTY)
}

// askApprovers prints what to send to an approver, and what to run then, once.
func (v *Verbs) askApprovers(plan *halliganv1.Plan) {
	if !v.asked {
		lines := v.approvalLines(plan)
		fmt.Fprintf(v.Out, "%s\n%s\n", lines[0], lines[1])
	}
	v.asked = true
}

// signatures says what a plan needs of others, and why.
func signatures(plan *halliganv1.Plan) string {
	text := "the approval of another person"
	if n := plan.GetApprovalsNeeded(); n > 1 {
		text = fmt.Sprintf("the approvals of %d other people", n)
	}
	if why := plan.GetApprovalReason(); why != "" {
		text += ": " + why
	}
	return text
}

// approvalLines are what to send to an approver, and what to run then.
func (v *Verbs) approvalLines(plan *halliganv1.Plan) [2]string {
	at := "--node " + plan.GetNode()
	if plan.GetClusterName() != "" {
		at = "--cluster " + plan.GetClusterName() + " " + at
	}
	back := ""
	if v.with.Where != nil {
		back = strings.Join(append(v.with.Where(plan), ""), " ")
	}
	return [2]string{line("halligan approve " + at + " " + plan.GetId()), line("halligan apply " + back + plan.GetId() + " --approval FILE-OR-TOKEN")}
}

func planned(plan *halliganv1.Plan) *halliganv1.Result {
	return &halliganv1.Result{Action: plan.GetId(), Result: "planned", Via: plan.GetVia(), Plan: plan}
}
