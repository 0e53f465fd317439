package verb

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/halligan-io/halligan/api"
	halliganv1 "github.com/halligan-io/halligan/api/halligan/v1"
	"github.com/halligan-io/halligan/internal/fault"
)

// mutate plans, shows, asks, applies and reports.
func (v *Verbs) mutate(cmd *cobra.Command, action *halliganv1.Action, parameters *structpb.Struct) error {
	tokens, err := v.tokens(cmd)
	if err != nil {
		return err
	}
	if v.willApply() && len(tokens) == 0 && strings.TrimSpace(v.reason) == "" {
		return fault.New(fault.Usage, "say why with --reason TEXT or HALLIGAN_REASON, or look first with --dry-run",
			"%s needs a reason for the record", action.GetName())
	}
	ctx := cmd.Context()
	if err := v.connect(ctx); err != nil {
		return err
	}
	var plan *halliganv1.Plan
	if len(tokens) > 0 {
		plan, err = v.approved(cmd, action, parameters, tokens)
	} else {
		plan, err = v.plan(ctx, action, parameters)
	}
	if err != nil {
		return err
	}
	return v.decide(ctx, action, plan, tokens)
}

func (v *Verbs) willApply() bool { return !v.dryRun && (v.yes || v.InTTY) }

// decide shows a plan, asks, applies and reports.
func (v *Verbs) decide(ctx context.Context, action *halliganv1.Action, plan *halliganv1.Plan, tokens []string) error {
	machine := v.output != "table"
	if !machine {
		v.ShowPlan(v.Out, plan)
	}
	if v.dryRun {
		return v.report(planned(plan))
	}
	empty := len(plan.GetObjects()) == 0
	if empty && !v.willApply() {
		// It is neither applied nor refused: there is nothing to agree to.
		if !machine {
			fmt.Fprintln(v.Out, nothingChanged)
		}
		return v.report(planned(plan))
	}
	if plan.GetApprovalsNeeded() > 0 && len(tokens) == 0 && !v.alone && plan.GetReason() != "" {
		if tokens = v.await(ctx, plan); len(tokens) == 0 {
			return v.report(v.awaiting(plan))
		}
	}
	// A plan of nothing is nothing to ask a person about.
	if !v.yes && !empty {
		if err := v.confirm(ctx, plan, machine); err != nil {
			r := planned(plan)
			r.Error = api.ErrorOf(err)
			return v.report(r)
		}
	}
	return v.report(v.apply(ctx, action, plan, tokens))
}

func (v *Verbs) plan(ctx context.Context, action *halliganv1.Action, parameters *structpb.Struct) (*halliganv1.Plan, error) {
	ctx, cancel := context.WithTimeout(ctx, v.limit(action))
	defer cancel()
	plan, err := v.agent.Plan(ctx, &halliganv1.PlanRequest{
		Action: action.GetName(), Parameters: parameters, Reason: v.reason, Incident: v.incident,
	})
	if err != nil {
		return nil, api.FromStatus(err)
	}
	return plan, v.check(plan)
}

// confirm returns nil when a person agrees.
func (v *Verbs) confirm(ctx context.Context, plan *halliganv1.Plan, machine bool) error {
	if !v.InTTY {
		next := "run it again with --yes"
		if strings.TrimSpace(plan.GetReason()) == "" {
			next += " and --reason TEXT"
		}
		return fault.New(fault.Usage, next, "nothing was changed, since there is no terminal to ask on")
	}
	if machine {
		v.ShowPlan(v.Err, plan)
	}
	question := "Apply this plan? [y/N] "
	if v.alone && plan.GetApprovalsNeeded() > 0 {
		question = "Apply this plan alone, without " + line(signatures(plan)) + "? [y/N] "
	}
	answer, err := v.answer(ctx, question)
	if answer = strings.ToLower(strings.TrimSpace(answer)); err == nil && (answer == "y" || answer == "yes") {
		return nil
	}
	return fault.New(fault.Cancelled, "nothing was changed", "the plan was not confirmed")
}

