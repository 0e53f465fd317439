package agent

import (
	"context"

	"github.com/halligan-io/halligan/agent/action"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
	"github.com/halligan-io/halligan/internal/trust"
)

// oneSigner is the engine before it knows approvals.
type oneSigner struct{ *action.Engine }

func (e oneSigner) Apply(ctx context.Context, who trust.Identity, req *halliganv1.ApplyRequest, progress func(*halliganv1.Progress)) *halliganv1.Result {
	return e.Engine.Apply(ctx, who, req.GetPlanId(), req.GetPlanSha256(), progress)
}

func (e oneSigner) ShowPlan(context.Context, trust.Identity, string) (*halliganv1.Plan, error) {
	return nil, fault.New(fault.Failed, "use a newer agent", "this agent shows no plans")
}