// answer asks a person for a line.
func (v *Verbs) answer(ctx context.Context, question string) (string, error) {
	if v.Ask != nil {
		return v.Ask(ctx, question)
	}
	fmt.Fprint(v.Err, question)
	answer := make(chan string, 1)
	// It ends with the process at the latest: a read of a terminal cannot be
	// called off.
	go func() {
		line, _ := bufio.NewReader(v.In).ReadString('\n')
		answer <- line
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(v.Err)
		return "", ctx.Err()
	case line := <-answer:
		return line, nil
	}
}

// apply sends the plan once, and finds out what became of it whatever happens
// to the connection.
func (v *Verbs) apply(ctx context.Context, action *halliganv1.Action, plan *halliganv1.Plan, tokens []string) *halliganv1.Result {
	limit := v.limit(action)
	callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	callCtx, leave := context.WithCancelCause(callCtx)
	defer v.interruptible(ctx, callCtx, leave, plan.GetId())()
	outcome := func(err error) *halliganv1.Result {
		r := failedResult(api.FromStatus(err))
		r.Action, r.Via, r.Plan = plan.GetId(), plan.GetVia(), plan
		return r
	}
	unknown := func(code fault.Code, text string, args ...any) *halliganv1.Result {
		r := outcome(fault.New(code, "see: halligan history "+plan.GetId(), text, args...))
		r.Result = "unknown"
		return r
	}
	stream, err := v.agent.Apply(callCtx, &halliganv1.ApplyRequest{PlanId: plan.GetId(), PlanSha256: plan.GetSha256(), Approvals: tokens, Alone: v.alone})
	began := false
	for err == nil {
		var event *halliganv1.ApplyEvent
		if event, err = stream.Recv(); err != nil {
			break
		}
		if r := event.GetResult(); r != nil {
			v.endProgress()
			return r
		}
		began = true
		v.progress(event.GetProgress())
	}
	v.endProgress()
	var ended *fault.Error // why the caller's login did
	switch {
	case errors.Is(context.Cause(callCtx), errLeft) && errors.As(context.Cause(ctx), &ended):
		return unknown(fault.Unknown, "%s; the agent stops %s between two objects", ended.Message, plan.GetId())
	case errors.Is(context.Cause(callCtx), errLeft):
		return unknown(fault.Cancelled, "stopped watching; the agent goes on with %s", plan.GetId())
	case !began && answered(err):
		return outcome(err)
	// The agent's clock of the same deadline may strike first.
	case callCtx.Err() != nil || status.Code(err) == codes.DeadlineExceeded:
		return unknown(fault.Unknown, "no result within %s; the agent goes on with %s", limit, plan.GetId())
	}
	v.Note("the connection broke; asking the agent what became of %s", plan.GetId())
	entry := v.ascertain(ctx, plan.GetId())
	switch {
	case entry == nil:
		return unknown(fault.Unknown, "the connection broke and nobody could say what became of %s", plan.GetId())
	case entry.GetResult() == "unfinished":
		return unknown(fault.Unknown, "the connection broke and %s is not finished", plan.GetId())
	}
	return &halliganv1.Result{Action: plan.GetId(), Result: entry.GetResult(), Via: plan.GetVia(), Plan: plan, Objects: entry.GetResults()}
}

// errLeft is why nobody watches an action any more.
var errLeft = errors.New("stopped watching")

// interruptible makes the first Ctrl-C stop the action between two objects, and
// the second one, or a first that the agent does not take, stop watching it.
// The function that it returns ends this.
func (v *Verbs) interruptible(interrupted, call context.Context, leave context.CancelCauseFunc, id string) (end func()) {
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-call.Done():
			return
		case <-interrupted.Done():
		}
		if errors.Is(context.Cause(interrupted), ErrGone) {
			leave(errLeft)
			return
		}
		again, done := call, func() {}
		if v.with.Again != nil {
			again, done = v.with.Again(call)
		}
		defer done()
		ctx, cancel := context.WithTimeout(call, 2*time.Second)
		defer cancel()
		if _, err := v.agent.Stop(ctx, &halliganv1.StopRequest{ActionId: id}); err != nil {
			leave(errLeft)
			return
		}
		v.Note("stopping %s between two objects; Ctrl-C again stops watching", id)
		<-again.Done() // with the call at the latest
		if call.Err() == nil {
			leave(errLeft)
		}
	})
	return func() { leave(nil); watch.Wait() }
}

// answered reports whether an agent refused the call itself, so that nothing
// was begun.
func answered(err error) bool {
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	return len(s.Details()) > 0 || s.Code() == codes.Unimplemented || s.Code() == codes.Unauthenticated
}

// ascertain asks for the record of an action until it is finished, nil when
// there is none or nobody answers in time.
func (v *Verbs) ascertain(ctx context.Context, id string) (last *halliganv1.HistoryEntry) {
	ctx, cancel := context.WithTimeout(ctx, v.Settle)
	defer cancel()
	for {
		if entry := v.record(ctx, id); entry != nil {
			if last = entry; entry.GetResult() != "unfinished" {
				return last
			}
		}
		select {
		case <-ctx.Done():
			return last
		case <-time.After(v.Reprobe):
		}
	}
}

func (v *Verbs) record(ctx context.Context, id string) *halliganv1.HistoryEntry {
	if v.connect(ctx) != nil {
		return nil
	}
	stream, err := v.agent.History(ctx, &halliganv1.HistoryRequest{ActionId: id})
	if err != nil {
		return nil
	}
	entry, err := stream.Recv()
	if err != nil || entry.GetActionId() != id {
		return nil
	}
	return entry
}

// failedResult is what a mutation ends with that came to nothing.
func failedResult(f *fault.Error) *halliganv1.Result {
	r := &halliganv1.Result{Result: "failed", Error: api.ErrorOf(f)}
	switch f.Code {
	case fault.Stale, fault.Refused, fault.Unverified, fault.AwaitingApproval, fault.Unknown:
		r.Result = string(f.Code)
	}
	return r
}

// report prints a result and returns the error that it stands for, if any.
func (v *Verbs) report(r *halliganv1.Result) error {
	err := resultError(r)
	if r.GetError() == nil && err != nil {
		r.Error = api.ErrorOf(err)
	}
	if v.output != "table" {
		if perr := v.printResult(r); perr != nil {
			return errors.Join(perr, err)
		}
	} else if len(r.GetObjects()) > 0 || r.GetResult() == "applied" {
		v.showResult(v.Out, r)
	}
	if v.output == "table" && r.GetResult() == string(fault.AwaitingApproval) {
		v.askApprovers(r.GetPlan())
	}
	return err
}

// resultError gives every result but success its class: that of its error,
// unless the result says more.
func resultError(r *halliganv1.Result) error {
	f := &fault.Error{Code: fault.Code(r.GetError().GetCode()), Message: r.GetError().GetMessage(), Next: r.GetError().GetNext()}
	look := "see: halligan history " + r.GetAction()
	done := 0
	for _, o := range r.GetObjects() {
		if o.GetOutcome() == "applied" {
			done++
		}
	}
	fallback := func(code fault.Code, next, text string, args ...any) {
		if f.Message == "" {
			f = fault.New(code, next, text, args...)
		}
	}
	switch r.GetResult() {
	case "applied", "planned":
		if f.Message == "" {
			return nil
		}
	case "partial":
		fallback(fault.Failed, look, "%d of %d objects were changed", done, len(r.GetPlan().GetObjects()))
		f.Code = fault.Failed
	case "unknown":
		fallback(fault.Unknown, look, "what became of %s is not known", r.GetAction())
		if f.Code.Exit() != 1 {
			f.Code = fault.Unknown
		}
	case string(fault.Stale), string(fault.Refused), string(fault.Unverified), string(fault.AwaitingApproval):
		fallback(fault.Code(r.GetResult()), look, "%s ended as %s", r.GetAction(), r.GetResult())
		f.Code = fault.Code(r.GetResult())
	default:
		fallback(fault.Failed, look, "%s failed", r.GetAction())
	}
	if f.Code == "" {
		f.Code = fault.Failed
	}
	return f
}
